"""Contents of a published set: which pairs may be published, their metadata, and the license tables. No I/O."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline_steps.core.escape import escape_csv
from pipeline_steps.pair.release.dataset_card import license_url
from pipeline_steps.pair.release.license_terms import combine_all, terms

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ReleaseSelection:
    """Pairs that are published, and (pair, code, reason) of excluded pairs."""

    pairs: list[Row]
    left_out: list[tuple[Row, str, str]]

    def counts(self) -> dict[str, int]:
        return dict(sorted(Counter(code for _, code, _ in self.left_out).items()))


def select(pairs: Sequence[Row], licenses: Collection[str] | None) -> ReleaseSelection:
    """Exclude pairs with a work whose license is unknown, forbids sharing changed copies, or is not listed.

    Args:
        licenses: SPDX ids that are included; None for every license that allows sharing.
    """
    kept: list[Row] = []
    left_out: list[tuple[Row, str, str]] = []
    for pair in pairs:
        own = {"image": pair["image_license"], "audio": pair["audio_license"]}
        unknown = [f"{what} {name!r}" for what, name in own.items() if not terms(name).known]
        closed = [f"{what} {name!r}" for what, name in own.items() if not terms(name).publishable]
        unwanted = [f"{what} {name!r}" for what, name in own.items() if licenses is not None and name not in licenses]
        if unknown:
            left_out.append((pair, "LICENSE_UNKNOWN", f"license not known: {', '.join(unknown)}"))
        elif closed:
            left_out.append((pair, "LICENSE_FORBIDS", f"no sharing of changed copies: {', '.join(closed)}"))
        elif unwanted:
            left_out.append((pair, "LICENSE_NOT_LISTED", f"not among the listed licenses: {', '.join(unwanted)}"))
        else:
            kept.append(pair)
    return ReleaseSelection(kept, left_out)


def track_members(pair: Row) -> list[str]:
    """Member extension of each clip: `flac` for a single clip, `0.flac`, `1.flac`... for several."""
    count = len(pair["tracks"])
    return ["flac"] if count == 1 else [f"{index}.flac" for index in range(count)]


def sample_json(pair: Row, image: Row, audio: Mapping[str, Row]) -> dict[str, Any]:
    """Metadata of one sample; `image` and `audio[audio_id]` are catalog rows."""
    return {
        **{name: pair[name] for name in ("pair_id", "split", "score", "z_score", "license")},
        "obligations": sorted(combine_all((pair["image_license"], pair["audio_license"])).obligations),
        "image": {"image_id": pair["image_id"], "group": pair["image_group"], **_credit(image)},
        "tracks": [
            {**track, "member": member, "duration_s": clip["duration_s"], **_credit(clip)}
            for track, member in zip(pair["tracks"], track_members(pair), strict=True)
            for clip in [audio[track["audio_id"]]]
        ],
    }


def _credit(row: Row) -> dict[str, Any]:
    return {"license": row["license"], "author": row["author"], "source": row["source"]}


CREDIT_COLUMNS = ("kind", "id", "license", "license_url", "obligations", "author", "source")


def credits_csv(pairs: Sequence[Row], images: Mapping[str, Row], audio: Mapping[str, Row]) -> str:
    """CSV with attribution and license of each work. Cells cannot act as formulas."""
    used = [("image", pair["image_id"], images[pair["image_id"]]) for pair in pairs]
    used += [("audio", track["audio_id"], audio[track["audio_id"]]) for pair in pairs for track in pair["tracks"]]
    lines = []
    for kind, item, row in sorted({(kind, item): (kind, item, row) for kind, item, row in used}.values(), key=lambda w: w[:2]):
        wants = ", ".join(sorted(terms(row["license"]).obligations))
        url = license_url(row["license"]) if row["license"] else None
        lines.append((kind, item, row["license"], url, wants, row["author"], row["source"]))
    return _csv(CREDIT_COLUMNS, lines)


def left_out_csv(selection: ReleaseSelection) -> str:
    """CSV of excluded pairs, with the reason."""
    header = ("pair_id", "image_id", "audio_id", "image_license", "audio_license", "code", "reason")
    lines = []
    for pair, code, reason in sorted(selection.left_out, key=lambda item: str(item[0]["pair_id"])):
        clips = " ".join(track["audio_id"] for track in pair["tracks"])
        lines.append((pair["pair_id"], pair["image_id"], clips, pair["image_license"], pair["audio_license"], code, reason))
    return _csv(header, lines)


def _csv(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([escape_csv(value) for value in line] for line in lines)
    return buffer.getvalue()
