"""Data set card and Croissant 1.0 description of the pairs."""

from __future__ import annotations

import json
import pkgutil
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
    fixed = json.loads(pkgutil.get_data(__package__, "croissant.json") or b"")
    return {
        **fixed,
        "name": name,
        "description": description,
        "version": version,
        "license": [license_url(license) for license in licenses] or ["unknown"],
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
    }
