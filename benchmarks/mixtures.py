"""Mixtures of two pool clips: how often the prompt names both sources, and how often both are found in the images.

Usage: python -m benchmarks.mixtures [--root .] [--pairs 200] [--drawn 32] [--samples 2] [--judges ssd_mobilenet_v2,augnet]

Pairs have different labels and different first sources. Both clips have equal loudness, are at most 5 s long, and are mixed at
-23 LUFS. Held-out clips are not used. The classes of a judge are those of the labels, fitted on the images of the pool.

- `first sources`: both sources that the clips have alone are in the prompt; `exact`: and no other source;
- `labels`: the labels of both clips are words of the prompt;
- `both`, `one`: images in which both classes or one of them are found, that is nearer to the class mean than 95 % of the real
  images of other classes; `control`: both, with the labels of the next pair.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline_steps.audio.mixing import mix_tracks
from pipeline_steps.core.array_types import ByteArray, FloatArray
from pipeline_steps.core.media_shards import SAMPLE_RATE, MediaShardReader
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import AUDIO, IMAGES
from pipeline_steps.core.tables import read_table
from pipeline_steps.diffusion.image_processor import pad_to_square
from pipeline_steps.diffusion.pipelines.ip_adapter import AudioIPAdapterPipeline
from pipeline_steps.evaluate.abilities.scores import ClassSpace
from pipeline_steps.evaluate.abilities.stimuli import set_loudness
from pipeline_steps.evaluate.ground_truth import match, parse_manifest
from pipeline_steps.evaluate.judges.base import IMAGE_JUDGES, JudgeSetup
from pipeline_steps.evaluate.judges.whitened_space import fit_space

SECONDS = 5
LUFS = -23.0


class Pool:
    """Labeled items of the pool, without those held out."""

    def __init__(self, layout: ProjectPaths) -> None:
        tables = [
            read_table(layout.catalog / name, schema).to_pylist()
            for name, schema in (("images.parquet", IMAGES), ("audio.parquet", AUDIO))
        ]
        rows = parse_manifest((layout.root / "data/demo/manifest.csv").read_text(encoding="utf-8-sig"), "manifest")
        self.labels = match(rows, *tables).labels
        kept = [[row for row in table if not row["holdout"]] for table in tables]
        self.images = [row["image_id"] for row in kept[0] if row["image_id"] in self.labels]
        self.audio = [row["audio_id"] for row in kept[1] if row["audio_id"] in self.labels]
        self.media = MediaShardReader(layout.media)

    def clip(self, audio_id: str) -> FloatArray:
        """First 5 s of a clip at -23 LUFS."""
        return set_loudness(self.media.sound(audio_id)[: SECONDS * SAMPLE_RATE], LUFS)


def choose_pairs(pool: Pool, first_source: Mapping[str, str | None], count: int, seed: int) -> list[tuple[str, str]]:
    """Random pairs of clips with different labels and different first sources."""
    rng = np.random.default_rng(seed)
    usable = [audio_id for audio_id in sorted(pool.audio) if first_source[audio_id]]
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        first, second = (str(name) for name in rng.choice(usable, 2, replace=False))
        if pool.labels[first] != pool.labels[second] and first_source[first] != first_source[second]:
            pairs.append((first, second))
    return pairs


def fit_judge(
    name: str, layout: ProjectPaths, pool: Pool, size: int, images: list[str]
) -> tuple[ClassSpace, Callable[[ByteArray], Any]]:
    """Class space of a judge on labeled images, and the function from images [N, H, W, 3] to its unit rows."""
    judge = IMAGE_JUDGES.get(name).from_setup(JudgeSetup(layout.assets, layout.root)).load()
    features = judge.features([pad_to_square(pool.media.image(image_id), size) for image_id in images])
    labels = [pool.labels[image_id] for image_id in images]
    space = fit_space(features, labels, 1.0)
    classes = ClassSpace.fit(space.project(features), labels)
    assert classes is not None
    return classes, lambda rows: space.project(judge.features(list(rows)))


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path())
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--drawn", type=int, default=32, help="pairs from which images are generated")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--judges", default="ssd_mobilenet_v2,augnet")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    layout = ProjectPaths(arguments.root)
    pipeline = AudioIPAdapterPipeline.from_pretrained(layout.model)
    assert pipeline.encoder is not None
    prompt, seconds, pool = pipeline.adapter.audio_prompt, pipeline.generation_config.max_seconds, Pool(layout)

    def sources(samples: FloatArray) -> list[str]:
        assert pipeline.encoder is not None
        return [name for name, _ in prompt.sources(pipeline.encoder.tag(samples, seconds)[0])]

    alone = {audio_id: sources(pool.clip(audio_id)) for audio_id in pool.audio}
    pairs = choose_pairs(
        pool, {key: names[0] if names else None for key, names in alone.items()}, arguments.pairs, arguments.seed
    )
    tracks = [[pool.clip(first), np.resize(pool.clip(second), len(pool.clip(first)))] for first, second in pairs]
    mixtures = [set_loudness(mix_tracks([(track, 0.0) for track in both]), LUFS) for both in tracks]
    named: dict[str, list[set[str]]] = {
        "mixture": [set(sources(mixture)) for mixture in mixtures],
        "tracks": [{*alone[first], *alone[second]} for first, second in pairs],
    }
    for name, found in named.items():
        truth = [{alone[first][0], alone[second][0]} for first, second in pairs]
        words = [
            all(any(pool.labels[clip].replace("_", " ") in text for text in texts) for clip in pair)
            for pair, texts in zip(pairs, found, strict=True)
        ]
        numbers = {
            "first sources": np.mean([wanted <= texts for wanted, texts in zip(truth, found, strict=True)]),
            "exact": np.mean([wanted == texts for wanted, texts in zip(truth, found, strict=True)]),
            "labels": np.mean(words),
        }
        print(name, json.dumps({key: round(float(value), 3) for key, value in numbers.items()}), flush=True)

    for name in arguments.judges.split(","):
        classes, project = fit_judge(name, layout, pool, pipeline.generation_config.resolution, pool.images)
        rows = [row for row, pair in enumerate(pairs) if all(pool.labels[clip] in classes.names for clip in pair)]
        rows = rows[: arguments.drawn]
        embeds = {
            "mixture": [pipeline.encode_audio(mixtures[row]) for row in rows],
            "tracks": [pipeline.encode_mixture(mixtures[row], tracks[row]) for row in rows],
            "first clip alone": [pipeline.encode_audio(tracks[row][0]) for row in rows],
        }
        for condition, encoded in embeds.items():
            images = pipeline.generate_batch(encoded, arguments.samples)
            features = [project(row) for row in images]
            found_classes = [
                [
                    [classes.found(row, pool.labels[clip]) for clip in pairs[rows[other]]]
                    for other in (place, (place + 1) % len(rows))
                ]
                for place, row in enumerate(features)
            ]
            own, control = np.moveaxis(np.array(found_classes), 1, 0)  # [pairs, 2, samples] each
            numbers = {
                "both": own.all(1).mean(),
                "one": (own.sum(1) == 1).mean(),
                "first": own[:, 0].mean(),
                "control": control.all(1).mean(),
                "control one": (control.sum(1) == 1).mean(),
                "images": own[:, 0].size,
            }
            print(name, condition, json.dumps({key: round(float(value), 3) for key, value in numbers.items()}), flush=True)


if __name__ == "__main__":
    main()
