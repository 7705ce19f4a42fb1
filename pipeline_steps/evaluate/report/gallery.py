"""Cards of the report's galleries as values for the template. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline_steps.audio.mixing import Tracks, pair_tracks
from pipeline_steps.core.array_types import ByteArray
from pipeline_steps.evaluate.evaluation_plan import EvalPair, EvaluationPlan, evenly_spaced_indices, mix_id
from pipeline_steps.evaluate.report.media import ReportMedia
from pipeline_steps.evaluate.report.selection import select_pairs_to_show, select_samples_to_show

Row = Mapping[str, Any]
Card = dict[str, Any]


@dataclass(frozen=True, slots=True)
class CatalogIndex:
    """Catalog rows by id, and ground-truth labels by id."""

    images: Mapping[str, Row]
    audio: Mapping[str, Row]
    labels: Mapping[str, str]

    def audio_file(self, tracks: Tracks) -> str:
        """Paths of the clips of a mixture."""
        return " + ".join(str(self.audio[audio_id]["path"]) for audio_id, _ in tracks)


FIRST_SAMPLES = 12
"""Cards of samples that the page shows without expanding the list."""

NUM_NEIGHBORS = 5
"""Retrieved clips on the card of a pair."""


def pair_cards(
    pairs: Sequence[Row],
    events: Sequence[Row],
    neighbors: Sequence[Row],
    catalog: CatalogIndex,
    media: ReportMedia,
    at_most: int,
    seed: int,
) -> list[Card]:
    """Card of each selected pair: events of the image, the paired audio, and the nearest clips."""
    chosen = select_pairs_to_show(pairs, events, at_most, seed)
    image_ids = {row["image_id"] for _, row in chosen}
    by_image: dict[str, list[Row]] = {}
    for event in events:
        if event["image_id"] in image_ids:
            by_image.setdefault(event["image_id"], []).append(event)
    text_ids = {event["text_id"] for listed in by_image.values() for event in listed}
    by_text: dict[str, list[Row]] = {}
    for neighbor in neighbors:
        if neighbor["text_id"] in text_ids and neighbor["rank"] < NUM_NEIGHBORS:
            by_text.setdefault(neighbor["text_id"], []).append(neighbor)
    return [_pair_card(why, pair, by_image.get(pair["image_id"], []), by_text, catalog, media) for why, pair in chosen]


def _pair_card(
    why: str, pair: Row, events: Sequence[Row], by_text: Mapping[str, Sequence[Row]], catalog: CatalogIndex, media: ReportMedia
) -> Card:
    track = pair["tracks"][0]
    audio_id, image_id = track["audio_id"], pair["image_id"]
    mixed = mix_id(pair_tracks(pair))
    listed = sorted(events, key=lambda event: int(event["rank"]))
    query = next((event for event in listed if event["phrase"] == track["phrase"]), listed[0] if listed else None)
    nearest = sorted(by_text.get(query["text_id"], []), key=lambda row: int(row["rank"])) if query else []
    image, audio = catalog.images[image_id], catalog.audio[audio_id]
    sides = [catalog.labels.get(image_id), catalog.labels.get(audio_id)]
    return {
        "image_id": image_id[:12],
        "image_file": image["path"],
        "audio_file": catalog.audio_file(pair_tracks(pair)),
        "picture": media.image(image_id),
        "sound": {"audio": media.audio(mixed), "spectrogram": media.spectrogram(mixed)},
        "phrase": track["phrase"],
        "score": pair["score"],
        "z_score": pair["z_score"],
        "split": pair["split"],
        "why": why,
        "events": [
            {
                "phrase": row["phrase"],
                "sound_source": row["sound_source"],
                "confidence": row["confidence"],
                "chosen": row is query,
            }
            for row in listed
        ],
        "top": [
            {
                "audio": media.audio(row["audio_id"]),
                "score": row["score"],
                "z_score": row["z_score"],
                "corrected_score": row["corrected_score"],
                "label": catalog.labels.get(row["audio_id"]),
                "chosen": row["audio_id"] == audio_id,
            }
            for row in nearest
        ],
        "chosen_in_top": any(row["audio_id"] == audio_id for row in nearest),
        "truth": f"image of {sides[0] or 'unknown'}, sound of {sides[1] or 'unknown'}" if any(sides) else None,
        "image_license": image["license"] or "license unknown",
        "image_author": image["author"] or "author unknown",
        "audio_license": audio["license"] or "license unknown",
        "audio_author": audio["author"] or "author unknown",
    }


def sample_cards(
    plan: EvaluationPlan,
    pairs: Sequence[EvalPair],
    partner: Sequence[int],
    rates: Mapping[str, Sequence[float | None]],
    catalog: CatalogIndex,
    media: ReportMedia,
    generated: ByteArray,
    at_most: int,
) -> list[Card]:
    """Card of each selected pair: its audio, its real image, its samples and those of another clip.

    Args:
        plan: pairs and clips.
        pairs: of one set.
        partner: clip whose samples are shown as the control of each clip, -1: none.
        rates: win-rate metric -> value of each pair; the first metric orders the cards. Empty if nothing was measured.
        catalog: names of the files.
        media: files of the report.
        generated: samples [M, S, H, W, 3] of every clip.
        at_most: number of cards.
    """
    clips = plan.clips
    cards: list[Card] = []
    order: Sequence[float | None] = next(iter(rates.values()), [None] * len(pairs))
    for index in select_samples_to_show(order, [pair.name for pair in pairs], at_most):
        pair = pairs[index]
        clip, other = clips[pair.clip], int(partner[pair.clip])
        cards.append(
            {
                "label": clip.label,
                "audio_file": catalog.audio_file(clip.tracks),
                "image_file": catalog.images[pair.image_id]["path"],
                "seen": None if clip.label is None else clip.label in plan.seen_classes,
                "sound": {"audio": media.audio(clip.key), "spectrogram": media.spectrogram(clip.key)},
                "picture": media.image(pair.image_id),
                "real": media.strip(clip.key, generated[pair.clip]),
                "shuffled": media.strip(clips[other].key, generated[other]) if other >= 0 else None,
                "shuffled_label": (clips[other].label or catalog.audio_file(clips[other].tracks)) if other >= 0 else "",
                "rates": [{"metric": name, "name": rate_name(name), "value": values[index]} for name, values in rates.items()],
            }
        )
    return interleave_first(cards, FIRST_SAMPLES)


def rate_name(metric: str) -> str:
    """Label of a win-rate metric on a card."""
    return "agreement with the sound" if metric.startswith("ais") else "similarity to the real image"


def interleave_first(cards: Sequence[Card], first: int) -> list[Card]:
    """Cards with `first` evenly spaced ones in front, so that the visible part is not the best ones only."""
    front = set(evenly_spaced_indices(len(cards), first, include_last=True))
    return [*(cards[index] for index in sorted(front)), *(card for index, card in enumerate(cards) if index not in front)]
