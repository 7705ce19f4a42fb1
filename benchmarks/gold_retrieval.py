"""Image-to-audio retrieval on gold pairs, with baselines and oracles under the same protocol.

    python -m benchmarks.gold_retrieval --gold DIR --pool DIR [--json OUT] [--development]

Each folder contains a `manifest.csv` with the columns id, kind (image | sound), file, label, split (gold | pool) and pair.
Queries are the gold images of --gold, candidates the gold sounds of --gold and the pool sounds of --pool. Files are decoded as
by stage `ingest`. Labels are used for the oracle rows and after ranking; the pipeline does not read them.

An image for which the captioner abstains is ranked by its guesses, as by `sonify find`; the row `ours, abstaining` counts it as
a miss at the worst rank. A pair whose file cannot be decoded is a miss in every row.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image

from pipeline_steps.caption.captioners.base import SoundEvent
from pipeline_steps.caption.captioners.tagger import LabelScore
from pipeline_steps.caption.config import CaptionConfig
from pipeline_steps.caption.lexicon import COCO, IMAGENET
from pipeline_steps.caption.stage import build_captioner
from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.core.l2_normalize import l2_normalize
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.seeding import seeded_rng
from pipeline_steps.embed.config import EmbedConfig
from pipeline_steps.embed.stage import build_encoder
from pipeline_steps.ingest.candidates import CandidateFile
from pipeline_steps.ingest.config import IngestConfig
from pipeline_steps.ingest.decoding.decode import decode
from pipeline_steps.ingest.sources.file_walk import inspect_file
from pipeline_steps.ingest.stage import build_decode_job
from pipeline_steps.models.text_audio.yamnet_minilm import YamnetMiniLMEncoder, YamnetMiniLMEncoderConfig, softmax_over_tags
from pipeline_steps.retrieve.config import HubnessCorrectionConfig
from pipeline_steps.retrieve.index.exact import ExactIndex
from pipeline_steps.retrieve.ranking import hubness_report, rank_neighbors

PROJECT = Path(__file__).resolve().parents[1]

RECALL_AT = (1, 5, 10)
PLAIN_TAGS = 5
RESAMPLES = 10_000
Row = dict[str, str]


@dataclass(frozen=True)
class Candidates:
    """Candidate sounds: unique by content, with the labels of all copies."""

    ids: list[str]
    labels: list[set[str]]
    posteriors: FloatArray
    plain_posteriors: FloatArray
    pool: np.ndarray


def manifest(folder: Path, split: str) -> list[Row]:
    """Rows of a split of the folder's manifest."""
    with (folder / "manifest.csv").open(encoding="utf-8", newline="") as handle:
        return [row for row in csv.DictReader(handle) if row["split"] == split]


def decoded(folder: Path, row: Row) -> tuple[str, bytes] | None:
    """(content id, normalized payload) of a file as by stage `ingest`; None if it is rejected."""
    config = IngestConfig()
    file = inspect_file(folder, row["file"], None, config.image.max_file_mb * 1e6, walked=False)
    if not isinstance(file, CandidateFile):
        print(f"rejected: {row['file']}: {file}", file=sys.stderr)
        return None
    result = decode(build_decode_job(config, file))
    if result["code"]:
        print(f"rejected: {row['file']}: {result['code']}", file=sys.stderr)
        return None
    return file.item_id, result["payload"]


def read_sounds(
    bridge: YamnetMiniLMEncoder, plain: YamnetMiniLMEncoder, folders: Sequence[tuple[Path, list[Row], bool]]
) -> tuple[Candidates, dict[str, int]]:
    """All candidates and, by pair name, the row of its sound."""
    found: dict[str, int] = {}
    ids: list[str] = []
    labels: list[set[str]] = []
    posteriors: list[FloatArray] = []
    plain_posteriors: list[FloatArray] = []
    pool: list[bool] = []
    pairs: dict[str, int] = {}
    for folder, rows, is_pool in folders:
        for row in rows:
            item = decoded(folder, row)
            if item is None:
                continue
            if item[0] not in found:
                found[item[0]] = len(ids)
                ids.append(item[0])
                labels.append(set())
                pool.append(False)
                samples = soundfile.read(io.BytesIO(item[1]), dtype="float32")[0]
                posteriors.append(bridge.prepare_audio(samples))
                plain_posteriors.append(plain.prepare_audio(samples))
            place = found[item[0]]
            labels[place].add(row["label"])
            pool[place] = pool[place] or is_pool
            if not is_pool and row["pair"]:
                pairs[row["pair"]] = place
    return Candidates(ids, labels, np.stack(posteriors), np.stack(plain_posteriors), np.array(pool)), pairs


def read_pictures(folder: Path, rows: list[Row]) -> list[np.ndarray | None]:
    """Decoded images in the order of rows; None for rejected files."""
    items = [decoded(folder, row) for row in rows]
    return [None if item is None else np.asarray(Image.open(io.BytesIO(item[1])).convert("RGB")) for item in items]


def plain_queries(bridge: YamnetMiniLMEncoder, tags: Sequence[Sequence[LabelScore]]) -> FloatArray:
    """Baseline query: L2(sum over the 5 likeliest ImageNet labels, and the objects if any, of p x MiniLM(label))."""
    rows = []
    for seen in tags:
        best = sorted((tag for tag in seen if tag.vocabulary == IMAGENET), key=lambda tag: -tag.probability)[:PLAIN_TAGS]
        used = best + [tag for tag in seen if tag.vocabulary == COCO]
        vectors = bridge.encode_texts([tag.label for tag in used]) if used else np.zeros((1, bridge.dimension), np.float32)
        rows.append(np.array([tag.probability for tag in used] or [0.0], np.float32) @ vectors)
    return l2_normalize(np.stack(rows))


def event_scores(bridge: YamnetMiniLMEncoder, events: Sequence[SoundEvent], sounds: FloatArray) -> FloatArray | None:
    """Mean over events of their inner products [N] with the sounds, weighted by salience x confidence, as `sonify find`."""
    if not events:
        return None
    weights = np.array([event.salience * event.confidence for event in events])
    weights = weights / weights.sum() if weights.sum() > 0 else np.full(len(events), 1.0 / len(events))
    return np.asarray(weights @ (bridge.encode_texts([event.phrase for event in events]) @ sounds.T), np.float32)


def quick_try(bridge: YamnetMiniLMEncoder, texts: Sequence[str], posteriors: FloatArray, prior: FloatArray) -> FloatArray:
    """Scores [Q, N] of the first idea: softmax over similarities to the bare tag names at 0.05, log of posterior over prior."""
    names = bridge.minilm.encode(bridge.yamnet.class_names)
    queries = softmax_over_tags(bridge.minilm.encode(texts) @ names.T, 0.05)
    return np.asarray(queries @ np.log((posteriors + 1e-6) / (prior + 1e-6)).T, np.float32)


def rank_of(scores: FloatArray | None, relevant: np.ndarray) -> int:
    """Rank (1 is best) of the best relevant candidate; ties count as the worse rank, missing scores as the last."""
    if scores is None or not relevant.any():
        return len(relevant)
    return 1 + int((scores[~relevant] >= scores[relevant].max()).sum())


def summarise(ranks: np.ndarray, draws: np.ndarray) -> dict[str, Any]:
    """R@k, MRR and median rank with 95 % bootstrap intervals over pairs (draws: [B, Q] indices)."""
    values = {f"R@{k}": (ranks <= k).astype(float) for k in RECALL_AT} | {"MRR": 1.0 / ranks}
    result: dict[str, Any] = {"n": len(ranks)}
    for name, value in values.items():
        low, high = np.percentile(value[draws].mean(axis=1), [2.5, 97.5])
        result[name] = {"value": float(value.mean()), "low": float(low), "high": float(high)}
    low, high = np.percentile(np.median(ranks[draws], axis=1), [2.5, 97.5])
    result["median_rank"] = {"value": float(np.median(ranks)), "low": float(low), "high": float(high)}
    return result


def show(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """Print one table."""
    print(f"\n{title}")
    print(f"  {'row':44s} {'n':>3s}  R@1    R@5    R@10  [95 % interval]  MRR    median")
    for name, row in rows.items():
        if not row["n"]:
            continue
        ten = row["R@10"]
        print(
            f"  {name:44s} {row['n']:3d}  {row['R@1']['value']:.3f}  {row['R@5']['value']:.3f}  {ten['value']:.3f} "
            f"[{ten['low']:.3f}, {ten['high']:.3f}]  {row['MRR']['value']:.3f}  {row['median_rank']['value']:.0f}"
        )


def development(
    layout: ProjectPaths, bridge: YamnetMiniLMEncoder, plain: YamnetMiniLMEncoder, candidates: Candidates
) -> dict[str, Any]:
    """Retrieval of pool sounds by their label as text, the development set for variants; gold pairs are not used."""
    rows = np.flatnonzero(candidates.pool)
    labels = [candidates.labels[row] for row in rows]
    texts = sorted(set().union(*labels))
    relevant = [np.array([text in seen for seen in labels]) for text in texts]
    posteriors, plain_posteriors = candidates.posteriors[rows], candidates.plain_posteriors[rows]
    named = YamnetMiniLMEncoder(bridge.config.model_copy(update={"phrase_weight": 0.0}), layout).load()
    scores: dict[str, FloatArray] = {
        "plain bridge": plain.encode_texts(texts) @ plain.audio_vectors(plain_posteriors).T,
        "quick try: softmax 0.05, log posterior / prior": quick_try(bridge, texts, plain_posteriors, plain_posteriors.mean(0)),
        "ours without hand-written phrases": named.encode_texts(texts) @ named.audio_vectors(posteriors).T,
        "ours": bridge.encode_texts(texts) @ bridge.audio_vectors(posteriors).T,
    }
    report: dict[str, Any] = {"space": {}, "hubs": {}}
    print(f"\nDevelopment: {len(texts)} labels as texts -> {len(rows)} pool sounds")
    for name, score in scores.items():
        ranks = np.array([rank_of(row, wanted) for row, wanted in zip(score, relevant, strict=True)])
        precision = float(np.mean([average_precision(row, wanted) for row, wanted in zip(score, relevant, strict=True)]))
        report["space"][name] = {"R@1": float((ranks <= 1).mean()), "R@10": float((ranks <= 10).mean()), "mAP": precision}
        print(f"  {name:48s} R@1 {(ranks <= 1).mean():.3f}  R@10 {(ranks <= 10).mean():.3f}  mAP {precision:.3f}")
    vectors, sounds = bridge.encode_texts(texts), bridge.audio_vectors(posteriors)
    plain_rows = ExactIndex(sounds).search(vectors, 10)[0]
    for name, method, beta in (("none", "none", 1.0), ("csls", "csls", 1.0), ("dis 5", "dis", 5.0), ("dis 20", "dis", 20.0)):
        correction = HubnessCorrectionConfig.model_validate({"method": method, "k": 20, "beta": beta})
        found = rank_neighbors(ExactIndex(sounds), vectors, sounds, len(rows), correction, 2000, 0).rows
        hits = [wanted[row] for row, wanted in zip(found, relevant, strict=True)]
        top = float(np.mean([hit[0] for hit in hits]))
        ten = float(np.mean([hit[:10].any() for hit in hits]))
        after = hubness_report(plain_rows, found, len(rows))["corrected"]
        report["hubs"][name] = {"R@1": top, "R@10": ten, **after}
        print(f"  damping {name:8s} R@1 {top:.3f}  R@10 {ten:.3f}  {after}")
    return report


def average_precision(scores: FloatArray, relevant: np.ndarray) -> float:
    """Mean of the precision at each relevant place."""
    hits = relevant[np.argsort(-scores, kind="stable")]
    return float((np.cumsum(hits)[hits] / (np.flatnonzero(hits) + 1)).mean())


def main() -> int:
    """Run, print the tables and whether the bars are met; exit code 1 if one is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gold", type=Path, default=PROJECT / "data/demo")
    parser.add_argument("--pool", type=Path, default=PROJECT / "data/demo")
    parser.add_argument("--root", type=Path, default=PROJECT, help="folder whose data/assets holds the weights")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--development", action="store_true", help="also the label -> pool sounds table")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    layout = ProjectPaths(options.root)

    bridge = build_encoder(EmbedConfig(), layout).load()
    plain = YamnetMiniLMEncoder(YamnetMiniLMEncoderConfig(text_pooling="plain", loudness_power=0.0), layout).load()
    gold_rows = manifest(options.gold, "gold")
    pictures = [row for row in gold_rows if row["kind"] == "image" and row["pair"]]
    gold_sounds = [row for row in gold_rows if row["kind"] == "sound"]
    pool_sounds = [row for row in manifest(options.pool, "pool") if row["kind"] == "sound"]
    folders = [(options.gold, gold_sounds, False), (options.pool, pool_sounds, True)]
    candidates, pair_rows = read_sounds(bridge, plain, folders)
    images = read_pictures(options.gold, pictures)
    sound_vectors = bridge.audio_vectors(candidates.posteriors)
    plain_vectors = plain.audio_vectors(candidates.plain_posteriors)
    labels = [row["label"] for row in pictures]

    captioner = build_captioner(CaptionConfig(), layout).load()
    both = build_captioner(CaptionConfig.from_params({"tagger": {"detectors": ["ssd"]}}), layout).load()
    usable = [image for image in images if image is not None]
    tagged = iter(captioner.predict(usable))
    tags = [[] if image is None else next(tagged) for image in images]
    tagged = iter(both.predict(usable))
    tags_both = [[] if image is None else next(tagged) for image in images]
    captions = [captioner.caption(seen) for seen in tags]
    captions_both = [both.caption(seen) for seen in tags_both]

    def listed(space: YamnetMiniLMEncoder, vectors: FloatArray, found: Sequence[Any], guess: bool) -> list[FloatArray | None]:
        return [event_scores(space, one.events or (one.guesses if guess else ()), vectors) for one in found]

    prior = candidates.plain_posteriors[candidates.pool].mean(0)
    rows: dict[str, Sequence[FloatArray | None]] = {
        "plain: Lite0 tags -> MiniLM -> plain bridge": list(plain_queries(plain, tags) @ plain_vectors.T),
        "plain: Lite0 + SSD tags": list(plain_queries(plain, tags_both) @ plain_vectors.T),
        "tags -> our space, no lexicon": list(plain_queries(bridge, tags) @ sound_vectors.T),
        "lexicon -> plain bridge": listed(plain, plain_vectors, captions, True),
        "ours": listed(bridge, sound_vectors, captions, True),
        "ours, abstaining": listed(bridge, sound_vectors, captions, False),
        "ours with SSD": listed(bridge, sound_vectors, captions_both, True),
        "oracle: label -> plain bridge": list(plain.encode_texts(labels) @ plain_vectors.T),
        "oracle: label -> quick try": list(quick_try(bridge, labels, candidates.plain_posteriors, prior)),
        "oracle: label -> our space": list(bridge.encode_texts(labels) @ sound_vectors.T),
    }
    answer = evaluate(rows, pictures, labels, candidates, pair_rows, options.seed)
    answer["coverage"] = float(np.mean([bool(one.events) for one in captions]))
    answer["candidates"] = len(candidates.ids)
    print(f"\ncoverage: {answer['coverage']:.3f} of the gold images have events, the others are ranked by guesses")
    answer["bars"] = bars(answer["pair"])
    answer["differences"] = differences(answer["ranks"]["pair"], options.seed)
    if options.development:
        answer["development"] = development(layout, bridge, plain, candidates)
    if options.json:
        options.json.write_text(json.dumps(answer, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return 0 if all(bar["met"] for bar in answer["bars"].values()) else 1


def evaluate(
    rows: dict[str, Sequence[FloatArray | None]],
    pictures: list[Row],
    labels: list[str],
    candidates: Candidates,
    pair_rows: dict[str, int],
    seed: int,
) -> dict[str, Any]:
    """Tables `pair` (only the pair's own sound counts) and `label` (any sound of the label), all, seen and unseen labels."""
    n_sounds = len(candidates.ids)
    own = [np.arange(n_sounds) == pair_rows.get(row["pair"], -1) for row in pictures]
    same = [np.array([label in seen for seen in candidates.labels]) for label in labels]
    pool_labels = set().union(*(candidates.labels[row] for row in np.flatnonzero(candidates.pool)))
    seen = np.array([label in pool_labels for label in labels])
    generated = seeded_rng(seed, "gold-retrieval")
    subsets: dict[str, Callable[[], np.ndarray]] = {
        "all": lambda: np.arange(len(labels)),
        "seen": lambda: np.flatnonzero(seen),
        "unseen": lambda: np.flatnonzero(~seen),
    }
    answer: dict[str, Any] = {}
    for protocol, relevant in (("pair", own), ("label", same)):
        answer[protocol] = {}
        for subset, members in subsets.items():
            places = members()
            if not len(places):
                continue
            draws = generated.integers(0, len(places), (RESAMPLES, len(places)))
            table = {"random (expected)": random_row([relevant[place] for place in places], generated)}
            for name, scores in rows.items():
                ranks = np.array([rank_of(scores[place], relevant[place]) for place in places])
                table[name] = summarise(ranks, draws)
                if subset == "all":
                    answer.setdefault("ranks", {}).setdefault(protocol, {})[name] = ranks.tolist()
            answer[protocol][subset] = table
            what = "its own sound" if protocol == "pair" else "any sound of its label"
            show(f"{protocol}: {what}, {subset} labels ({len(places)} pairs, {n_sounds} candidates)", table)
    return answer


def random_row(relevant: Sequence[np.ndarray], generated: np.random.Generator) -> dict[str, Any]:
    """A random order of the candidates, 200 times."""
    n = len(relevant[0])
    ranks = np.array([[1 + np.flatnonzero(wanted[generated.permutation(n)])[0] if wanted.any() else n for wanted in relevant]
                      for _ in range(200)])  # fmt: skip
    result: dict[str, Any] = {"n": len(relevant)}
    values = {f"R@{k}": (ranks <= k).mean(axis=1) for k in RECALL_AT}
    values |= {"MRR": (1.0 / ranks).mean(axis=1), "median_rank": np.median(ranks, axis=1)}
    for name, value in values.items():
        low, high = np.percentile(value, [2.5, 97.5])
        result[name] = {"value": float(value.mean()), "low": float(low), "high": float(high)}
    return result


def differences(ranks: dict[str, list[int]], seed: int) -> dict[str, Any]:
    """R@10 of one row minus another on the same pairs, with a paired bootstrap interval."""
    couples = [
        ("ours", "plain: Lite0 tags -> MiniLM -> plain bridge"),
        ("oracle: label -> our space", "oracle: label -> plain bridge"),
        ("ours", "ours with SSD"),
    ]
    result: dict[str, Any] = {}
    print()
    for one, other in couples:
        gain = (np.array(ranks[one]) <= 10).astype(float) - (np.array(ranks[other]) <= 10)
        draws = seeded_rng(seed, "gold-retrieval", "paired").integers(0, len(gain), (RESAMPLES, len(gain)))
        low, high = np.percentile(gain[draws].mean(axis=1), [2.5, 97.5])
        result[f"{one} - {other}"] = {"value": float(gain.mean()), "low": float(low), "high": float(high)}
        print(f"R@10: {one} - {other}: {gain.mean():+.3f} [{low:+.3f}, {high:+.3f}]")
    return result


def bars(tables: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The two bars on R@10 of the pair protocol over all labels; the plain baseline is the better of its two forms."""
    ten = {name: row["R@10"]["value"] for name, row in tables["all"].items()}
    baseline = max(value for name, value in ten.items() if name.startswith("plain:"))
    oracle = ten["oracle: label -> plain bridge"]
    half = (baseline + oracle) / 2
    found = {
        "ours >= halfway from plain baseline to label oracle": (ten["ours"], half, ten["ours"] >= half - 1e-9),
        "label oracle in our space > plain bridge's": (
            ten["oracle: label -> our space"],
            oracle,
            ten["oracle: label -> our space"] > oracle,
        ),
    }
    print()
    for name, (value, wanted, met) in found.items():
        print(f"bar: {name}: {value:.3f} against {wanted:.3f}: {'met' if met else 'MISSED'}")
    return {name: {"value": value, "wanted": wanted, "met": bool(met)} for name, (value, wanted, met) in found.items()}


if __name__ == "__main__":
    sys.exit(main())
