"""YAML head of the cards of released data sets and models, in the form that the Hugging Face Hub reads. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline_steps.core.schemas import PUBLIC_DOMAIN

HUB_SPLITS = {"train": "train", "val": "validation", "test": "test"}
"""Split of the pairs -> its name in `datasets`."""

_HUB_LICENSES = frozenset(
    {
        *("0bsd", "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bsd-2-clause", "bsd-3-clause", "bsl-1.0"),
        *("cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "cc-by-nd-4.0"),
        *("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"),
        *("cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "creativeml-openrail-m", "openrail", "openrail++"),
        *("gfdl", "gpl-2.0", "gpl-3.0", "isc", "lgpl-2.1", "lgpl-3.0", "mit", "mpl-2.0", "odbl", "odc-by", "ofl-1.1", "pddl"),
        *("unlicense", "wtfpl", "zlib"),
    }
)
"""Identifiers that the hub accepts in `license` (https://huggingface.co/docs/hub/repositories-licenses)."""

_RENAMED = {"odbl-1.0": "odbl", "odc-by-1.0": "odc-by", "pddl-1.0": "pddl"}
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10_000_000, "1M<n<10M"))


def hub_license(license: str | None) -> str:
    """Identifier of the hub for an SPDX id; `other` if the hub has none."""
    plain = (license or "").lower().removesuffix("-only").removesuffix("-or-later")
    plain = _RENAMED.get(plain, "gfdl" if plain.startswith("gfdl-") else plain)
    return plain if plain in _HUB_LICENSES else "other"


def license_fields(licenses: Iterable[str | None], private: bool = False) -> dict[str, Any]:
    """Fields `license`, and where it is `other` alone `license_name` and `license_link`.

    Public domain has no identifier on the hub; `LICENSES.csv` and the card name it.
    """
    if private:
        return {"license": "other", "license_name": "private", "license_link": "LICENSES.csv"}
    names = sorted({hub_license(name) for name in licenses if name != PUBLIC_DOMAIN})
    if names in ([], ["other"]):
        return {"license": "other", "license_name": "see-licenses-csv", "license_link": "LICENSES.csv"}
    return {"license": names[0] if len(names) == 1 else names}


def dataset_head(
    title: str,
    licenses: Iterable[str | None],
    files: Mapping[str, str],
    examples: Mapping[str, int],
    num_bytes: Mapping[str, int],
    tags: Sequence[str],
    private: bool = False,
) -> str:
    """YAML head of a data-set card, with the delimiters.

    Args:
        title: shown as the name of the data set.
        licenses: SPDX ids of the works.
        files: split -> pattern of its files.
        examples: split -> number of pairs; splits without pairs are left out.
        num_bytes: split -> bytes of its files.
        tags: beside those of every data set of this project.
        private: whether the set may not be published.
    """
    from huggingface_hub import DatasetCardData

    present = [split for split in files if examples.get(split)]
    total = sum(examples.values())
    size = sum(num_bytes[split] for split in present)
    head = DatasetCardData(
        pretty_name=title,
        **license_fields(licenses, private),
        annotations_creators=["machine-generated"],
        size_categories=[next((name for limit, name in _SIZES if total < limit), "n>10M")],
        tags=["audio", "image", "audio-to-image", "image-to-audio", "sonification", *tags, *(["private"] if private else [])],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": HUB_SPLITS[split], "path": files[split]} for split in present],
            }
        ],
        dataset_info={
            "splits": [
                {"name": HUB_SPLITS[split], "num_bytes": num_bytes[split], "num_examples": examples[split]} for split in present
            ],
            "download_size": size,
            "dataset_size": size,
        },
    )
    return f"---\n{head.to_yaml()}\n---\n\n"
