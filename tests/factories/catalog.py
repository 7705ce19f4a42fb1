"""Catalog and media shards of demo files, as stage ingest writes them, without child processes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from pipeline_steps.core.hashing import item_id, sha256_bytes
from pipeline_steps.core.media_shards import write_index, write_shards
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import AUDIO, IMAGES
from pipeline_steps.core.tables import write_table


def write_catalog(
    layout: ProjectPaths,
    demo: Path,
    images: Sequence[str],
    sounds: Sequence[str],
    holdout: Sequence[str] = (),
    assets: Path | None = None,
    words: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Write catalog and shards of demo items (names such as "dog-000"); returns ids by file stem ("i-dog-000").

    `words` come with the files, by name ("dog-000").
    """
    ids: dict[str, str] = {}
    rows: dict[str, list[dict[str, Any]]] = {"image": [], "audio": []}
    payloads: dict[str, dict[str, bytes]] = {"image": {}, "audio": {}}
    for stem in [*(f"i-{name}" for name in images), *(f"s-{name}" for name in sounds)]:
        kind = "image" if stem.startswith("i-") else "audio"
        path = demo / ("images" if kind == "image" else "sounds") / f"{stem}.{'webp' if kind == 'image' else 'ogg'}"
        raw = path.read_bytes()
        ids[stem] = item_id(raw)
        buffer = io.BytesIO()
        common: dict[str, Any] = {
            "sha256": sha256_bytes(raw),
            "path": path.name,
            "sources": [path.name],
            "bytes": len(raw),
            "format": "WEBP" if kind == "image" else "OGG",
            "normalizations": [],
            "license": "CC0-1.0",
            "author": None,
            "source": None,
            "text": (words or {}).get(stem[2:]),
            "group_id": ids[stem],
            "holdout": stem in holdout,
        }
        if kind == "image":
            with Image.open(path) as image:
                image.convert("RGB").save(buffer, "PNG")
                size = {"width": image.width, "height": image.height}
            rows[kind].append({"image_id": ids[stem], **common, **size, "num_frames": 1, "phash": "0" * 16})
        else:
            samples, rate = soundfile.read(path, dtype="float32")
            soundfile.write(buffer, samples, rate, format="FLAC", subtype="PCM_16")
            levels = {"lufs": -20.0, "peak_dbfs": float(20 * np.log10(np.abs(samples).max())), "silence_ratio": 0.0}
            seconds = {"sample_rate": rate, "channels": 1, "duration_s": len(samples) / rate, "clipping_ratio": 0.0}
            rows[kind].append({"audio_id": ids[stem], **common, **levels, **seconds})
        payloads[kind][ids[stem]] = buffer.getvalue()
    write_table(layout.catalog / "images.parquet", IMAGES, rows["image"])
    write_table(layout.catalog / "audio.parquet", AUDIO, rows["audio"])
    shards = write_shards(layout.media, "image", payloads["image"], "png")
    write_index(layout.media, shards + write_shards(layout.media, "audio", payloads["audio"], "flac"))
    if assets is not None and not layout.assets.exists():
        layout.assets.parent.mkdir(parents=True, exist_ok=True)
        layout.assets.symlink_to(assets)
    return ids


def write_tiny_images(layout: ProjectPaths, count: int) -> None:
    """Write a catalog of `count` different images of 8 x 8 px and no clip."""
    rows, payloads = [], {}
    for number in range(count):
        pixels = np.full((8, 8, 3), 7, np.uint8)
        pixels[0, 1] = number % 256, number // 256, 0
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        name = item_id(buffer.getvalue())
        payloads[name] = buffer.getvalue()
        rows.append(
            {
                "image_id": name, "sha256": sha256_bytes(payloads[name]), "path": f"{number}.png", "sources": [f"{number}.png"],
                "bytes": len(payloads[name]), "format": "PNG", "normalizations": [], "group_id": name, "holdout": False,
                "width": 8, "height": 8, "num_frames": 1, "phash": "0" * 16,
            }
        )  # fmt: skip
    write_table(layout.catalog / "images.parquet", IMAGES, rows)
    write_index(layout.media, write_shards(layout.media, "image", payloads, "png"))


def bytes_below(folder: Path) -> dict[str, bytes]:
    """Contents of every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
