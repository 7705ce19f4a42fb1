"""Small project for the tests of stage `train`: eight demo images, four demo clips, a small backbone."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
from PIL import Image

from pipeline_steps.core.hashing import item_id
from pipeline_steps.core.media_shards import write_index, write_shards
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import PAIRS
from pipeline_steps.core.tables import write_table


@pytest.fixture(scope="session")
def make_project(demo: Path, assets: Path, backbone: Path) -> Callable[[Path], ProjectPaths]:
    """Write the inputs of the small project below a folder."""
    pictures = sorted((demo / "images").glob("i-t*.webp"))[:8]
    sounds = sorted((demo / "sounds").glob("s-b*.ogg"))[:4]

    def encode_picture(path: Path) -> bytes:
        buffer = io.BytesIO()
        with Image.open(path) as picture:
            picture.convert("RGB").resize((48, 40)).save(buffer, "PNG")
        return buffer.getvalue()

    def encode_sound(path: Path) -> bytes:
        samples, rate = soundfile.read(path, dtype="float32")
        buffer = io.BytesIO()
        soundfile.write(buffer, samples[: 2 * rate], rate, format="FLAC", subtype="PCM_16")
        return buffer.getvalue()

    images = {item_id(path.read_bytes()): encode_picture(path) for path in pictures}
    audio = {item_id(path.read_bytes()): encode_sound(path) for path in sounds}

    def make(root: Path) -> ProjectPaths:
        layout = ProjectPaths(root)
        rows = write_shards(layout.media, "image", images, "png") + write_shards(layout.media, "audio", audio, "flac")
        write_index(layout.media, rows)
        layout.assets.symlink_to(assets)
        (root / "backbone").symlink_to(backbone)
        pairs = []
        for number, image_id in enumerate(sorted(images)):
            audio_id = sorted(audio)[number % 4]
            pairs.append(
                {
                    "pair_id": f"pair-{number}",
                    "image_id": image_id,
                    "tracks": [{"audio_id": audio_id, "phrase": "a sound", "gain_db": 0.0}],
                    "score": 0.5,
                    "z_score": 3.0,
                    "license": None,
                    "image_license": None,
                    "audio_license": None,
                    "image_group": image_id,
                    "audio_group": audio_id,
                    "split": ("train", "train", "train", "val")[number % 4],
                }
            )
        write_table(layout.pairs / "pairs.parquet", PAIRS, pairs)
        return layout

    return make
