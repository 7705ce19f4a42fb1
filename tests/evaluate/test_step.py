"""The whole stage on a small world in which colours sound: a source that hears must win, one that is deaf must not."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
from PIL import Image

from pipeline_steps.core.contracts import (
    ABSTAINED,
    AUDIO,
    AUDIO_IDS,
    EVENTS,
    IMAGES,
    NEIGHBOURS,
    PAIRS,
    QUARANTINE,
    TEXT_IDS,
)
from pipeline_steps.core.errors import ConfigError, DataError, IntegrityError
from pipeline_steps.core.identity import item_id, sha256_bytes, text_id
from pipeline_steps.core.layout import Layout
from pipeline_steps.core.media import write_index, write_shards
from pipeline_steps.core.tables import write_table
from pipeline_steps.evaluate.config import Config
from pipeline_steps.evaluate.step import make
from pipeline_steps.tracking.tracker import NullTracker

CLASSES = {"red <b>ball</b>": (200.0, (210, 30, 30)), "green box": (800.0, (20, 170, 40)), "blue bar": (3200.0, (30, 40, 220))}
SPLITS = ("train", "train", "train", "test", "test", "gold")


def tone(hertz: float, number: int) -> npt.NDArray[np.float32]:
    time = np.arange(24_000) / 48_000
    return (0.3 * np.sin(2 * np.pi * hertz * (1 + 0.02 * number) * time)).astype(np.float32)


def shape(colour: Sequence[int], number: int, side: int = 48) -> npt.NDArray[np.uint8]:
    picture = np.full((side, side, 3), 255, np.uint8)
    picture[6 + number : 36 + number, 8:40] = colour
    return picture


class World:
    """Writes everything the stages before leave; the classes differ in colour and pitch."""

    def __init__(self, root: Path, assets: Path) -> None:
        self.layout = Layout(root)
        (root / "data").mkdir()
        (root / "data/assets").symlink_to(assets)
        images, audio, pictures, sounds, manifest, pairs = [], [], {}, {}, [], []
        for label, (hertz, colour) in CLASSES.items():
            for number, split in enumerate(SPLITS):
                image_bytes, sound_bytes = io.BytesIO(), io.BytesIO()
                Image.fromarray(shape(colour, number)).save(image_bytes, "PNG")
                soundfile.write(sound_bytes, tone(hertz, number), 48_000, format="FLAC", subtype="PCM_16")
                image_id, audio_id = item_id(image_bytes.getvalue()), item_id(sound_bytes.getvalue())
                pictures[image_id], sounds[audio_id] = image_bytes.getvalue(), sound_bytes.getvalue()
                name = f"{hertz:.0f}-{number}"
                common = {"bytes": 1, "repaired": [], "licence": "CC0-1.0", "author": '"><svg onload=alert(1)>', "source": None}
                common |= {"holdout": split == "gold"}
                images.append({
                    "image_id": image_id, "sha256": image_id, "path": f"{name}.png", "sources": [f"{name}.png"],
                    "format": "PNG",
                    "group_id": image_id, "width": 48, "height": 48, "frames": 1, "phash": "0" * 16, **common,
                })  # fmt: skip
                audio.append({
                    "audio_id": audio_id, "sha256": audio_id, "path": f"{name}.flac", "sources": [f"{name}.flac"],
                    "format": "FLAC", "group_id": audio_id, "sample_rate": 48_000, "channels": 1, "seconds": 0.5, "lufs": -20.0,
                    "peak_dbfs": -10.0, "silence_share": 0.0, "clipped_share": 0.0, **common,
                })  # fmt: skip
                pair = f"gold {name}" if split == "gold" else ""
                manifest += [f'image,{name}.png,"{label}",{split},{pair}', f'sound,{name}.flac,"{label}",{split},{pair}']
                if split != "gold":
                    pairs.append({
                        "pair_id": text_id(name), "image_id": image_id, "score": 0.5, "z": 5.0 + number, "licence": "CC0-1.0",
                        "tracks": [{"audio_id": audio_id, "sound": f"a {label}", "gain_db": 0.0}], "licence_image": "CC0-1.0",
                        "licence_audio": "CC0-1.0", "image_group": image_id, "audio_group": audio_id, "split": split,
                    })  # fmt: skip
        self._write(images, audio, pictures, sounds, manifest, pairs)

    def _write(
        self, images: list[Any], audio: list[Any], pictures: Any, sounds: Any, manifest: list[str], pairs: list[Any]
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
            write_shards(layout.media, "image", pictures, "png") + write_shards(layout.media, "audio", sounds, "flac"),
        )
        phrases = {text_id(f"a {label}"): f"a {label}" for label in CLASSES}
        label_of = dict(line.split(",")[1:3] for line in manifest)
        events = [
            {
                "image_id": row["image_id"], "rank": 0, "text_id": text_id(f"a {label_of[row['path']].strip(chr(34))}"),
                "sound": f"a {label_of[row['path']].strip(chr(34))}", "source": "javascript:alert(1)", "visible": True,
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
            [{"row": row, "text_id": key, "sound": phrases[key]} for row, key in enumerate(text_ids)],
        )
        ids = [{"row": place, "audio_id": row["audio_id"]} for place, row in enumerate(rows)]
        write_table(layout.embeddings / "audio_ids.parquet", AUDIO_IDS, ids)
        near = {"score": 0.5, "z": 2.0, "damped": 0.4, "rank": 0, "audio_id": pairs[0]["tracks"][0]["audio_id"]}
        write_table(layout.retrieval / "neighbours.parquet", NEIGHBOURS, [{"text_id": key, **near} for key in text_ids])


class Painter:
    """Draws the colour of the pitch it hears, or (deaf) what its noise says."""

    side, sample_rate_hz, guidance_scale, steps = 48, 16_000, 1.0, 1

    def __init__(self, deaf: bool = False, families: frozenset[str] = frozenset({"yamnet"})) -> None:
        self.deaf, self.families = deaf, families

    def draw(self, sounds: Sequence[npt.NDArray[np.float32]], samples: int, seed: int) -> npt.NDArray[np.uint8]:
        rng = np.random.default_rng(seed)
        pictures = []
        for sound in sounds:
            hertz = float(np.abs(np.fft.rfft(sound)).argmax()) * 48_000 / len(sound)
            colours = [colour for pitch, colour in CLASSES.values() if self.deaf or abs(hertz / pitch - 1) < 0.5]
            if self.deaf:  # the same noise gives the same picture, whatever is played
                rng = np.random.default_rng(seed)
            drawn = np.stack([shape(colours[rng.integers(len(colours))], int(rng.integers(6))) for _ in range(samples)])
            noise = rng.integers(0, 12, drawn.shape)
            pictures.append(np.clip(drawn.astype(int) - noise, 0, 255).astype(np.uint8))
        return np.stack(pictures)

    def unconditional(self, count: int, seed: int) -> npt.NDArray[np.uint8]:
        return Painter(deaf=True).draw([tone(200.0, 0)], count, seed)[0]


CONFIG = Config(
    gold="gold.csv",
    samples_per_sound=2,
    unconditional_samples=4,
    picture_judges=["augnet"],
    density_neighbours=2,
    bootstrap_repeats=200,
    sensitivity_sounds=2,
    sensitivity_gains_db=[-12.0],
    judge_shrinkage=1.0,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> World:
    return World(tmp_path_factory.mktemp("world"), assets)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def evaluated(world: World) -> dict[str, bytes]:
    report = make(CONFIG, world.layout, Painter(), NullTracker())
    report.check_balance()
    assert report.n_in == 6 + 3
    return files(world.layout.reports)


def test_who_hears_wins_and_the_controls_do_not(evaluated: dict[str, bytes]) -> None:
    found = json.loads(evaluated["evaluation.json"])
    rows = found["test"]["rows"]
    assert rows["model"]["win_rate_augnet"]["value"] > 0.9
    assert rows["shuffled_audio"]["win_rate_augnet"]["value"] < 0.6
    assert rows["ground_truth"]["win_rate_augnet"]["value"] > 0.9
    assert rows["text_oracle"]["applicable"] is False
    assert found["test"]["too_small_to_rank"] is True
    assert found["gold"]["n_pairs"] == found["gold_seen"]["n_pairs"] == 3
    entry = rows["model"]["kid_augnet"]
    assert set(entry) >= {"value", "low", "high", "n", "clusters", "judge", "seed", "sample_rate_hz", "n_real"}
    assert found["retrieval"]["rows"]["pipeline"]["recall_at_10"]["value"] == 1.0  # three times six sounds, own class first
    assert found["sensitivity"]["gain_-12_db"]["value"] < found["sensitivity"]["other_sound"]["value"]
    assert any("independent sounds" in warning for warning in found["warnings"])


def test_the_report_is_whole_safe_and_the_same_twice(world: World, evaluated: dict[str, bytes]) -> None:
    page = evaluated["index.html"].decode()
    for attack in ("<script>", "<svg onload", "<b>ball</b>"):
        assert attack not in page
    assert "&lt;b&gt;ball&lt;/b&gt;" in page
    assert "{{7*7}}" in page
    for name in evaluated:
        if name.startswith(("samples/picture", "audio/")):
            assert f'src="{name}"' in page
    assert str(world.layout.root) not in page
    make(CONFIG, world.layout, Painter(), NullTracker())
    assert files(world.layout.reports) == evaluated


def test_a_deaf_model_is_found_out(world: World, evaluated: dict[str, bytes], tmp_path: Path) -> None:
    elsewhere = Elsewhere(world.layout.root, tmp_path)
    config = CONFIG.model_copy(update={"sensitivity_sounds": 0, "samples_per_sound": 8, "memo": str(world.layout.memo)})
    make(config, elsewhere, Painter(deaf=True), NullTracker())
    found = json.loads((tmp_path / "evaluation.json").read_text())["test"]["rows"]["model"]
    assert found["win_rate_augnet"]["value"] == pytest.approx(0.5, abs=0.02)
    assert found["ais_winrate_aisfx_augnet"]["value"] == pytest.approx(0.5, abs=0.02)


class Elsewhere(Layout):
    """The same inputs, reports in another folder."""

    def __init__(self, root: Path, reports: Path) -> None:
        super().__init__(root)
        object.__setattr__(self, "_reports", reports)

    @property
    def reports(self) -> Path:
        return Path(self.__dict__["_reports"])


def test_a_judge_that_took_part_is_refused_or_flagged(world: World, evaluated: dict[str, bytes]) -> None:
    with pytest.raises(ConfigError, match="augnet is of family augnet, which also took part in model"):
        make(CONFIG, world.layout, Painter(families=frozenset({"augnet"})), NullTracker())


def test_damaged_or_missing_inputs_are_named(world: World, evaluated: dict[str, bytes]) -> None:
    with pytest.raises(DataError, match=r"nowhere\.csv is missing"):
        make(CONFIG.model_copy(update={"gold": "nowhere.csv"}), world.layout, Painter(), NullTracker())
    path = world.layout.embeddings / "text.npy"
    kept = path.read_bytes()
    path.write_bytes(kept[:-4] + b"\0\0\0\1")
    try:
        with pytest.raises(IntegrityError, match=r"text\.npy: not the bytes"):
            make(CONFIG, world.layout, Painter(), NullTracker())
    finally:
        path.write_bytes(kept)
