"""Files and decoding results -> rows of the catalog and of the quarantine, and the balance between them. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline_steps.core.errors import DataError
from pipeline_steps.core.hashing import ID_LENGTH
from pipeline_steps.ingest.duplicate_groups import assign_duplicate_groups
from pipeline_steps.ingest.file_signatures import wrong_extension
from pipeline_steps.ingest.reason_codes import CODES

TOP = 5
EXAMPLES = 20


@dataclass(frozen=True, slots=True)
class CandidateFile:
    """One candidate that was opened and hashed, with what the metadata table says of it."""

    relative: str
    shown: str
    sha256: str
    bytes: int
    kind: str
    format: str
    license: str | None = None
    author: str | None = None
    source: str | None = None
    group: str | None = None
    holdout: bool = False
    member: ArchiveMember | None = None  # where it lies in `relative`, if that is an archive or a table

    @property
    def name(self) -> str:
        """The name whose extension counts."""
        return self.member.name if self.member else self.relative

    @property
    def item(self) -> str:
        return self.sha256[:ID_LENGTH]


@dataclass(frozen=True, slots=True)
class RejectedFile:
    """One candidate that was not taken."""

    shown: str
    kind: str
    code: str
    reason: str
    bytes: int = 0
    item: str = ""
    decoder: str = ""

    @property
    def abstained(self) -> bool:
        return CODES[self.code].action == "abstained"

    def row(self) -> dict[str, Any]:
        """Row of the quarantine table."""
        meaning = CODES[self.code]
        return {
            "item_id": self.item,
            "kind": self.kind,
            "path": self.shown,
            "bytes": self.bytes,
            "stage": "ingest",
            "code": self.code,
            "reason": self.reason,
            "decoder": self.decoder,
            "action": meaning.action,
            "retryable": meaning.retryable,
        }


def check_identity(files: Iterable[CandidateFile]) -> None:
    """Raise DataError when two contents would share an id (a collision of 128 bits of sha256)."""
    seen: dict[str, CandidateFile] = {}
    for file in files:
        other = seen.setdefault(file.item, file)
        if other.sha256 != file.sha256:
            raise DataError(
                f"{other.shown} and {file.shown} share the id {file.item} and differ in content",
                "remove one of them; nothing was written",
            )


def group_by_content(files: Iterable[CandidateFile]) -> dict[str, list[CandidateFile]]:
    """Files by id, each list sorted by path."""
    items: dict[str, list[CandidateFile]] = {}
    for file in sorted(files, key=lambda file: file.shown):
        items.setdefault(file.item, []).append(file)
    return items


def _joined(values: Iterable[str | None], separator: str) -> str | None:
    known = sorted({value for value in values if value})
    return separator.join(known) or None


def _combine_licenses(licenses: Iterable[str | None]) -> str | None:
    """SPDX expression under which every one of these licenses binds; AND is stronger than OR, so a choice gets brackets."""
    known = {license for license in licenses if license}
    return _joined((f"({one})" if len(known) > 1 and re.search(r"\bOR\b", one) else one for one in known), " AND ")


def catalog_rows(
    kind: str, items: Mapping[str, Sequence[CandidateFile]], results: Mapping[str, Mapping[str, Any]], distance: int
) -> list[dict[str, Any]]:
    """Rows of `images` or `audio` for the accepted items of a kind.

    One row per content: every path that holds it is kept in `sources`; licenses that differ are joined by AND (all of them
    bind; one that offers a choice stands in brackets), authors and sources by "; ". Content that is held out anywhere is held
    out everywhere.

    Args:
        kind: image or audio.
        items: id -> its files, sorted by path.
        results: id -> measurements of the decoder, with `code` None.
        distance: perceptual-hash bits within which pictures group; -1 for none.
    """
    ids = sorted(items)
    keys: list[tuple[int, Hashable]] = [
        (index, file.group) for index, item in enumerate(ids) for file in items[item] if file.group is not None
    ]
    hashes = [results[item]["phash"] for item in ids] if kind == "image" else None
    groups = assign_duplicate_groups(ids, keys, hashes, distance)
    rows: list[dict[str, Any]] = []
    for item, group in zip(ids, groups, strict=True):
        files = items[item]
        measured = {name: value for name, value in results[item].items() if name not in {"code", "reason", "payload"}}
        repaired = set(measured.pop("normalizations"))
        if any(wrong_extension(file.name, measured["format"]) for file in files):
            repaired.add("WRONG_EXTENSION")
        rows.append(
            {
                f"{kind}_id": item,
                "sha256": files[0].sha256,
                "path": files[0].shown,
                "sources": [file.shown for file in files],
                "bytes": files[0].bytes,
                "normalizations": sorted(repaired),
                "license": _combine_licenses(file.license for file in files),
                "author": _joined((file.author for file in files), "; "),
                "source": _joined((file.source for file in files), "; "),
                "group_id": group,
                "holdout": any(file.holdout for file in files),
                **measured,
            }
        )
    return rows


def most_common_codes(refused: Iterable[RejectedFile]) -> str:
    """The most frequent codes with their counts, for one line."""
    counts = Counter(item.code for item in refused)
    return ", ".join(f"{code} {count}" for code, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:TOP])


def check_pools(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], n_in: int, refused: Sequence[RejectedFile], most: float
) -> None:
    """Raise DataError when a pool is empty or too much of the input is bad.

    Args:
        rows: kind -> catalog rows.
        n_in: files that went in.
        refused: what was not taken.
        most: largest bearable share of dropped files; abstentions do not count.
    """
    examples = [f"{item.shown}: {item.code}: {item.reason}" for item in refused[:EXAMPLES]]
    look = "look at each file with: sonify check ROOT"
    for kind, name in (("image", "picture"), ("audio", "sound")):
        if not any(not row["holdout"] for row in rows[kind]):
            mine = [item for item in refused if item.kind in {kind, "unknown"}]
            why = f"{len(mine)} quarantined (top: {most_common_codes(mine)})" if mine else "no such file was found"
            raise DataError(
                f"the {name} pool is empty after ingest: {why}",
                look if mine else "check ingest.root, ingest.metadata and ingest.pool",
                details={"examples": examples},
            )
    dropped = [item for item in refused if not item.abstained]
    if n_in and len(dropped) > most * n_in:
        raise DataError(
            f"{len(dropped)} of {n_in} files are bad ({len(dropped) / n_in:.1%}, limit {most:.1%}; "
            f"top: {most_common_codes(dropped)})",
            f"{look}; mend or remove them, or raise ingest.max_failed_fraction",
            details={"examples": examples},
        )


def crossing_groups(rows: Iterable[Mapping[str, Any]]) -> int:
    """Number of pool items in a group that also holds a held-out item."""
    rows = list(rows)
    held = {row["group_id"] for row in rows if row["holdout"]}
    return sum(1 for row in rows if not row["holdout"] and row["group_id"] in held)


class ArchiveMember(NamedTuple):
    """Where an item lies in its file: bytes [offset, offset + size), or a row of a column in a row group of Parquet.

    `name` is the path that its parts would have if they were files; only its extension counts.
    """

    name: str
    offset: int = 0
    size: int = 0
    column: str = ""
    group: int = -1
    row: int = -1
