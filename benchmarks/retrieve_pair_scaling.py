"""Scaling of `retrieve` and `pair`: 10 thousand, 100 thousand and a million images and clips.

    python -m benchmarks.retrieve_pair_scaling [--items 10000 100000 1000000] [--folder DIR] [--trees 0] [--keep]

The catalog is synthetic; each stage runs in its own process. Audio embeddings are unit vectors in 512 dimensions, sampled from
a thousand topics of unequal size (Zipf) with a common low-rank covariance. Texts, one for four images, come from the same
topics, shifted by a modality gap. An image has one to three events; the frequency of texts follows Zipf's law. A sample of the
items has real shards, and pairs found in it are read back through the index. Printed per step: seconds, processor seconds, peak
memory (including mapped files), bytes written; then the fitted exponent of growth.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline_steps.core.atomic import write_json
from pipeline_steps.core.hashing import sha256_file
from pipeline_steps.core.media_shards import SAMPLE_RATE, MediaShardReader, write_index, write_shards
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import ABSTAINED, AUDIO, AUDIO_IDS, EVENTS, IMAGES, PAIRS, QUARANTINE, TEXT_IDS, TableSchema
from pipeline_steps.core.tables import read_table, write_table

DIMENSION, TOPICS, LOW_RANK, SAMPLE = 512, 1000, 64, 256
STEPS = ("make", "retrieve", "pair")
LICENSES = ("CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0")


class World:
    """The space behind the vectors: topics, their sizes, the directions in which they spread, and the modality gap."""

    def __init__(self, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.shared = unit(random.standard_normal((1, DIMENSION))) * 0.5
        self.gap = unit(random.standard_normal((1, DIMENSION))) * 0.4
        self.topics = unit(random.standard_normal((TOPICS, DIMENSION))) * 0.7
        self.directions = unit(random.standard_normal((LOW_RANK, DIMENSION)))
        self.weight = zipf(TOPICS)

    def draw(self, count: int, seed: int, text: bool) -> np.ndarray:
        """Unit rows [count, DIMENSION]."""
        random = np.random.default_rng([seed, count])
        rows = np.empty((count, DIMENSION), np.float32)
        for start in range(0, count, 50_000):
            n = min(50_000, count - start)
            topic = random.choice(TOPICS, n, p=self.weight)
            spread = random.standard_normal((n, LOW_RANK), dtype=np.float32) * np.float32(0.6 / 8) @ self.directions
            noise = random.standard_normal((n, DIMENSION), dtype=np.float32) * np.float32(0.35 / np.sqrt(DIMENSION))
            rows[start : start + n] = unit(self.topics[topic] + self.shared + (self.gap if text else 0) + spread + noise)
        return rows


def unit(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def zipf(count: int, exponent: float = 0.8) -> np.ndarray:
    weight = 1 / np.arange(1, count + 1) ** exponent
    return weight / weight.sum()


def identities(count: int, seed: int) -> pa.Array:
    """Sorted, unique, random ids of 32 hex digits."""
    raw = np.random.default_rng([seed, count]).bytes(16 * count).hex()
    return pa.array(sorted({raw[at : at + 32] for at in range(0, len(raw), 32)}), pa.string())


def provenance(ids: pa.Array, random: np.random.Generator) -> dict[str, pa.Array]:
    """Columns common to images and audio; one item in fifty is a near duplicate of the one before it."""
    count = len(ids)
    own = np.arange(count) - (random.random(count) < 0.02) * (np.arange(count) > 0)
    empty = pa.array([[]] * count, pa.list_(pa.string()))
    return {
        "sha256": ids, "path": ids, "sources": empty, "bytes": pa.array(np.full(count, 50_000)),
        "format": pa.array(["X"] * count), "normalizations": empty,
        "license": pa.array(LICENSES).take(pa.array(random.integers(0, len(LICENSES), count))),
        "author": pa.nulls(count, pa.string()), "source": pa.nulls(count, pa.string()),
        "group_id": ids.take(pa.array(own)), "holdout": pa.array(np.zeros(count, bool)),
    }  # fmt: skip


def put(path: Path, contract: TableSchema, columns: dict[str, pa.Array]) -> None:
    write_table(path, contract, pa.table({name: columns[name] for name in contract.schema.names}, schema=contract.schema))


def make(layout: ProjectPaths, items: int) -> dict[str, object]:
    """Write everything that `retrieve` and `pair` read."""
    random, world = np.random.default_rng(items), World()
    images, sounds, texts = identities(items, 1), identities(items, 2), identities(max(items // 4, 1), 3)
    columns = provenance(images, random)
    hashes = random.bytes(8 * items).hex()
    side = pa.array(np.full(items, 256, np.int32))
    phash = pa.array([hashes[at : at + 16] for at in range(0, len(hashes), 16)])
    put(layout.catalog / "images.parquet", IMAGES,
        {"image_id": images, **columns, "width": side, "height": side, "frames": side, "phash": phash})  # fmt: skip
    numbers = {
        name: pa.array(random.uniform(-30, -10, items).astype(np.float32))
        for name in ("lufs", "peak_dbfs", "silence_ratio", "clipping_ratio")
    }
    put(layout.catalog / "audio.parquet", AUDIO,
        {"audio_id": sounds, **provenance(sounds, random), "sample_rate": pa.array(np.full(items, SAMPLE_RATE, np.int32)),
         "channels": pa.array(np.ones(items, np.int16)), "seconds": pa.array(np.full(items, 10.0)), **numbers})  # fmt: skip
    counts = random.integers(1, 4, items)
    owner = np.repeat(np.arange(items), counts)
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    used = random.permutation(len(texts))[random.choice(len(texts), len(owner), p=zipf(len(texts)))]
    phrase = pa.array([f"sound {number}" for number in range(len(texts))])
    put(layout.captions / "events.parquet", EVENTS,
        {"image_id": images.take(pa.array(owner)), "rank": pa.array(rank.astype(np.int16)),
         "text_id": texts.take(pa.array(used)), "phrase": phrase.take(pa.array(used)),
         "sound_source": pa.array([""] * len(owner)),
         "visible": pa.array(np.ones(len(owner), bool)), "salience": pa.array((1 / (1 + rank)).astype(np.float32)),
         "confidence": pa.array(random.uniform(0.1, 1, len(owner)).astype(np.float32))})  # fmt: skip
    write_table(layout.captions / "abstained.parquet", ABSTAINED, [])
    write_table(layout.captions / "quarantine.parquet", QUARANTINE, [])
    layout.embeddings.mkdir(parents=True, exist_ok=True)
    vectors = world.draw(items, 5, text=False)
    # A near-duplicate recording has nearly the same vector.
    twin = np.flatnonzero(random.random(items) < 0.01)
    twin = twin[twin > 0]
    vectors[twin] = unit(vectors[twin - 1] + random.normal(0, 0.02 / np.sqrt(DIMENSION), (len(twin), DIMENSION)))
    np.save(layout.embeddings / "audio.npy", vectors)
    del vectors
    np.save(layout.embeddings / "text.npy", world.draw(len(texts), 6, text=True))
    rows = pa.array(np.arange(items, dtype=np.int32))
    put(layout.embeddings / "audio_ids.parquet", AUDIO_IDS, {"row": rows, "audio_id": sounds})
    put(layout.embeddings / "text_ids.parquet", TEXT_IDS,
        {"row": rows.slice(0, len(texts)), "text_id": texts, "phrase": phrase})  # fmt: skip
    names = ("text.npy", "audio.npy")
    write_json(layout.embeddings / "meta.json",
               {"dimension": DIMENSION, "fingerprint": "made up", "families": [],
                "sha256": {name: sha256_file(layout.embeddings / name) for name in names}})  # fmt: skip
    sample_shards(layout, images, sounds, random)
    return {"pictures": items, "sounds": items, "texts": len(texts), "events": len(owner)}


def sample_shards(layout: ProjectPaths, images: pa.Array, sounds: pa.Array, random: np.random.Generator) -> None:
    """Real PNG and FLAC shards with their index for the first items."""
    import soundfile
    from PIL import Image

    pictures, recordings = {}, {}
    for name in images.slice(0, SAMPLE).to_pylist():
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
        pictures[name] = buffer.getvalue()
    for name in sounds.slice(0, SAMPLE).to_pylist():
        buffer = io.BytesIO()
        soundfile.write(buffer, random.uniform(-0.5, 0.5, SAMPLE_RATE // 2), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        recordings[name] = buffer.getvalue()
    rows = write_shards(layout.media, "image", pictures, "png") + write_shards(layout.media, "audio", recordings, "flac")
    write_index(layout.media, rows)


def retrieve(layout: ProjectPaths, trees: int) -> dict[str, object]:
    from pipeline_steps.retrieve.stage import RetrieveConfig, run

    report = run(RetrieveConfig.from_params({"annoy": {"trees": trees}}), layout)
    report.check_balance()
    return {name: report.metrics.get(name) for name in ("index", "ivf", "ivf_among_texts", "annoy_recall_at_10")}


def pair(layout: ProjectPaths) -> dict[str, object]:
    """Run the stage without tracking."""
    from pipeline_steps.pair.stage import PairConfig
    from pipeline_steps.pair.stage import build_pairs as make_pairs

    report = make_pairs(PairConfig(), layout)
    report.check_balance()
    media = MediaShardReader(layout.media)
    read = 0
    for row in read_table(layout.pairs / "pairs.parquet", PAIRS).select(["image_id", "tracks"]).to_pylist():
        track = row["tracks"][0]["audio_id"]
        if row["image_id"] in media:
            media.image(row["image_id"])
            read += 1
        if track in media:
            media.sound(track)
            read += 1
    names = ("pairs", "abstained_all", "solver", "candidate_edges", "splits", "leaks", "pool_sounds", "sound_groups")
    return {"sample_items_read": read, **{name: report.metrics[name] for name in names}}


def child(step: str, layout: ProjectPaths, items: int, trees: int) -> None:
    done = make(layout, items) if step == "make" else retrieve(layout, trees) if step == "retrieve" else pair(layout)
    print(json.dumps(done))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(step: str, folder: Path, items: int, trees: int) -> dict[str, float]:
    before, begin = size(folder), time.perf_counter()
    command = [sys.executable, __file__, "--child", step, "--folder", str(folder), "--items", str(items), "--trees", str(trees)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{step} at {items} items ended with code {process.returncode}")
    row = {
        "seconds": time.perf_counter() - begin, "cpu": usage.ru_utime + usage.ru_stime,
        "GB": usage.ru_maxrss / 2**20, "disk": (size(folder) - before) / 1e9,
    }  # fmt: skip
    numbers = f"{row['seconds']:9.1f} {row['cpu']:9.1f} {row['GB']:8.2f} {row['disk']:8.3f}"
    print(f"{items:>9} {step:9}{numbers}   {output.strip()}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--trees", type=int, default=0, help="trees of the interactive index")
    parser.add_argument("--keep", action="store_true", help="keep what was made")
    parser.add_argument("--child", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, ProjectPaths(arguments.folder), arguments.items[0], arguments.trees)
        return
    root = arguments.folder or Path(tempfile.mkdtemp(prefix="million-"))
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores\n    items step     seconds     cpu s     GB max  GB disk")
    rows: dict[str, list[dict[str, float]]] = {step: [] for step in STEPS}
    for items in arguments.items:
        folder = root / str(items)
        for step in STEPS:
            rows[step].append(measure(step, folder, items, arguments.trees))
        if not arguments.keep:
            shutil.rmtree(folder)
    if len(arguments.items) > 1:
        both = [{name: sum(rows[step][at][name] for step in STEPS[1:]) for name in ("seconds", "cpu")}
                for at in range(len(arguments.items))]  # fmt: skip
        for name, measured in (*rows.items(), ("retrieve + pair", both)):
            for unit_of in ("seconds", "cpu"):
                slope = np.polyfit(np.log(arguments.items), np.log([row[unit_of] for row in measured]), 1)[0]
                print(f"exponent of {unit_of} of {name}: {slope:.2f}")
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
