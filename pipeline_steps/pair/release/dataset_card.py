"""Data set card and Croissant 1.0 description of the pairs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline_steps.core.escape import escape_markdown
from pipeline_steps.core.schemas import PUBLIC_DOMAIN
from pipeline_steps.pair.release.license_terms import combine_all, terms
from pipeline_steps.pair.splits import SPLITS

Row = Mapping[str, Any]

TEMPLATE = "dataset_card.md.jinja"


def license_table(licenses: Sequence[str | None]) -> list[dict[str, Any]]:
    """One row per license, strictest last: count, obligations, whether changed copies may be shared."""
    rows = []
    for name, count in Counter(licenses).items():
        found = terms(name)
        rows.append(
            {
                "license": name or "unknown",
                "count": count,
                "obligations": ", ".join(sorted(found.obligations)) or ("none" if found.known else "not known"),
                "publishable": found.publishable,
                "commercial": found.commercial,
                "strictness": found.strictness,
            }
        )
    return sorted(rows, key=lambda row: (row["strictness"], str(row["license"])))


def split_table(pairs: Sequence[Row]) -> list[dict[str, Any]]:
    """Numbers of pairs, images, clips and groups of each split."""
    table = []
    for split in SPLITS:
        own = [pair for pair in pairs if pair["split"] == split]
        table.append(
            {
                "split": split,
                "pairs": len(own),
                "images": len({pair["image_id"] for pair in own}),
                "clips": len({track["audio_id"] for pair in own for track in pair["tracks"]}),
                "image_groups": len({pair["image_group"] for pair in own}),
                "audio_groups": len({pair["audio_group"] for pair in own}),
            }
        )
    return table


def render_card(pairs: Sequence[Row], stats: Mapping[str, Any], parameters: Mapping[str, Any], title: str) -> str:
    """Card as Markdown. Values from the data are escaped, so they cannot act as markup."""
    environment = Environment(
        loader=PackageLoader("pipeline_steps.pair.release", "."),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701 - Markdown, not HTML: the filter `md` is applied to every value instead
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=escape_markdown,
    )
    phrases = Counter(track["phrase"] for pair in pairs for track in pair["tracks"])
    unpublishable = sum(not combine_all((pair["image_license"], pair["audio_license"])).publishable for pair in pairs)
    return environment.get_template(TEMPLATE).render(
        title=title,
        n=len(pairs),
        splits=split_table(pairs),
        licenses=license_table([pair["license"] for pair in pairs]),
        image_licenses=license_table([pair["image_license"] for pair in pairs]),
        audio_licenses=license_table([pair["audio_license"] for pair in pairs]),
        unpublishable=unpublishable,
        phrases=sorted(phrases.items(), key=lambda item: (-item[1], item[0]))[:20],
        n_phrases=len(phrases),
        stats=stats,
        parameters=dict(sorted(parameters.items())),
    )


_CROISSANT_TERMS = (
    "citeAs", "column", "equivalentProperty", "extract", "field", "fileProperty", "fileObject", "fileSet", "format", "includes",
    "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet", "references", "regex", "repeated", "replace",
    "samplingRate", "separator", "source", "subField", "transform",
)  # fmt: skip

_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "sc": "https://schema.org/",
    **{name: f"cr:{name}" for name in _CROISSANT_TERMS},
}

_FIELDS = (
    ("pair_id", "sc:Text", "hash of the image's and the clip's id"),
    ("image_id", "sc:Text", "hash of the image's bytes"),
    ("score", "sc:Float", "hubness-corrected similarity of the event's text and the clip"),
    ("z_score", "sc:Float", "uncorrected score in standard deviations above random clips"),
    ("license", "sc:Text", "stricter one of both licenses, SPDX; empty if one is unknown"),
    ("image_license", "sc:Text", "license of the image, SPDX"),
    ("audio_license", "sc:Text", "license of the clip, SPDX"),
    ("image_group", "sc:Text", "near-duplicate group of the image"),
    ("audio_group", "sc:Text", "near-duplicate group of the clip"),
    ("split", "sc:Text", "train, val or test"),
)

_LICENSE_PAGE = {PUBLIC_DOMAIN: "https://creativecommons.org/publicdomain/mark/1.0/"}


def license_url(license: str) -> str:
    """URL of a license on the SPDX list; the identifier itself if it is not on the list."""
    if license in _LICENSE_PAGE:
        return _LICENSE_PAGE[license]
    plain = re.fullmatch(r"[A-Za-z0-9.+-]+", license) and not license.startswith("LicenseRef-")
    return f"https://spdx.org/licenses/{license}.html" if plain else license


def croissant(
    pairs: Sequence[Row], files: Sequence[Mapping[str, str]], name: str, description: str, version: str
) -> dict[str, Any]:
    """Croissant 1.0 description (https://docs.mlcommons.org/croissant/docs/croissant-spec.html).

    Args:
        files: `{"name", "format", "sha256"}` of each file beside the description; `pairs.parquet` is the source of the
            record set.
    """
    licenses = sorted({str(pair[key]) for pair in pairs for key in ("image_license", "audio_license") if pair[key]})
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": name,
        "description": description,
        "version": version,
        "url": "README.md",
        "license": [license_url(license) for license in licenses] or ["unknown"],
        "isLiveDataset": False,
        "rai:dataCollection": "Images and audio from unrelated collections, paired automatically; the pairs were not reviewed.",
        "rai:dataLimitations": "A pair means that a model found the clip plausible for the image, not that they were "
        "recorded together. Do not use it as ground truth about the sound of objects.",
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": file["name"],
                "name": file["name"],
                "contentUrl": file["name"],
                "encodingFormat": file["format"],
                "sha256": file["sha256"],
            }
            for file in files
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "pairs",
                "name": "pairs",
                "description": "One row per pair; the column `tracks` (audio_id, phrase, gain_db) is in the file only.",
                "key": {"@id": "pairs/pair_id"},
                "field": [
                    {
                        "@type": "cr:Field",
                        "@id": f"pairs/{column}",
                        "name": column,
                        "description": text,
                        "dataType": kind,
                        "source": {"fileObject": {"@id": "pairs.parquet"}, "extract": {"column": column}},
                    }
                    for column, kind, text in _FIELDS
                ],
            }
        ],
    }
