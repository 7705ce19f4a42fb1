"""Synthetic data set whose classes differ in color and pitch, and generators that use audio or text."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
from PIL import Image

from pipeline_steps.core.hashing import item_id, sha256_bytes, text_id
from pipeline_steps.core.media_shards import write_index, write_shards
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import ABSTAINED, AUDIO, AUDIO_IDS, EVENTS, IMAGES, NEIGHBORS, PAIRS, QUARANTINE, TEXT_IDS
from pipeline_steps.core.tables import write_table
from pipeline_steps.evaluate.config import AbilitiesConfig, EvaluateConfig, GainSensitivityConfig

CLASSES = {"red <b>ball</b>": (200.0, (210, 30, 30)), "green box": (800.0, (20, 170, 40)), "blue bar": (3200.0, (30, 40, 220))}
SPLITS = ("train", "train", "train", "test", "test", "gold")


def tone(hertz: float, number: int) -> npt.NDArray[np.float32]:
    time = np.arange(24_000) / 48_000
    return (0.3 * np.sin(2 * np.pi * hertz * (1 + 0.02 * number) * time)).astype(np.float32)


def shape(color: Sequence[int], number: int, side: int = 48) -> npt.NDArray[np.uint8]:
    image = np.full((side, side, 3), 255, np.uint8)
    image[6 + number : 36 + number, 8:40] = color
    return image


class SyntheticDataset:
    """Writes the outputs of all stages before `evaluate`; the classes differ in color and pitch."""

    def __init__(self, root: Path, assets: Path) -> None:
        self.layout = ProjectPaths(root)
        (root / "data").mkdir()
        (root / "data/assets").symlink_to(assets)
        images, audio, image_files, audio_files, manifest, pairs = [], [], {}, {}, [], []
        for label, (hertz, color) in CLASSES.items():
            for number, split in enumerate(SPLITS):
                image_bytes, sound_bytes = io.BytesIO(), io.BytesIO()
                Image.fromarray(shape(color, number)).save(image_bytes, "PNG")
                soundfile.write(sound_bytes, tone(hertz, number), 48_000, format="FLAC", subtype="PCM_16")
                image_id, audio_id = item_id(image_bytes.getvalue()), item_id(sound_bytes.getvalue())
                image_files[image_id], audio_files[audio_id] = image_bytes.getvalue(), sound_bytes.getvalue()
                name = f"{hertz:.0f}-{number}"
                common = {
                    "bytes": 1,
                    "normalizations": [],
                    "license": "CC0-1.0",
                    "author": '"><svg onload=alert(1)>',
                    "source": None,
                }
                common |= {"holdout": split == "gold"}
                images.append({
                    "image_id": image_id, "sha256": image_id, "path": f"{name}.png", "sources": [f"{name}.png"],
                    "format": "PNG",
                    "group_id": image_id, "width": 48, "height": 48, "num_frames": 1, "phash": "0" * 16, **common,
                })  # fmt: skip
                audio.append({
                    "audio_id": audio_id, "sha256": audio_id, "path": f"{name}.flac", "sources": [f"{name}.flac"],
                    "format": "FLAC", "group_id": audio_id, "sample_rate": 48_000, "channels": 1,
                    "duration_s": 0.5, "lufs": -20.0,
                    "peak_dbfs": -10.0, "silence_ratio": 0.0, "clipping_ratio": 0.0, **common,
                })  # fmt: skip
                pair = f"gold {name}" if split == "gold" else ""
                manifest += [f'image,{name}.png,"{label}",{split},{pair}', f'sound,{name}.flac,"{label}",{split},{pair}']
                if split != "gold":
                    pairs.append({
                        "pair_id": text_id(name), "image_id": image_id, "score": 0.5, "z_score": 5.0 + number,
                        "license": "CC0-1.0",
                        "tracks": [{"audio_id": audio_id, "phrase": f"a {label}", "gain_db": 0.0}], "image_license": "CC0-1.0",
                        "audio_license": "CC0-1.0", "image_group": image_id, "audio_group": audio_id, "split": split,
                    })  # fmt: skip
        self._write(images, audio, image_files, audio_files, manifest, pairs)

    def _write(
        self, images: list[Any], audio: list[Any], image_files: Any, audio_files: Any, manifest: list[str], pairs: list[Any]
    ) -> None:
        layout = self.layout
        (layout.root / "gold.csv").write_text("\n".join(["kind,file,label,split,pair", *manifest]) + "\n")
        write_table(layout.catalog / "images.parquet", IMAGES, images)
        write_table(layout.catalog / "audio.parquet", AUDIO, audio)
        dropped = {
            "item_id": "0" * 32, "kind": "image", "path": "<script>alert(1)</script>.png", "bytes": 3, "stage": "ingest",
            "code": "IMG_TRUNCATED", "reason": "{{7*7}}", "decoder": "pillow", "action": "dropped", "retryable": False,
        }  # fmt: skip
        for folder, rows in ((layout.catalog, [dropped]), (layout.captions, []), (layout.embeddings, [])):
            write_table(folder / "quarantine.parquet", QUARANTINE, rows)
        write_index(
            layout.media,
            write_shards(layout.media, "image", image_files, "png") + write_shards(layout.media, "audio", audio_files, "flac"),
        )
        phrases = {text_id(f"a {label}"): f"a {label}" for label in CLASSES}
        label_of = dict(line.split(",")[1:3] for line in manifest)
        events = [
            {
                "image_id": row["image_id"], "rank": 0, "text_id": text_id(f"a {label_of[row['path']].strip(chr(34))}"),
                "phrase": f"a {label_of[row['path']].strip(chr(34))}", "sound_source": "javascript:alert(1)", "visible": True,
                "salience": 1.0, "confidence": 0.9,
            }
            for row in images
        ]  # fmt: skip
        write_table(layout.captions / "events.parquet", EVENTS, events)
        write_table(layout.captions / "abstained.parquet", ABSTAINED, [])
        write_table(layout.pairs / "abstained.parquet", ABSTAINED, [])
        write_table(layout.pairs / "pairs.parquet", PAIRS, pairs)
        (layout.pairs / "stats.json").write_text(json.dumps({"leaks": {"picture": 0}}))
        (layout.captions / "meta.json").write_text(json.dumps({"families": ["efficientnet"]}))
        names = list(CLASSES)
        text_ids = sorted(phrases)
        texts = np.eye(3, dtype=np.float32)[[names.index(phrases[key][2:]) for key in text_ids]]
        rows = sorted(audio, key=lambda row: row["audio_id"])
        vectors = np.eye(3, dtype=np.float32)[[names.index(label_of[row["path"]].strip('"')) for row in rows]]
        meta: dict[str, Any] = {"space": "toy", "families": ["yamnet", "minilm"], "sha256": {}}
        for name, values in (("text.npy", texts), ("audio.npy", vectors)):
            np.save(layout.embeddings / name, values)
            meta["sha256"][name] = sha256_bytes((layout.embeddings / name).read_bytes())
        (layout.embeddings / "meta.json").write_text(json.dumps(meta))
        write_table(
            layout.embeddings / "text_ids.parquet",
            TEXT_IDS,
            [{"row": row, "text_id": key, "phrase": phrases[key]} for row, key in enumerate(text_ids)],
        )
        ids = [{"row": place, "audio_id": row["audio_id"]} for place, row in enumerate(rows)]
        write_table(layout.embeddings / "audio_ids.parquet", AUDIO_IDS, ids)
        near = {"score": 0.5, "z_score": 2.0, "corrected_score": 0.4, "rank": 0, "audio_id": pairs[0]["tracks"][0]["audio_id"]}
        write_table(layout.retrieval / "neighbors.parquet", NEIGHBORS, [{"text_id": key, **near} for key in text_ids])


class ColorGenerator:
    """Generates the color of the pitch of each clip, or (`ignores_audio`) a random color."""

    resolution, sample_rate_hz, guidance_scale, num_inference_steps = 48, 16_000, 1.0, 1
    has_text_encoder = False

    def __init__(self, ignores_audio: bool = False, families: frozenset[str] = frozenset({"yamnet"})) -> None:
        self.ignores_audio, self.families = ignores_audio, families

    def generate(self, clips: Sequence[npt.NDArray[np.float32]], num_samples: int, seed: int) -> npt.NDArray[np.uint8]:
        rng = np.random.default_rng(seed)
        images = []
        for clip in clips:
            hertz = float(np.abs(np.fft.rfft(clip)).argmax()) * 48_000 / len(clip)
            colors = [color for pitch, color in CLASSES.values() if self.ignores_audio or abs(hertz / pitch - 1) < 0.5]
            if self.ignores_audio:  # the same noise gives the same image for every clip
                rng = np.random.default_rng(seed)
            shapes = np.stack([shape(colors[rng.integers(len(colors))], int(rng.integers(6))) for _ in range(num_samples)])
            noise = rng.integers(0, 12, shapes.shape)
            images.append(np.clip(shapes.astype(int) - noise, 0, 255).astype(np.uint8))
        return np.stack(images)

    def generate_unconditional(self, count: int, seed: int) -> npt.NDArray[np.uint8]:
        return ColorGenerator(ignores_audio=True).generate([tone(200.0, 0)], count, seed)[0]


class TextColorGenerator(ColorGenerator):
    """A generator with a text encoder: generates the color whose name the text contains."""

    has_text_encoder = True

    def generate_from_text(self, texts: Sequence[str], num_samples: int, seed: int) -> npt.NDArray[np.uint8]:
        images = []
        for text in texts:
            pitch = next((hertz for label, (hertz, _) in CLASSES.items() if label in text), 200.0)
            images.append(ColorGenerator().generate([tone(pitch, 0)], num_samples, seed)[0])
        return np.stack(images)


class OtherReports(ProjectPaths):
    """Paths of a project with its reports in another folder."""

    def __init__(self, root: Path, reports: Path) -> None:
        super().__init__(root)
        object.__setattr__(self, "_reports", reports)

    @property
    def reports(self) -> Path:
        return Path(self.__dict__["_reports"])


CONFIG = EvaluateConfig(
    ground_truth="gold.csv",
    samples_per_audio=2,
    unconditional_samples=4,
    image_judges=["augnet"],
    density_k=2,
    num_bootstrap=200,
    gain_sensitivity=GainSensitivityConfig(num_clips=2, gains_db=[-12.0]),
    judge_shrinkage=1.0,
    abilities=AbilitiesConfig(names=[]),
)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
