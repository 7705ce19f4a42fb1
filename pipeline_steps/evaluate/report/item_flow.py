"""Item flow: how many images and audio clips each stage kept and why the others left, from the tables. No I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Table = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class FlowNode:
    """One step of the flow.

    Attributes:
        name: of the step.
        n_in: items before it.
        n_out: items after it.
        removed: (kind, code, count) of the others; kind is `abstained`, `quarantined`, `held out` or `unused`.
    """

    name: str
    n_in: int
    n_out: int
    removed: tuple[tuple[str, str, int], ...]


@dataclass(frozen=True, slots=True)
class StageTables:
    """Rows of the tables of all stages, and statistics of the pairs (`stats.json`)."""

    images: Table
    audio: Table
    quarantine: Table
    events: Table
    captions_abstained: Table
    captions_quarantine: Table
    embeddings_quarantine: Table
    pairs: Table
    pairs_abstained: Table
    neighbors: Table = ()
    pair_statistics: Mapping[str, Any] = field(default_factory=dict)


def image_flow(tables: StageTables) -> list[FlowNode]:
    """Steps of the images: ingest, hold-out, caption, pair."""
    pool = {row["image_id"] for row in tables.images if not row["holdout"]}
    held = len(tables.images) - len(pool)
    dropped = Counter((row["action"], row["code"]) for row in tables.quarantine if row["kind"] != "audio")
    with_events = {row["image_id"] for row in tables.events} & pool
    captions = [("abstained", row["code"]) for row in tables.captions_abstained if row["image_id"] in pool]
    captions += [("quarantined", row["code"]) for row in tables.captions_quarantine if row["item_id"] in pool]
    paired = {row["image_id"] for row in tables.pairs}
    unpaired = Counter(("abstained", row["code"]) for row in tables.pairs_abstained if row["image_id"] in with_events)
    return [
        FlowNode("found and decoded", len(tables.images) + sum(dropped.values()), len(tables.images), _sorted(_named(dropped))),
        FlowNode("in the pool", len(tables.images), len(pool), (("held out", "for evaluation", held),) if held else ()),
        FlowNode("with sound events", len(pool), len(with_events), _sorted(Counter(captions))),
        FlowNode("paired with a sound", len(with_events), len(paired), _sorted(unpaired)),
    ]


def audio_flow(tables: StageTables) -> list[FlowNode]:
    """Steps of the audio clips: ingest, hold-out, embedding, use in pairs."""
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
    unused = (("unused", "in no pair", embedded - len(used)),) if embedded > len(used) else ()
    return [
        FlowNode("found and decoded", len(tables.audio) + sum(dropped.values()), len(tables.audio), _sorted(_named(dropped))),
        FlowNode("in the pool", len(tables.audio), len(pool), (("held out", "for evaluation", held),) if held else ()),
        FlowNode("embedded", len(pool), embedded, _sorted(bad)),
        FlowNode("used in a pair", embedded, len(used), unused),
    ]


def find_imbalances(steps: Sequence[FlowNode]) -> list[str]:
    """Sentences about steps whose counts do not add up."""
    return [
        f"{step.name}: {step.n_in} in, {step.n_out} out, {sum(count for _, _, count in step.removed)} removed with a reason"
        for step in steps
        if step.n_in != step.n_out + sum(count for _, _, count in step.removed)
    ]


def license_counts(pairs: Table) -> list[tuple[str, int]]:
    """Number of pairs by license (the stricter one of image and audio), most frequent first."""
    counts = Counter(str(row["license"] or "unknown") for row in pairs)
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _named(dropped: Counter[tuple[str, str]]) -> Counter[tuple[str, str]]:
    """Counts with the action `dropped` of ingest renamed to `quarantined`."""
    return Counter(
        {("abstained" if action == "abstained" else "quarantined", code): n for (action, code), n in dropped.items()}
    )


def _sorted(counts: Counter[tuple[str, str]]) -> tuple[tuple[str, str, int], ...]:
    return tuple((kind, code, count) for (kind, code), count in sorted(counts.items(), key=lambda item: (-item[1], item[0])))
