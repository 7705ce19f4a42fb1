"""Python interface: light import, scripts without a main guard, files and arrays, pairs in three forms, clear errors."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pipeline_steps import Audio2ImagePipeline, embed_sounds, find_sounds, load_pairs
from pipeline_steps.core.errors import ConfigError, DataError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.pair.stage import PairConfig, run
from tests.pair.conftest import dataset, empty_dataset, settings
from tests.pair.synthetic_tables import SyntheticDataset

__all__ = ["dataset", "empty_dataset", "settings"]

PROJECT = Path(__file__).resolve().parents[1]
TONE = (0.3 * np.sin(np.arange(48_000) * 0.06)).astype(np.float32)

SCRIPT = """
import sys
print("started")
from pipeline_steps import Audio2ImagePipeline, embed_sounds

model = Audio2ImagePipeline.from_pretrained(sys.argv[1], device="cpu")
for image in model(sys.argv[2], num_samples=2):
    print(image.size)
try:
    embed_sounds([sys.argv[2], sys.argv[3]], project=sys.argv[4])
except Exception as error:
    print(type(error).__name__, error)
"""


def in_python(*arguments: str, cwd: Path = PROJECT) -> str:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light() -> None:
    code = (
        "import sys, pipeline_steps\n"
        "assert 'numpy' not in sys.modules\n"
        "from pipeline_steps import Audio2ImagePipeline, find_sounds, embed_sounds, load_pairs\n"
        "assert not {'torch', 'mlflow', 'diffusers', 'transformers', 'datasets', 'pandas'} & set(sys.modules)\n"
        "assert 'load_pairs' in dir(pipeline_steps)\n"
    )
    in_python("-c", code)
    with pytest.raises(ImportError, match="cannot import name 'load_pear'"):
        from pipeline_steps import load_pear  # type: ignore[attr-defined]  # noqa: F401


def test_a_script_without_a_main_guard_runs_once(exported_model: Path, demo: Path, tmp_path: Path) -> None:
    """Decoding processes must not import the script: it would start again in each of them."""
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT)
    (tmp_path / "bad.wav").write_bytes(b"RIFF\x00\x00\x00\x00WAVEfmt ")
    (tmp_path / "params.yaml").write_text((PROJECT / "params.yaml").read_text())
    said = in_python(
        str(script),
        str(exported_model),
        str(demo / "sounds/s-dog-000.ogg"),
        str(tmp_path / "bad.wav"),
        str(tmp_path),
        cwd=tmp_path,
    ).splitlines()
    assert said[:3] == ["started", "(32, 32)", "(32, 32)"]
    assert said[3].startswith("DataError")
    assert "bad.wav: AUD_" in said[3]
    assert len(said) == 4


def test_a_file_and_its_samples_give_the_same_images(exported_model: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "tone.wav", np.stack([TONE, TONE], 1), 48_000, subtype="FLOAT")
    model = Audio2ImagePipeline.from_pretrained(exported_model, device="cpu")
    from_file = np.asarray(model(str(tmp_path / "tone.wav"), seed=3)[0], np.float32)
    samples, rate = soundfile.read(tmp_path / "tone.wav")
    from_array = np.asarray(model(samples, rate, seed=3)[0], np.float32)
    as_integers = np.asarray(model(np.round(TONE * 32768).astype(np.int16), 48_000, seed=3)[0], np.float32)
    assert np.abs(from_file - from_array).max() <= 3, "files are stored with 16 bits"
    assert np.abs(as_integers - from_array).max() <= 3
    resampled = np.asarray(model(TONE[::2], 24_000, seed=3)[0], np.float32)
    assert np.abs(resampled - from_array).mean() < np.abs(np.asarray(model(TONE, 24_000, seed=3)[0]) - from_array).mean()
    assert [image.size for image in model(TONE, 48_000, num_samples=3)] == [(32, 32)] * 3


@pytest.mark.parametrize(
    ("samples", "rate", "kind", "message"),
    [
        (TONE, None, ConfigError, "no sampling rate"),
        (TONE, 10, ConfigError, "not between 1,000 and 1,000,000"),
        (TONE[:0], 48_000, DataError, "the shape \\[0\\]"),
        (np.stack([TONE, TONE]), 48_000, DataError, r"the shape \[2, 48000\]"),
        (np.full(100, np.nan), 48_000, DataError, "NaN"),
        (np.zeros(100, np.uint8), 48_000, DataError, "uint8"),
        ("no.wav", None, ConfigError, r"no\.wav is not a file"),
    ],
)
def test_sounds_that_cannot_be_used(
    exported_model: Path, samples: np.ndarray | str, rate: int | None, kind: type[Exception], message: str
) -> None:
    model = Audio2ImagePipeline.from_pretrained(exported_model, device="cpu")
    with pytest.raises(kind, match=message):
        model(samples, rate)


def test_models_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no trained model"):
        Audio2ImagePipeline.from_pretrained(project=tmp_path)
    with pytest.raises(ConfigError, match="nothing was tracked here"):
        Audio2ImagePipeline.from_pretrained("champion", project=tmp_path)
    with pytest.raises(ConfigError, match="is not a folder"):
        embed_sounds(TONE, 48_000, project=tmp_path / "none")


def test_images_that_cannot_be_used(tmp_path: Path, demo: Path) -> None:
    with pytest.raises(ConfigError, match=r"the image is float64 \[8, 8\]"):
        find_sounds(np.zeros((8, 8)), project=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="is an audio file"):
        find_sounds(demo / "sounds/s-dog-000.ogg", project=tmp_path)


@pytest.fixture
def paired(dataset: SyntheticDataset, settings: Callable[..., PairConfig]) -> ProjectPaths:
    layout = dataset.write()
    run(settings(), layout)
    return layout


def test_pairs_as_a_sequence_and_a_data_frame(paired: ProjectPaths) -> None:
    pairs = load_pairs(project=paired.root)
    frame = pairs.to_pandas()
    assert len(frame) == len(pairs) > 20
    assert set(frame["split"]) == {"train", "val", "test"}
    row = frame.iloc[3]
    item = pairs[3]
    assert (item["pair_id"], item["phrase"]) == (row["pair_id"], row["phrase"])
    assert item["image"].shape == (16, 16, 3)
    assert (item["audio"].shape, item["sampling_rate"]) == ((2400,), 48_000)
    assert frame["image_path"].notna().all()
    assert frame["audio_path"].notna().all()
    assert len(load_pairs("test", project=paired.root)) == (frame["split"] == "test").sum()
    assert [found["pair_id"] for found in pairs[:2]] == list(frame["pair_id"][:2])
    with pytest.raises(ConfigError, match="no split 'tset' -> did you mean test"):
        load_pairs("tset", project=paired.root)


def test_pairs_as_torch_and_datasets(paired: ProjectPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import torch

    pairs = load_pairs("train", project=paired.root)
    loaded = pairs.to_torch()
    assert isinstance(loaded, torch.utils.data.Dataset)
    batch = next(iter(torch.utils.data.DataLoader(loaded, batch_size=4, num_workers=2)))
    assert (batch["image"].dtype, batch["image"].shape) == (torch.uint8, (4, 3, 16, 16))
    assert batch["audio"].shape == (4, 2400)
    assert torch.equal(batch["image"][1].permute(1, 2, 0), torch.from_numpy(pairs[1]["image"].copy()))
    table = pairs.to_datasets()
    assert len(table) == len(pairs)
    assert table.features["audio"] == datasets.Audio(sampling_rate=48_000)
    undecoded = table.cast_column("audio", datasets.Audio(decode=False))[1]
    assert np.array_equal(np.asarray(undecoded["image"].convert("RGB")), pairs[1]["image"])
    assert np.array_equal(soundfile.read(io.BytesIO(undecoded["audio"]["bytes"]), dtype="float32")[0], pairs[1]["audio"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"package datasets is not installed -> pip install 'seeing-sound\[datasets\]'"):
        pairs.to_datasets()
