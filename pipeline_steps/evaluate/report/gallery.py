"""The two galleries of the report as plain values for the template. Pure: paths of media are given, not made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline_steps.evaluate.evaluation_plan import EvalAudio, EvalPair, mix_id, pair_tracks
from pipeline_steps.evaluate.report.selection import select_pairs_to_show, select_samples_to_show

Row = Mapping[str, Any]
Card = dict[str, Any]


@dataclass(frozen=True, slots=True)
class MediaPaths:
    """Paths, relative to the page, of what a card shows; calling one notes that the file is needed."""

    picture: Callable[[str], str]
    audio: Callable[[str], str]
    spectrogram: Callable[[str], str]


@dataclass(frozen=True, slots=True)
class CatalogIndex:
    """Catalog rows by id, and ground-truth labels (shown as such, used for nothing else here)."""

    images: Mapping[str, Row]
    audio: Mapping[str, Row]
    labels: Mapping[str, str]


FIRST_DRAWS = 12
"""Drawings shown before the fold."""

NEAREST = 5
"""Retrieved sounds shown for a pair."""


def pair_cards(
    pairs: Sequence[Row],
    events: Sequence[Row],
    neighbours: Sequence[Row],
    catalog: CatalogIndex,
    shelf: MediaPaths,
    at_most: int,
    seed: int,
) -> list[Card]:
    """One card per chosen pair: its events, the sound it got, and what else was near."""
    chosen = select_pairs_to_show(pairs, at_most, seed)
    wanted = {row["image_id"] for _, row in chosen}
    by_picture: dict[str, list[Row]] = {}
    for event in events:
        if event["image_id"] in wanted:
            by_picture.setdefault(event["image_id"], []).append(event)
    by_text: dict[str, list[Row]] = {}
    needed = {event["text_id"] for listed in by_picture.values() for event in listed}
    for neighbour in neighbours:
        if neighbour["text_id"] in needed and neighbour["rank"] < NEAREST:
            by_text.setdefault(neighbour["text_id"], []).append(neighbour)
    return [_pair_card(why, pair, by_picture.get(pair["image_id"], []), by_text, catalog, shelf) for why, pair in chosen]


def _pair_card(
    why: str, pair: Row, events: Sequence[Row], by_text: Mapping[str, Sequence[Row]], catalog: CatalogIndex, shelf: MediaPaths
) -> Card:
    track = pair["tracks"][0]
    audio_id, image_id = track["audio_id"], pair["image_id"]
    mixed = mix_id(pair_tracks(pair))
    listed = sorted(events, key=lambda event: int(event["rank"]))
    asked = next((event for event in listed if event["phrase"] == track["phrase"]), listed[0] if listed else None)
    near = sorted(by_text.get(asked["text_id"], []), key=lambda row: int(row["rank"])) if asked else []
    image, audio = catalog.images[image_id], catalog.audio[audio_id]
    sides = [catalog.labels.get(image_id), catalog.labels.get(audio_id)]
    return {
        "image_id": image_id[:12],
        "picture": shelf.picture(image_id),
        "sound": {"audio": shelf.audio(mixed), "spectrogram": shelf.spectrogram(mixed)},
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
                "chosen": row is asked,
            }
            for row in listed
        ],
        "top": [
            {
                "audio": shelf.audio(row["audio_id"]),
                "score": row["score"],
                "z_score": row["z_score"],
                "corrected_score": row["corrected_score"],
                "label": catalog.labels.get(row["audio_id"]),
                "chosen": row["audio_id"] == audio_id,
            }
            for row in near
        ],
        "chosen_in_top": any(row["audio_id"] == audio_id for row in near),
        "truth": f"picture of {sides[0] or 'unknown'}, sound of {sides[1] or 'unknown'}" if any(sides) else None,
        "image_license": image["license"] or "license unknown",
        "image_author": image["author"] or "author unknown",
        "audio_license": audio["license"] or "license unknown",
        "audio_author": audio["author"] or "author unknown",
    }


def sample_cards(
    items: Sequence[EvalPair],
    sounds: Sequence[EvalAudio],
    partner: Sequence[int],
    rates: Mapping[str, Sequence[float | None]],
    seen_classes: frozenset[str],
    shelf: MediaPaths,
    strip: Callable[[int], str],
    at_most: int,
) -> list[Card]:
    """One card per shown item, ordered by the first metric of `rates` (metric name -> value per item)."""
    first = next(iter(rates.values()))
    cards: list[Card] = []
    for place in select_samples_to_show(first, [item.name for item in items], at_most):
        item = items[place]
        sound, other = sounds[item.sound], int(partner[item.sound])
        cards.append(
            {
                "label": sound.label or "class not known",
                "seen": None if sound.label is None else sound.label in seen_classes,
                "sound": {"audio": shelf.audio(sound.key), "spectrogram": shelf.spectrogram(sound.key)},
                "picture": shelf.picture(item.image_id),
                "real": strip(item.sound),
                "shuffled": strip(other) if other >= 0 else None,
                "shuffled_label": (sounds[other].label or "class not known") if other >= 0 else "",
                "rates": [{"metric": name, "name": rate_name(name), "value": values[place]} for name, values in rates.items()],
            }
        )
    return interleave_first(cards, FIRST_DRAWS)


def rate_name(metric: str) -> str:
    """A win-rate metric in words."""
    return "fits the sound" if metric.startswith("ais") else "near the real picture"


def interleave_first(cards: Sequence[Card], first: int) -> list[Card]:
    """Cards in an order that puts `first` of them, evenly spread over the old order, in front; so nobody sees only the best."""
    front = set(evenly_spaced_indices(len(cards), first))
    return [*(cards[place] for place in sorted(front)), *(card for place, card in enumerate(cards) if place not in front)]


def evenly_spaced_indices(n: int, at_most: int) -> list[int]:
    """Up to `at_most` places out of `n`, evenly spread, first and last included."""
    if n <= at_most or at_most < 2:
        return list(range(min(n, at_most)))
    return sorted({round(place * (n - 1) / (at_most - 1)) for place in range(at_most)})
