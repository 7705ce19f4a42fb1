"""Catalog rows from candidates and decoding results, their summary, and checks of the pools. No I/O."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from pipeline_steps.core.errors import DataError
from pipeline_steps.core.stage_report import StageReport
from pipeline_steps.ingest.candidates import CandidateFile, RejectedFile
from pipeline_steps.ingest.config import IngestConfig, SourceConfig
from pipeline_steps.ingest.duplicate_groups import assign_duplicate_groups
from pipeline_steps.ingest.file_signatures import has_wrong_extension
from pipeline_steps.ingest.sources.metadata_table import join_texts

MAX_CODES = 5
MAX_EXAMPLES = 20
MAX_KEYS = 6


def check_id_collisions(files: Iterable[CandidateFile]) -> None:
    """Raise DataError when two contents have the same id (the first 128 bits of sha256)."""
    by_id: dict[str, CandidateFile] = {}
    for file in files:
        other = by_id.setdefault(file.item_id, file)
        if other.sha256 != file.sha256:
            raise DataError(
                f"{other.path} and {file.path}: both have the id {file.item_id}, but their contents differ",
                "remove one of them; nothing was written",
            )


def group_by_content(files: Iterable[CandidateFile]) -> dict[str, list[CandidateFile]]:
    """Group files by id; each list is sorted by path."""
    items: dict[str, list[CandidateFile]] = {}
    for file in sorted(files, key=lambda file: file.path):
        items.setdefault(file.item_id, []).append(file)
    return items


def _join_distinct(values: Iterable[str | None], separator: str) -> str | None:
    return separator.join(sorted({value for value in values if value})) or None


def _combine_licenses(licenses: Iterable[str | None]) -> str | None:
    """SPDX expression that requires all licenses. AND binds more tightly than OR, so a choice is put in brackets."""
    distinct = {license for license in licenses if license}
    return _join_distinct((f"({one})" if len(distinct) > 1 and re.search(r"\bOR\b", one) else one for one in distinct), " AND ")


def catalog_rows(
    kind: str, items: Mapping[str, Sequence[CandidateFile]], results: Mapping[str, Mapping[str, Any]], phash_distance: int
) -> list[dict[str, Any]]:
    """Rows of `images` or `audio` for the accepted items of one kind, one row per content.

    `sources` lists every path with the content. Different licenses are joined by AND, authors and sources by "; ". Content
    that is held out under one path is held out under all.

    Args:
        kind: image or audio.
        items: id -> its files, sorted by path.
        results: id -> measurements of the decoder.
        phash_distance: images whose perceptual hashes differ in at most so many bits form a group; -1 disables this.
    """
    ids = sorted(items)
    keys: list[tuple[int, Hashable]] = [
        (index, file.group) for index, item in enumerate(ids) for file in items[item] if file.group is not None
    ]
    hashes = [results[item]["phash"] for item in ids] if kind == "image" else None
    groups = assign_duplicate_groups(ids, keys, hashes, phash_distance)
    rows: list[dict[str, Any]] = []
    for item, group in zip(ids, groups, strict=True):
        files = items[item]
        measurements = {name: value for name, value in results[item].items() if name not in {"code", "reason", "payload"}}
        normalizations = set(measurements.pop("normalizations"))
        if any(has_wrong_extension(file.name, measurements["format"]) for file in files):
            normalizations.add("WRONG_EXTENSION")
        rows.append(
            {
                f"{kind}_id": item,
                "sha256": files[0].sha256,
                "path": files[0].path,
                "sources": [file.path for file in files],
                "bytes": files[0].bytes,
                "normalizations": sorted(normalizations),
                "license": _combine_licenses(file.license for file in files),
                "author": _join_distinct((file.author for file in files), "; "),
                "source": _join_distinct((file.source for file in files), "; "),
                "text": join_texts(file.text for file in files),
                "group_id": group,
                "holdout": any(file.holdout for file in files),
                **measurements,
            }
        )
    return rows


def summarize(rows: Mapping[str, Sequence[Mapping[str, Any]]], rejected: Iterable[RejectedFile]) -> dict[str, Any]:
    """Metrics of the report from catalog rows by kind and the rejected files."""
    both = [row for kind in rows for row in rows[kind]]
    per_kind = {
        name: {
            "items": len(rows[kind]),
            "pool": sum(not row["holdout"] for row in rows[kind]),
            "holdout": sum(row["holdout"] for row in rows[kind]),
            "groups": len({row["group_id"] for row in rows[kind]}),
            "pool_items_near_holdout": count_pool_items_near_holdout(rows[kind]),
        }
        for kind, name in (("image", "images"), ("audio", "sounds"))
    }
    with_text = sum(row["text"] is not None for row in rows["image"])
    return {
        **per_kind,
        **({"images_with_text": with_text} if with_text else {}),
        "duplicate_files": sum(len(row["sources"]) - 1 for row in both),
        "codes": dict(sorted(Counter(item.code for item in rejected).items())),
        "normalizations": dict(sorted(Counter(code for row in both for code in row["normalizations"]).items())),
        "audio_hours": round(sum(row["duration_s"] for row in rows["audio"]) / 3600, 4),
    }


def most_common_codes(rejected: Iterable[RejectedFile]) -> str:
    """The most frequent reason codes with their counts, as one line."""
    counts = Counter(item.code for item in rejected)
    return ", ".join(
        f"{code} {count}" for code, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:MAX_CODES]
    )


def check_pools(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], rejected: Sequence[RejectedFile], config: IngestConfig, report: StageReport
) -> None:
    """Raise DataError when there is no image or no audio to pair, or too many files failed.

    Args:
        rows: kind -> catalog rows.
        rejected: rejected candidates.
        config: the sources.
        report: counts of the stage, and `skipped_files` in its metrics.
    """
    details: dict[str, object] = {"examples": [f"{item.path}: {item.code}: {item.reason}" for item in rejected[:MAX_EXAMPLES]]}
    action = "list each file with: sonify check; fix or remove them"
    for kind in ("image", "audio"):
        if all(row["holdout"] for row in rows[kind]):
            of_kind = [item for item in rejected if item.kind in {kind, "unknown"}]
            crossed, keys = _source_keys(kind, bool(rows[kind]), config, report.metrics.get("skipped_files", {}))
            reasons = [f"all {len(rows[kind])} items are held out"] if rows[kind] else crossed
            if of_kind:
                reasons.append(f"{len(of_kind)} quarantined (top: {most_common_codes(of_kind)})")
            raise DataError(
                f"the {kind} pool is empty after ingest: {'; '.join(reasons) or 'no such file was found'}",
                f"{f'{action}, or ' if of_kind else ''}correct {' or '.join(keys)}",
                details=details,
            )
    dropped = [item for item in rejected if not item.abstained]
    report.check_failures(config.max_failed_fraction, "files", f"top: {most_common_codes(dropped)}", action, details)


def _source_keys(kind: str, held_out: bool, config: IngestConfig, skipped: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """Problems of the sources of a kind that has no item to pair, and the keys that may be wrong."""
    word, other = ("images", "audio") if kind == "image" else ("audio", "image")
    sources: dict[str, SourceConfig] = {
        f"ingest.pools.{name}": pool for name, pool in config.pools.items() if pool.kind in {word, "mixed"}
    }
    crossed, keys = [], []
    for key, source in (sources or {"ingest": config}).items():
        found = ["pool", "holdout"] if held_out else ["root", "metadata", "pool"]
        if getattr(source, "role", "pool") == "holdout" and held_out:
            found.append("role")
        if count := skipped.get(f"{other} in pool {key.rsplit('.')[-1]}", 0):
            crossed.append(f"{key} has kind {word}, and {count} {other} file{'s' * (count > 1)}")
            found.append("kind")
        keys += [f"{key}.{name}" for name in found if getattr(source, name) is not None]
    if config.pools and not sources:
        return [f"no pool has kind {word} or mixed"], ["the kinds of ingest.pools"]
    return crossed, keys[:MAX_KEYS]


def count_pool_items_near_holdout(rows: Sequence[Mapping[str, Any]]) -> int:
    """Number of pool items whose group also contains a held-out item."""
    held_out = {row["group_id"] for row in rows if row["holdout"]}
    return sum(not row["holdout"] and row["group_id"] in held_out for row in rows)
