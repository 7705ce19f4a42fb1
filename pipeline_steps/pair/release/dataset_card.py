"""The data-set card and the Croissant description of the pairs: what is in them, how they were made, what they do not show."""

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
    """One row for each license among `licenses`, strictest last: how often, its obligations, whether it may be shared."""
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
    """Counts of pairs, pictures, sounds and groups of each split."""
    table = []
    for split in SPLITS:
        own = [pair for pair in pairs if pair["split"] == split]
        table.append(
            {
                "split": split,
                "pairs": len(own),
                "pictures": len({pair["image_id"] for pair in own}),
                "sounds": len({track["audio_id"] for pair in own for track in pair["tracks"]}),
                "picture_groups": len({pair["image_group"] for pair in own}),
                "sound_groups": len({pair["audio_group"] for pair in own}),
            }
        )
    return table


def render_card(pairs: Sequence[Row], stats: Mapping[str, Any], parameters: Mapping[str, Any], title: str) -> str:
    """The card as Markdown. Whatever comes from the data passes `escape_markdown`, so it cannot act as markup."""
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
    unshared = sum(not combine_all((pair["image_license"], pair["audio_license"])).publishable for pair in pairs)
    return environment.get_template(TEMPLATE).render(
        title=title,
        n=len(pairs),
        splits=split_table(pairs),
        licenses=license_table([pair["license"] for pair in pairs]),
        image_licenses=license_table([pair["image_license"] for pair in pairs]),
        audio_licenses=license_table([pair["audio_license"] for pair in pairs]),
        unshared=unshared,
        phrases=sorted(phrases.items(), key=lambda item: (-item[1], item[0]))[:20],
        n_phrases=len(phrases),
        stats=stats,
        parameters=dict(sorted(parameters.items())),
    )


_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}

_FIELDS = (
    ("pair_id", "sc:Text", "hash of the picture's and the sound's id"),
    ("image_id", "sc:Text", "hash of the picture's bytes"),
    ("score", "sc:Float", "similarity of the event's text and the sound, damped against hubs"),
    ("z_score", "sc:Float", "the undamped score in standard deviations above random sounds"),
    ("license", "sc:Text", "the stricter of both licenses, SPDX; empty if one is unknown"),
    ("image_license", "sc:Text", "license of the picture, SPDX"),
    ("audio_license", "sc:Text", "license of the sound, SPDX"),
    ("image_group", "sc:Text", "near-duplicate group of the picture"),
    ("audio_group", "sc:Text", "near-duplicate group of the sound"),
    ("split", "sc:Text", "train, val or test"),
)

_LICENSE_PAGE = {
    PUBLIC_DOMAIN: "https://creativecommons.org/publicdomain/mark/1.0/",
}


def license_url(license: str) -> str:
    """Page of the SPDX list about a license; the identifier itself if it has none there."""
    if license in _LICENSE_PAGE:
        return _LICENSE_PAGE[license]
    plain = re.fullmatch(r"[A-Za-z0-9.+-]+", license) and not license.startswith("LicenseRef-")
    return f"https://spdx.org/licenses/{license}.html" if plain else license


def croissant(
    pairs: Sequence[Row], files: Sequence[Mapping[str, str]], name: str, description: str, version: str
) -> dict[str, Any]:
    """Croissant 1.0 description (https://docs.mlcommons.org/croissant/docs/croissant-spec.html).

    Args:
        files: `{"name", "format", "sha256"}` of each file beside the description; the one called `pairs.parquet` is the
            source of the record set.
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
        "rai:dataCollection": "Pictures and sounds from unrelated pools, matched by machine; no person checked the pairs.",
        "rai:dataLimitations": "A pair says that a model found the sound plausible for the picture, not that they were "
        "recorded together. Do not use it as ground truth about what objects sound like.",
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
                "description": "One row a pair; the column `tracks` (audio_id, sound, gain_db) is in the file.",
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
