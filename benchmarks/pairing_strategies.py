"""What pairing is worth: one fixed recipe, only the pairing changes, several seeds.

Usage: python -m benchmarks.pairing_strategies --work DIR [--root .] [--seeds 3] [--steps 400] [--threads 2] [--strategies a,b]

Every strategy pairs the images of split `train` with the same clips: those of groups that the splits do not hold out.

- `random`: a random clip;
- `top1`: the clip with the highest cosine to the first event of the image;
- `greedy`: the same with `pair.max_reuse` images per group of clips, the highest cosines first;
- `ours`: the pairs of the project;
- `several`: the same, with the best clips of up to two further events, at gains by their weights;
- `class_oracle`: a random clip of the image's class, or else of the class whose name is nearest.

The pairs are measured without training, by the labels: `label cosine`, mean MiniLM cosine of the labels of image and clip;
`precision`, pairs with one class on both sides, among images whose class has a clip; `recall@10`, such images with a clip of
their class among the ten best by the score that the strategy maximizes; images, tracks of an image, distinct clips, and images
of the most used group of clips.

`lookup` needs no training either: each held-out clip is answered with 16 training images, drawn from a softmax (temperature
.03) over the cosines of their clips to it in the retrieval space, and judged as generated images are. A model that remembers
the pairs and mixes nothing reaches it. The vector of several tracks is the mean of theirs, weighted by amplitude.

The trained adapter conditions alone: the prompt of the backbone is empty. Win rates are of the headline judge: `labels`, on
clips and images of one class that no strategy trains on; `test`, on the test pairs of the project, which are pairs of `ours`.
Gold pairs take no part. Rows are appended to DIR/rows.jsonl when they are complete; a second call computes the missing ones.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.mixtures import Pool, fit_judge
from benchmarks.training import project_copy, win_rate
from pipeline_steps.core.array_types import DoubleArray, FloatArray
from pipeline_steps.core.config import load_params
from pipeline_steps.core.l2_normalize import l2_normalize
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import AUDIO, EVENTS, NEIGHBORS, PAIRS
from pipeline_steps.core.seeding import seeded_rng
from pipeline_steps.core.tables import read_table, write_table
from pipeline_steps.diffusion.image_processor import pad_to_square
from pipeline_steps.evaluate.stage import read_embeddings
from pipeline_steps.models.text_audio.minilm import MiniLM
from pipeline_steps.pair.config import PairConfig
from pipeline_steps.pair.eligibility import eligible_audio
from pipeline_steps.pair.splits import split_from_hash

PROJECT = Path(__file__).resolve().parents[1]
STRATEGIES = ("random", "ours", "class_oracle", "top1", "greedy", "several")
MAX_TRACKS = 3
MIN_GAIN_DB = -12.0
LOOKUP_TEMPERATURE, LOOKUP_IMAGES = 0.03, 16
RATES = ("lookup labels", "lookup test", "labels", "test")
MAX_EVALUATED = 100
"""Clips of each set from which images are generated."""
HELD_OUT = "held-out.json"
RECIPE: dict[str, Any] = {
    "backbone.prompt": "",
    "phases.adapter.learning_rate": 1e-3,
    "audio.num_augmentations": 2,
    "optimizer.ema_decay": 0.98,
}
"""Changes of section `train` and its group `ip_adapter`, in which the audio tokens alone condition."""

Row = dict[str, Any]


@dataclass
class PairingPool:
    """Images and clips that every strategy pairs.

    Attributes:
        own: rows of the project's pairs with split `train`, by image id.
        other: rows with the other splits.
        held_out: ids of the clips that no strategy uses.
        groups: duplicate group of each clip that may be used.
        clips: ids of these clips, sorted.
        events: rows of the events of each image.
        cosine: event text id -> cosines [clips].
        corrected: (event text id, clip) -> corrected score of the retrieval.
        labels: class by catalog id.
        similarity: cosine of two classes.
        vectors: unit vectors of all clips in the retrieval space.
        max_reuse: images per group of clips.
    """

    own: dict[str, Row]
    other: list[Row]
    held_out: list[str]
    groups: dict[str, str]
    clips: list[str]
    events: dict[str, list[Row]]
    cosine: dict[str, FloatArray]
    corrected: dict[tuple[str, str], float]
    labels: dict[str, str]
    similarity: dict[tuple[str, str], float]
    vectors: dict[str, FloatArray]
    max_reuse: int

    @classmethod
    def load(cls, layout: ProjectPaths, labels: dict[str, str]) -> PairingPool:
        """Read the tables of a project whose stages up to `pair` have run."""
        config = PairConfig.from_params(load_params(layout.params)["pair"])
        pairs = read_table(layout.pairs / "pairs.parquet", PAIRS).to_pylist()
        meta = json.loads((layout.embeddings / "meta.json").read_text(encoding="utf-8"))
        space, _ = read_embeddings(layout, meta)
        vectors = {audio_id: space.audio[row] for audio_id, row in space.audio_row.items()}
        catalog = read_table(layout.catalog / "audio.parquet", AUDIO).to_pylist()
        audio = eligible_audio(catalog, vectors, config.audio_duplicate_cosine, config.license_policy)
        trained = {row["audio_group"] for row in pairs if row["split"] == "train"}
        fractions = config.splits.audio

        def held_out(group: str) -> bool:
            split = split_from_hash(group, "audio", config.seed, fractions.test, fractions.val)
            return split != "train" and group not in trained

        by_clip = dict(zip(audio.ids, audio.groups, strict=True))
        used = {row["audio_group"] for row in pairs if row["split"] != "train"}
        groups = {name: group for name, group in by_clip.items() if group not in used and not held_out(group)}
        clips = sorted(groups)
        matrix = np.stack([vectors[clip] for clip in clips])
        events: dict[str, list[Row]] = {}
        for row in read_table(layout.captions / "events.parquet", EVENTS).sort_by([("rank", "ascending")]).to_pylist():
            events.setdefault(row["image_id"], []).append(row)
        names = sorted(set(labels.values()))
        text = MiniLM(layout.assets).load().encode([name.replace("_", " ") for name in names])
        cosines = text @ text.T
        neighbors = read_table(layout.retrieval / "neighbors.parquet", NEIGHBORS).to_pylist()
        return cls(
            {row["image_id"]: row for row in pairs if row["split"] == "train"},
            [row for row in pairs if row["split"] != "train"],
            sorted(by_clip.keys() - groups.keys()),
            groups,
            clips,
            events,
            {text: matrix @ space.texts[row] for text, row in space.text_row.items()},
            {(row["text_id"], row["audio_id"]): row["corrected_score"] for row in neighbors},
            labels,
            {(a, b): float(cosines[i, j]) for i, a in enumerate(names) for j, b in enumerate(names)},
            vectors,
            config.max_reuse,
        )

    def weight(self, event: Row) -> float:
        """Weight of an event in the pairing."""
        return math.sqrt(event["salience"] * event["confidence"])

    def score(self, image: str, strategy: str) -> DoubleArray | FloatArray | None:
        """Score [clips] that a strategy maximizes for an image; None if it maximizes none."""
        if strategy in ("top1", "greedy"):
            return self.cosine[self.events[image][0]["text_id"]]
        if strategy not in ("ours", "several"):
            return None
        lists = [
            [self.weight(event) * self.corrected.get((event["text_id"], clip), -np.inf) for clip in self.clips]
            for event in self.events[image]
        ]
        return np.asarray(np.max(np.array(lists), axis=0))

    def with_class(self, image: str) -> list[str]:
        """Clips of the image's class."""
        return [clip for clip in self.clips if self.labels.get(clip) == self.labels.get(image, "")]

    def label_cosine(self, image: str, clip: str) -> float | None:
        """Cosine of the labels of an image and a clip; None if one of them has no label."""
        return self.similarity.get((self.labels.get(image, ""), self.labels.get(clip, "")))


def pair(pool: PairingPool, strategy: str, seed: int) -> dict[str, list[tuple[str, float]]]:
    """Tracks (clip, gain in dB) of each image that the strategy pairs."""
    images = sorted(pool.own)
    own = {image: [(row["tracks"][0]["audio_id"], float(row["tracks"][0]["gain_db"]))] for image, row in pool.own.items()}
    rng = seeded_rng(seed, "pairing", strategy)
    if strategy == "random":
        return {image: [(str(rng.choice(pool.clips)), 0.0)] for image in images}
    if strategy == "class_oracle":
        nearest = {}
        for image in images:
            cosines = np.array([pool.label_cosine(image, clip) or 0.0 for clip in pool.clips])
            best = [clip for clip, value in zip(pool.clips, cosines, strict=True) if value >= cosines.max() - 1e-6]
            nearest[image] = [(str(rng.choice(best)), 0.0)]
        return nearest
    if strategy == "ours":
        return own
    if strategy == "several":
        return {image: own[image] + further_tracks(pool, image, own[image][0]) for image in images}
    cosines = np.stack([pool.cosine[pool.events[image][0]["text_id"]] for image in images])
    if strategy == "top1":
        return {image: [(pool.clips[int(row.argmax())], 0.0)] for image, row in zip(images, cosines, strict=True)}
    assert strategy == "greedy"
    found: dict[str, list[tuple[str, float]]] = {}
    used: Counter[str] = Counter()
    for edge in np.argsort(-cosines, axis=None, kind="stable").tolist():
        image, clip = images[edge // len(pool.clips)], pool.clips[edge % len(pool.clips)]
        if image not in found and used[pool.groups[clip]] < pool.max_reuse:
            found[image] = [(clip, 0.0)]
            used[pool.groups[clip]] += 1
    return found


def further_tracks(pool: PairingPool, image: str, first: tuple[str, float]) -> list[tuple[str, float]]:
    """Best clips of the image's further events by weight, with their gains; clips of the first one's group are left out."""
    events = sorted(pool.events[image], key=lambda event: -pool.weight(event))
    used, tracks = {pool.groups[first[0]]}, list[tuple[str, float]]()
    for event in events[1:]:
        order = np.argsort(-pool.cosine[event["text_id"]], kind="stable")
        clip = next(pool.clips[row] for row in order if pool.groups[pool.clips[row]] not in used)
        gain = 20 * np.log10(pool.weight(event) / pool.weight(events[0]))
        if gain >= MIN_GAIN_DB and len(tracks) + 1 < MAX_TRACKS:
            tracks.append((clip, first[1] + float(gain)))
            used.add(pool.groups[clip])
    return tracks


def measure_pairs(pool: PairingPool, strategy: str, pairs: dict[str, list[tuple[str, float]]]) -> Row:
    """Quality of the pairs by the labels, coverage and reuse."""
    possible = [image for image in pairs if pool.with_class(image)]
    right = [pool.labels.get(pairs[image][0][0]) == pool.labels[image] for image in possible]
    cosines = [pool.label_cosine(image, tracks[0][0]) for image, tracks in pairs.items()]
    found = []
    for image in possible:
        score = pool.score(image, strategy)
        if score is not None:
            best = [pool.clips[row] for row in np.argsort(-score, kind="stable")[:10]]
            found.append(any(pool.labels.get(clip) == pool.labels[image] for clip in best))
    tracks = [track for chosen in pairs.values() for track, _ in chosen]
    return {
        "images": len(pairs),
        "tracks": round(len(tracks) / len(pairs), 2),
        "label cosine": round(float(np.mean([value for value in cosines if value is not None])), 3),
        "precision": round(float(np.mean(right)), 3),
        "recall@10": round(float(np.mean(found)), 3) if found else None,
        "clips": len(set(tracks)),
        "most_used": max(Counter(pool.groups[chosen[0][0]] for chosen in pairs.values()).values()),
    }


def write_pairs(pool: PairingPool, pairs: dict[str, list[tuple[str, float]]], path: Path) -> None:
    """Table of pairs in which split `train` is that of a strategy."""
    rows = [
        {
            **pool.own[image],
            "tracks": [{"audio_id": clip, "phrase": "", "gain_db": gain} for clip, gain in tracks],
            "audio_group": pool.groups[tracks[0][0]],
        }
        for image, tracks in pairs.items()
    ]
    write_table(path, PAIRS, [*rows, *pool.other])


def train_and_measure(folder: Path, changes: dict[str, Any], threads: int, samples: int) -> None:
    """Train in a project copy whose pairs are those of a strategy; print the numbers as the last line."""
    import torch

    torch.set_num_threads(threads)
    from pipeline_steps.train.stage import TrainConfig, run

    layout = ProjectPaths(folder)
    section = load_params(layout.params)["train"]
    for key, value in changes.items():
        *groups, name = key.split(".")
        node = section["ip_adapter"] if groups and groups[0] in section["ip_adapter"] else section
        for group in groups:
            node = node[group]
        node[name] = value
    report = run(TrainConfig.from_params({**section, "num_threads": threads}), layout)
    print("RESULT " + json.dumps({"loss": report.metrics["loss"], **measure_model(layout, samples)}), flush=True)


Items = list[tuple[str, str, str]]
"""Clip, real image, and group of each evaluated pair."""


class Evaluation:
    """Evaluated pairs and the feature space of the headline judge.

    Args:
        layout: project whose pairs have the training images of a strategy.
        held_out: clips that no strategy uses.
    """

    def __init__(self, layout: ProjectPaths, held_out: list[str], size: int) -> None:
        self.pool, self.size = Pool(layout), size
        rows = read_table(layout.pairs / "pairs.parquet", PAIRS).to_pylist()
        trained = {row["image_id"] for row in rows if row["split"] == "train"}
        test = [(row["tracks"][0]["audio_id"], row["image_id"], row["audio_group"]) for row in rows if row["split"] == "test"]
        labels: Items = []
        for clip in held_out:
            label = self.pool.labels.get(clip)
            same = [image for image in self.pool.images if image not in trained and self.pool.labels[image] == label]
            if same:
                labels.append((clip, same[len(labels) % len(same)], str(label)))
        step = -(-len(labels) // MAX_EVALUATED) or 1
        self.sets: dict[str, Items] = {"labels": labels[::step], "test": test[:MAX_EVALUATED]}
        self.clips = sorted({clip for items in self.sets.values() for clip, _, _ in items})
        evaluated = {image for items in self.sets.values() for _, image, _ in items}
        calibration = [image for image in self.pool.images if image not in evaluated]
        judge = load_params(layout.params)["evaluate"]["image_judges"][0]
        _, self.project = fit_judge(judge, layout, self.pool, size, calibration)
        self.real = {name: self.features([image for _, image, _ in items]) for name, items in self.sets.items()}

    def features(self, images: list[str]) -> DoubleArray:
        """Unit rows of images of the catalog."""
        squares = [pad_to_square(self.pool.media.image(image), self.size) for image in images]
        return np.asarray(self.project(np.stack(squares)))

    def win_rates(self, answers: dict[str, DoubleArray]) -> Row:
        """Win rate of each set from the unit rows [S, K] that answer each clip."""
        numbers: Row = {}
        for name, items in self.sets.items():
            rows = np.stack([answers[clip] for clip, _, _ in items])
            groups = [group for _, _, group in items]
            rates = [win_rate(self.real[name], rows[:, sample], groups) for sample in range(rows.shape[1])]
            numbers |= {name: round(float(np.mean(rates)), 4), f"{name}_n": len(items)}
        return numbers


def measure_model(layout: ProjectPaths, samples: int) -> Row:
    """Win rates of the exported model."""
    from pipeline_steps.diffusion.pipelines.auto import AutoAudio2ImagePipeline

    pipeline = AutoAudio2ImagePipeline.from_pretrained(layout.model)
    held_out = json.loads((layout.root / HELD_OUT).read_text(encoding="utf-8"))
    found = Evaluation(layout, held_out, pipeline.generation_config.resolution)
    embeds = [pipeline.encode_audio(found.pool.media.sound(clip)) for clip in found.clips]
    images = pipeline.generate_batch(embeds, samples, seed=0)
    return found.win_rates({clip: np.asarray(found.project(row)) for clip, row in zip(found.clips, images, strict=True)})


def measure_lookup(
    pool: PairingPool, pairs: dict[str, list[tuple[str, float]]], found: Evaluation, trained: DoubleArray, seed: int
) -> Row:
    """Win rates of training images whose clips are near.

    Args:
        trained: unit rows of the images of `pool.own`, sorted.
    """
    rng, rows = seeded_rng(seed, "lookup"), {image: row for row, image in enumerate(sorted(pool.own))}
    mixed = [sum(pool.vectors[clip] * 10 ** (gain / 20) for clip, gain in tracks) for tracks in pairs.values()]
    clips = l2_normalize(np.stack([np.asarray(vector) for vector in mixed]))
    answers = {}
    for clip in found.clips:
        logits = clips @ pool.vectors[clip] / LOOKUP_TEMPERATURE
        chances = np.exp(logits - logits.max())
        chosen = rng.choice(len(pairs), LOOKUP_IMAGES, p=chances / chances.sum())
        answers[clip] = trained[[rows[list(pairs)[index]] for index in chosen]]
    rates = found.win_rates(answers)
    return {f"lookup {name}": rates[name] for name in found.sets}


def table(rows: list[Row]) -> str:
    """Markdown table: mean of each strategy over its seeds, and the standard deviation over the seeds."""
    columns = ("images", "tracks", "label cosine", "precision", "recall@10", "clips", "most_used", *RATES)
    lines = ["| strategy | seeds | " + " | ".join(columns) + " |", "|" + " --- |" * (len(columns) + 2)]
    for strategy in STRATEGIES:
        own = [row for row in rows if row["strategy"] == strategy]
        cells = []
        for column in columns:
            values = [row[column] for row in own if row.get(column) is not None]
            spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 and column in RATES else ""
            cells.append(f"{np.mean(values):.4g}{spread}" if values else "")
        if own:
            lines.append(f"| {strategy} | {len(own)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=PROJECT)
    parser.add_argument("--work", type=Path, required=True, help="folder of the rows, the caches and the runs")
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--samples", type=int, default=2, help="images generated from each clip")
    parser.add_argument("--inference-steps", type=int, default=16)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--pairs-only", action="store_true", help="measure the pairs without training")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "CHANGES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        train_and_measure(Path(arguments.child[0]), json.loads(arguments.child[1]), arguments.threads, arguments.samples)
        return
    layout = ProjectPaths(arguments.root)
    pool = PairingPool.load(layout, dict(Pool(layout).labels))
    arguments.work.mkdir(parents=True, exist_ok=True)
    path = arguments.work / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    found = Evaluation(layout, pool.held_out, int(load_params(layout.params)["train"]["resolution"]))
    trained = found.features(sorted(pool.own))
    complete = {(row["strategy"], row["seed"]) for row in rows}
    for seed in range(arguments.seeds):
        for strategy in arguments.strategies.split(","):
            if (strategy, seed) in complete:
                continue
            pairs = pair(pool, strategy, seed)
            numbers = {"strategy": strategy, "seed": seed, **measure_pairs(pool, strategy, pairs)}
            numbers |= measure_lookup(pool, pairs, found, trained, seed)
            if not arguments.pairs_only:
                numbers |= run_child(arguments, pool, pairs, f"{strategy}-{seed}", seed)
                with path.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(numbers) + "\n")
            rows.append(numbers)
            print(json.dumps(numbers), flush=True)
    print(table(rows))


def run_child(
    arguments: argparse.Namespace, pool: PairingPool, pairs: dict[str, list[tuple[str, float]]], name: str, seed: int
) -> Row:
    """Train and measure a strategy in a process of its own; caches are shared, the folder of the run is deleted."""
    folder = arguments.work / name
    shutil.rmtree(folder, ignore_errors=True)
    project_copy(arguments.root, folder)
    (folder / "data/demo").symlink_to((arguments.root / "data/demo").resolve())
    (folder / "data/pairs").unlink()
    write_pairs(pool, pairs, folder / "data/pairs/pairs.parquet")
    (folder / HELD_OUT).write_text(json.dumps(pool.held_out), encoding="utf-8")
    (arguments.work / "cache").mkdir(exist_ok=True)
    (folder / ".cache").symlink_to((arguments.work / "cache").resolve())
    steps = {"phases.adapter.max_steps": arguments.steps, "phases.adapter.batch_size": arguments.batch_size}
    quiet = {"checkpointing_steps": arguments.steps, "validation_steps": arguments.steps, "seed": seed}
    quiet["sampling.num_inference_steps"] = arguments.inference_steps
    command = [sys.executable, "-m", "benchmarks.pairing_strategies", "--work", str(arguments.work)]
    command += [
        "--threads",
        str(arguments.threads),
        "--samples",
        str(arguments.samples),
        "--child",
        str(folder),
        json.dumps({**RECIPE, **steps, **quiet}),
    ]
    environment = {**os.environ, "SONIFY_TRACKING": "off"}
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=PROJECT).stdout
    shutil.rmtree(folder)
    numbers: Row = json.loads(output.rsplit("RESULT ", 1)[1])
    return numbers


if __name__ == "__main__":
    main()
