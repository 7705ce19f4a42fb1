"""Where every picture and sound went, from the tables alone: the flow that the report draws. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Table = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class FlowNode:
    """One station of the flow: what came in, what went on, and what left with which reason."""

    name: str
    n_in: int
    n_on: int
    left: tuple[tuple[str, str, int], ...]
    """(kind, code, count); kind is "abstained", "quarantined", "held out" or "unused"."""


@dataclass(frozen=True, slots=True)
class StageTables:
    """Rows of the tables that say where an item is."""

    images: Table
    audio: Table
    quarantine: Table
    events: Table
    captions_abstained: Table
    captions_quarantine: Table
    embeddings_quarantine: Table
    pairs: Table
    pairs_abstained: Table


def picture_flow(tables: StageTables) -> list[FlowNode]:
    """Stations of the pictures: ingest, hold-out, caption, pair, split."""
    pool = {row["image_id"] for row in tables.images if not row["holdout"]}
    held = len(tables.images) - len(pool)
    dropped = Counter((row["action"], row["code"]) for row in tables.quarantine if row["kind"] != "audio")
    with_events = {row["image_id"] for row in tables.events} & pool
    captions = [("abstained", row["code"]) for row in tables.captions_abstained if row["image_id"] in pool]
    captions += [("quarantined", row["code"]) for row in tables.captions_quarantine if row["item_id"] in pool]
    paired = {row["image_id"] for row in tables.pairs}
    unpaired = Counter(("abstained", row["code"]) for row in tables.pairs_abstained if row["image_id"] in with_events)
    return [
        FlowNode("found and decoded", len(tables.images) + sum(dropped.values()), len(tables.images), _left(_named(dropped))),
        FlowNode("in the pool", len(tables.images), len(pool), (("held out", "for evaluation", held),) if held else ()),
        FlowNode("suggest a sound", len(pool), len(with_events), _left(Counter(captions))),
        FlowNode("paired with a sound", len(with_events), len(paired), _left(unpaired)),
    ]


def sound_flow(tables: StageTables) -> list[FlowNode]:
    """Stations of the sounds: ingest, hold-out, embedding, use in pairs."""
    pool = {row["audio_id"] for row in tables.audio if not row["holdout"]}
    held = len(tables.audio) - len(pool)
    dropped = Counter((row["action"], row["code"]) for row in tables.quarantine if row["kind"] == "audio")
    bad = Counter(
        ("quarantined", row["code"])
        for row in tables.embeddings_quarantine
        if row["kind"] == "audio" and row["item_id"] in pool
    )
    embedded = len(pool) - sum(bad.values())
    used = {track["audio_id"] for row in tables.pairs for track in row["tracks"]}
    unused = (("unused", "no picture took it", embedded - len(used)),) if embedded > len(used) else ()
    return [
        FlowNode("found and decoded", len(tables.audio) + sum(dropped.values()), len(tables.audio), _left(_named(dropped))),
        FlowNode("in the pool", len(tables.audio), len(pool), (("held out", "for evaluation", held),) if held else ()),
        FlowNode("embedded", len(pool), embedded, _left(bad)),
        FlowNode("used in a pair", embedded, len(used), unused),
    ]


def find_imbalances(steps: Sequence[FlowNode]) -> list[str]:
    """Sentences about stations whose numbers do not add up; empty when every item is accounted for."""
    return [
        f"{step.name}: {step.n_in} in, {step.n_on} on, {sum(count for _, _, count in step.left)} left with a reason"
        for step in steps
        if step.n_in != step.n_on + sum(count for _, _, count in step.left)
    ]


def license_counts(pairs: Table) -> list[tuple[str, int]]:
    """Pairs by license (the stricter of both sides), most frequent first; unknown licenses are named so."""
    counts = Counter(str(row["license"] or "unknown") for row in pairs)
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _named(dropped: Counter[tuple[str, str]]) -> Counter[tuple[str, str]]:
    """Ingest says `dropped` where the flow says `quarantined`."""
    return Counter(
        {("abstained" if action == "abstained" else "quarantined", code): n for (action, code), n in dropped.items()}
    )


def _left(counts: Counter[tuple[str, str]]) -> tuple[tuple[str, str, int], ...]:
    return tuple((kind, code, count) for (kind, code), count in sorted(counts.items(), key=lambda item: (-item[1], item[0])))
