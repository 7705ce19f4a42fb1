"""Synthetic data set on disk: images and clips of eight kinds, with the tables of the stages before `pair`."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from pipeline_steps.core.hashing import item_id, sha256_bytes, text_id
from pipeline_steps.core.media_shards import write_index, write_shards
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import ABSTAINED, AUDIO, AUDIO_IDS, EVENTS, IMAGES, NEIGHBORS, QUARANTINE, TEXT_IDS
from pipeline_steps.core.tables import write_table
from pipeline_steps.pair.stage import PairConfig

KINDS = ("dog", "bell", "train", "rain", "drum", "bird", "car", "sea")
LICENSES = ("CC0-1.0", "MIT", "CC-BY-4.0", "GPL-2.0-or-later")


def config(**changes: Any) -> PairConfig:
    """Defaults of the stage with values for a small data set whose random scores are normal."""
    return PairConfig(**{"null_quantile": 0.9, "splits": {"audio": {"test": 0.18}, "image": {"test": 0.35}}, **changes})


@dataclass
class SyntheticDataset:
    """Rows that a test may change before `write`; `vectors` and `phrases` have the vector of each clip and text."""

    layout: ProjectPaths
    images: list[dict[str, Any]] = field(default_factory=list)
    audio: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    abstained: list[dict[str, Any]] = field(default_factory=list)
    quarantined: list[dict[str, Any]] = field(default_factory=list)
    vectors: dict[str, np.ndarray] = field(default_factory=dict)
    phrases: dict[str, np.ndarray] = field(default_factory=dict)
    payloads: dict[str, bytes] = field(default_factory=dict)

    def add_image(self, kind: str | None, seed: int, **changes: Any) -> str:
        """Add an image of a kind; None: without a sound event."""
        random = np.random.default_rng([seed, 1])
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
        row = _provenance(buffer.getvalue(), f"images/{seed}.png", "PNG", seed)
        row |= {"width": 16, "height": 16, "num_frames": 1, "phash": f"{int(random.integers(0, 2**63)):016x}"}
        name = row.pop("id")
        self.payloads[name] = buffer.getvalue()
        self.images.append({"image_id": name, **row, **changes})
        if kind is None:
            self.abstained.append({"image_id": name, "stage": "caption", "code": "NO_SOUND", "reason": "silent", "score": None})
            return name
        phrase = f"sound of a {kind}"
        self.events.append(
            {
                "image_id": name,
                "rank": 0,
                "text_id": text_id(phrase),
                "phrase": phrase,
                "sound_source": kind,
                "visible": True,
                "salience": 0.9,
                "confidence": 0.5 + 0.4 * float(random.random()),
            }
        )
        return name

    def add_audio(self, kind: str, seed: int, **changes: Any) -> str:
        """Add a clip of a kind: a unit vector near the phrase of the kind."""
        random = np.random.default_rng([seed, 2])
        buffer = io.BytesIO()
        soundfile.write(buffer, random.uniform(-0.5, 0.5, 2400), 48_000, format="FLAC", subtype="PCM_16")
        row = _provenance(buffer.getvalue(), f"sounds/{seed}.flac", "FLAC", seed)
        row |= {"sample_rate": 48_000, "channels": 1, "duration_s": 0.05, "lufs": -20.0 - seed % 7, "peak_dbfs": -6.0}
        row |= {"silence_ratio": 0.0, "clipping_ratio": 0.0}
        name = row.pop("id")
        self.payloads[name] = buffer.getvalue()
        self.audio.append({"audio_id": name, **row, **changes})
        self.vectors[name] = _unit(_centre(kind) + 0.15 * random.standard_normal(32))
        self.phrases[f"sound of a {kind}"] = _centre(kind)
        return name

    def write(self, k: int = 50) -> ProjectPaths:
        """Write all tables and shards."""
        layout = self.layout
        write_table(layout.catalog / "images.parquet", IMAGES, self.images)
        write_table(layout.catalog / "audio.parquet", AUDIO, self.audio)
        write_table(layout.captions / "events.parquet", EVENTS, self.events)
        write_table(layout.captions / "abstained.parquet", ABSTAINED, self.abstained)
        write_table(layout.captions / "quarantine.parquet", QUARANTINE, self.quarantined)
        ids = sorted(self.vectors)
        audio = np.stack([self.vectors[name] for name in ids]).astype(np.float32)
        phrases = sorted(self.phrases, key=text_id)
        text = np.stack([self.phrases[phrase] for phrase in phrases]).astype(np.float32)
        layout.embeddings.mkdir(parents=True, exist_ok=True)
        np.save(layout.embeddings / "audio.npy", audio)
        np.save(layout.embeddings / "text.npy", text)
        write_table(layout.embeddings / "audio_ids.parquet", AUDIO_IDS, [{"row": i, "audio_id": n} for i, n in enumerate(ids)])
        rows = [{"row": i, "text_id": text_id(phrase), "phrase": phrase} for i, phrase in enumerate(phrases)]
        write_table(layout.embeddings / "text_ids.parquet", TEXT_IDS, rows)
        pool = {row["audio_id"] for row in self.audio if not row["holdout"]}
        inside = [i for i, name in enumerate(ids) if name in pool]
        score = text @ audio[inside].T
        z = (score - score.mean(axis=1, keepdims=True)) / score.std(axis=1, keepdims=True).clip(1e-6)
        found = [
            {
                "text_id": text_id(phrase),
                "rank": rank,
                "audio_id": ids[inside[column]],
                "score": float(score[row, column]),
                "z_score": float(z[row, column]),
                "corrected_score": float(score[row, column]),
            }
            for row, phrase in enumerate(phrases)
            for rank, column in enumerate(np.argsort(-score[row], kind="stable")[:k].tolist())
        ]
        write_table(layout.retrieval / "neighbors.parquet", NEIGHBORS, found)
        index = write_shards(layout.media, "image", {r["image_id"]: self.payloads[r["image_id"]] for r in self.images}, "png")
        index += write_shards(layout.media, "audio", {r["audio_id"]: self.payloads[r["audio_id"]] for r in self.audio}, "flac")
        write_index(layout.media, index)
        return layout


def _provenance(payload: bytes, path: str, kind: str, seed: int) -> dict[str, Any]:
    return {
        "id": item_id(payload),
        "sha256": sha256_bytes(payload),
        "path": path,
        "sources": [path],
        "bytes": len(payload),
        "format": kind,
        "normalizations": [],
        "license": LICENSES[seed % len(LICENSES)],
        "author": f"author {seed}",
        "source": f"package/{path}",
        "group_id": item_id(path.encode()),
        "holdout": False,
    }


def _centre(kind: str) -> np.ndarray:
    return _unit(np.random.default_rng(sum(kind.encode()) + 1000 * len(kind)).standard_normal(32))


def _unit(vector: np.ndarray) -> np.ndarray:
    return (vector / np.linalg.norm(vector)).astype(np.float32)
