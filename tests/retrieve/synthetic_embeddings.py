"""Catalog, events and embeddings of random unit vectors, as the stages before `retrieve` write them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from pipeline_steps.core.atomic import write_bytes, write_json
from pipeline_steps.core.hashing import sha256_bytes, text_id
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import AUDIO, AUDIO_IDS, EVENTS, IMAGES, TEXT_IDS
from pipeline_steps.core.tables import write_table

D = 24


def unit(seed: int, rows: int) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(rows, D))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def write_vectors(layout: ProjectPaths, texts: np.ndarray, clips: np.ndarray, fingerprint: str = "space") -> None:
    hashes = {}
    for name, rows in (("text.npy", texts), ("audio.npy", clips)):
        buffer = io.BytesIO()
        np.save(buffer, rows)
        write_bytes(layout.embeddings / name, buffer.getvalue())
        hashes[name] = sha256_bytes(buffer.getvalue())
    meta = {"dimension": texts.shape[1], "fingerprint": fingerprint, "families": ["yamnet"], "sha256": hashes}
    write_json(layout.embeddings / "meta.json", meta)


def provenance(item: str, holdout: bool) -> dict[str, object]:
    return {
        "sha256": item * 2, "path": f"{item}.x", "sources": [f"{item}.x"], "bytes": 1, "format": "X", "normalizations": [],
        "license": None, "author": None, "source": None, "group_id": item, "holdout": holdout,
    }  # fmt: skip


def make(folder: Path, n_texts: int = 12, n_clips: int = 40, held_clips: int = 5, held_images: int = 2) -> ProjectPaths:
    """Write a catalog, events and embeddings. Each text belongs to one image; the last images and clips are held out."""
    layout = ProjectPaths(folder)
    phrases = [f"sound {number}" for number in range(n_texts)]
    images = [f"{number:032x}" for number in range(n_texts)]
    clips = [f"{number:032x}" for number in range(1000, 1000 + n_clips)]
    rows = {"width": 1, "height": 1, "num_frames": 1, "phash": "0" * 16}
    write_table(
        layout.catalog / "images.parquet",
        IMAGES,
        [{"image_id": item, **provenance(item, n >= n_texts - held_images), **rows} for n, item in enumerate(images)],
    )
    rows = {
        "sample_rate": 1,
        "channels": 1,
        "duration_s": 1.0,
        "lufs": 0.0,
        "peak_dbfs": 0.0,
        "silence_ratio": 0.0,
        "clipping_ratio": 0.0,
    }
    write_table(
        layout.catalog / "audio.parquet",
        AUDIO,
        [{"audio_id": item, **provenance(item, n >= n_clips - held_clips), **rows} for n, item in enumerate(clips)],
    )
    events = [
        {"image_id": item, "rank": 0, "text_id": text_id(phrase), "phrase": phrase, "sound_source": "", "visible": True,
         "salience": 1.0, "confidence": 1.0}
        for item, phrase in zip(images, phrases, strict=True)
    ]  # fmt: skip
    write_table(layout.captions / "events.parquet", EVENTS, events)
    keyed = sorted((text_id(phrase), phrase) for phrase in phrases)
    write_table(
        layout.embeddings / "text_ids.parquet",
        TEXT_IDS,
        [{"row": row, "text_id": key, "phrase": phrase} for row, (key, phrase) in enumerate(keyed)],
    )
    write_table(
        layout.embeddings / "audio_ids.parquet", AUDIO_IDS, [{"row": n, "audio_id": item} for n, item in enumerate(clips)]
    )
    write_vectors(layout, unit(1, n_texts), unit(2, n_clips))
    return layout
