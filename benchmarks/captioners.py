"""Captioners compared on the development set: images of the pool -> clips of the pool that have the image's label.

    python -m benchmarks.captioners [--pool DIR] [--root DIR] [--json OUT]

The folder contains a `manifest.csv` as `benchmarks.gold_retrieval` reads it. Images count whose label occurs among the pool
clips. Gold pairs take no part. Labels are used for relevance, for the oracle, and as the words of captioner `text`. Images on
which a captioner abstains are ranked by its guesses; without guesses they are a miss.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gold_retrieval import (
    PROJECT,
    RESAMPLES,
    average_precision,
    event_scores,
    manifest,
    rank_of,
    read_pictures,
    read_sounds,
)
from pipeline_steps.caption.captioners.base import CaptionResult
from pipeline_steps.caption.captioners.tagger import TaggerCaptioner
from pipeline_steps.caption.config import CaptionConfig
from pipeline_steps.caption.stage import build_captioner
from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.seeding import seeded_rng
from pipeline_steps.embed.config import EmbedConfig
from pipeline_steps.embed.stage import build_encoder

LABEL_EVENTS = (0, 1, 3, 5)
BASE = "tagger"


def main() -> int:
    """Run and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pool", type=Path, default=PROJECT / "data/demo")
    parser.add_argument("--root", type=Path, default=PROJECT, help="folder whose data/assets holds the weights")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    layout = ProjectPaths(options.root)
    encoder: Any = build_encoder(EmbedConfig.from_params({}), layout).load()
    rows = manifest(options.pool, "pool")
    sounds, _ = read_sounds(encoder, encoder, [(options.pool, [row for row in rows if row["kind"] == "sound"], True)])
    vectors = encoder.audio_vectors(sounds.posteriors)
    known = set().union(*sounds.labels)
    pictures = [row for row in rows if row["kind"] == "image" and row["label"] in known]
    relevant = [np.array([row["label"] in labels for labels in sounds.labels]) for row in pictures]
    captions = all_captions(layout, pictures, read_pictures(options.pool, pictures))
    scores: dict[str, list[FloatArray | None]] = {
        name: [event_scores(encoder, one.events or one.guesses, vectors) for one in found] for name, found in captions.items()
    }
    scores["oracle: label"] = list(encoder.encode_texts([row["label"] for row in pictures]) @ vectors.T)
    answer: dict[str, Any] = {"all": table("all images", scores, relevant, options.seed)}
    sure = [place for place, one in enumerate(captions[BASE]) if one.events]
    for name, places in (
        ("images that the tagger captions", sure),
        ("images on which the tagger abstains", sorted(set(range(len(pictures))) - set(sure))),
        *((f"package {one}", [n for n, row in enumerate(pictures) if row["package"] == one]) for one in packages(pictures)),
    ):
        part = {row: [found[place] for place in places] for row, found in scores.items()}
        answer[name] = table(name, part, [relevant[place] for place in places], options.seed)
    if options.json:
        options.json.write_text(json.dumps(answer, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return 0


def packages(pictures: Sequence[dict[str, str]]) -> list[str]:
    """Packages of the images, sorted."""
    return sorted({row["package"] for row in pictures})


def all_captions(
    layout: ProjectPaths, pictures: Sequence[dict[str, str]], images: Sequence[np.ndarray | None]
) -> dict[str, list[CaptionResult]]:
    """Captions of every image by every captioner."""
    usable = [image for image in images if image is not None]
    assert len(usable) == len(images), "every image of the pool decodes"
    predictions: Any = None
    found: dict[str, list[CaptionResult]] = {}
    for count in LABEL_EVENTS:
        tagger = build_captioner(CaptionConfig.from_params({"tagger": {"label_events": count}}), layout)
        assert isinstance(tagger, TaggerCaptioner)
        predictions = predictions or tagger.load().predict(usable)
        found[f"{BASE} + {count} labels" if count else BASE] = [tagger.caption(one) for one in predictions]
    text = build_captioner(CaptionConfig.from_params({"captioner": "text"}), layout).load()
    for column in ("label", "caption"):
        words = [row[column] for row in pictures]
        found[f"text: {column}"] = [text.caption(one) for one in text.predict_with_text(usable, words)]
    return found


def table(
    title: str, scores: Mapping[str, Sequence[FloatArray | None]], relevant: Sequence[np.ndarray], seed: int
) -> dict[str, Any]:
    """Print and return R@1, R@10 and mAP of each row, and the paired difference of R@10 to the first row."""
    print(f"\n{title}: {len(relevant)} images\n  {'row':24s} R@1    R@10   mAP    R@10 - {BASE} [95 %]")
    result: dict[str, Any] = {}
    hits: dict[str, np.ndarray] = {}
    for name, found in scores.items():
        pairs = list(zip(found, relevant, strict=True))
        precision = [0.0 if score is None else average_precision(score, own) for score, own in pairs]
        ranks = np.array([rank_of(score, own) for score, own in pairs])
        hits[name] = (ranks <= 10).astype(float)
        gain = hits[name] - hits[BASE]
        draws = seeded_rng(seed, "captioners").integers(0, len(gain), (RESAMPLES, len(gain)))
        low, high = np.percentile(gain[draws].mean(axis=1), [2.5, 97.5])
        row = {"R@1": (ranks <= 1).mean(), "R@10": hits[name].mean(), "mAP": np.mean(precision), "gain": gain.mean()}
        result[name] = {key: float(value) for key, value in (row | {"low": low, "high": high, "n": len(ranks)}).items()}
        print(
            f"  {name:24s} {row['R@1']:.3f}  {row['R@10']:.3f}  {row['mAP']:.3f}  {gain.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
        )
    return result


if __name__ == "__main__":
    raise SystemExit(main())
