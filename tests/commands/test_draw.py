"""`sonify draw`: sounds mixed in a room, sheets of a sweep, one-line errors."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image, ImageFont
from typer.testing import CliRunner, Result

from pipeline_steps.cli import app
from pipeline_steps.commands.audio_scene import SWEEP_GAINS_DB, Room
from pipeline_steps.commands.draw import repeat_option
from pipeline_steps.commands.image_sheet import FONT_SIZE, MARGIN
from pipeline_steps.core.project_paths import ProjectPaths
from tests.factories.cli_project import json_output

PROJECT = Path(__file__).resolve().parents[2]
Draw = Callable[..., Result]


@pytest.fixture
def root(tmp_path: Path, exported_adapter: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Project with a tiny model and two sounds; the current folder."""
    shutil.copy(PROJECT / "params.yaml", tmp_path)
    shutil.copytree(exported_adapter, ProjectPaths(tmp_path).model)
    tone = 0.3 * np.sin(np.arange(44_100) * 0.06)
    soundfile.write(tmp_path / "tone.flac", np.stack([tone] * 2, axis=1), 44_100)
    soundfile.write(tmp_path / "noise.wav", np.random.default_rng(0).normal(0, 0.1, 24_000), 48_000)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def draw(root: Path) -> Draw:
    def call(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["--project", str(root), "draw", *arguments])

    return call


def drawn(result: Result) -> tuple[dict[str, Any], np.ndarray]:
    """JSON and image of a successful call."""
    assert result.exit_code == 0, result.output
    value = json_output(result)
    with Image.open(value["out"]) as image:
        return value, np.asarray(image)


def test_a_sound_gives_a_grid(draw: Draw) -> None:
    images = []
    for seed in ("3", "4"):
        options = ["-o", "a.png", "--seed", seed, "--samples", "3", "--steps", "2", "--guidance", "2", "--json"]
        value, image = drawn(draw("tone.flac", *options))
        assert value["sounds"] == [{"path": "tone.flac", "gain_db": 0.0, "seconds": 1.0}]
        assert (value["guidance_scale"], value["steps"], value["notes"]) == (2.0, 2, [])
        images.append(image)
    assert images[0].shape == (2 * 64 + 2, 2 * 64 + 2, 3)
    assert not np.array_equal(images[0], images[1])


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        (["a", "--gain", "0", "-12", "b"], ["a", "--gain", "0", "--gain", "-12", "b"]),
        (["--gain", "0", "--gain", "-12"], ["--gain", "0", "--gain", "-12"]),
        (["--gain", "0", "-1e1", "--seed", "3", "4"], ["--gain", "0", "--gain", "-1e1", "--seed", "3", "4"]),
        (["--gain=-12", "0", "--gain"], ["--gain=-12", "0", "--gain"]),
    ],
)
def test_gains_follow_their_option(given: list[str], parsed: list[str]) -> None:
    assert list(repeat_option(given, "--gain")) == parsed


def test_mixture_and_room_change_the_images(draw: Draw) -> None:
    common = ["--samples", "1", "--seed", "1", "--json"]
    alone, plain = drawn(draw("tone.flac", *common))
    mixed, mixture = drawn(draw("--gain", "0", "-3", "tone.flac", "noise.wav", *common))
    quiet, nearly = drawn(draw("tone.flac", "noise.wav", "--gain", "0", "-60", *common))
    church, reverberant = drawn(draw("tone.flac", "--room", "church", *common))
    assert [sound["gain_db"] for sound in mixed["sounds"]] == mixed["rows"][0]["gains_db"] == [0.0, -3.0]
    assert np.abs(mixture.astype(int) - plain).max() > 1
    assert np.abs(reverberant.astype(int) - plain).max() > 1
    assert np.abs(nearly.astype(int) - plain).mean() < np.abs(mixture.astype(int) - plain).mean()
    assert mixed["rows"][0]["lufs"] > alone["rows"][0]["lufs"] == quiet["rows"][0]["lufs"]
    assert church["rows"][0]["lufs"] == alone["rows"][0]["lufs"]


def test_a_sweep_is_a_labelled_sheet(draw: Draw) -> None:
    sounds = ["tone.flac", "noise.wav", "--gain", "0", "-6", "--samples", "2", "--json"]
    value, sheet = drawn(draw(*sounds, "--sweep", "room", "--output", "sheet.png"))
    assert [row["label"] for row in value["rows"]] == [room.value for room in Room]
    assert len({row["lufs"] for row in value["rows"]}) == 1
    _, single = drawn(draw(*sounds))
    widest = max(ImageFont.load_default(FONT_SIZE).getlength(room.value) for room in Room)
    left, top = math.ceil(widest) + 2 * MARGIN, FONT_SIZE + 2 * MARGIN
    rows = [sheet[top + 66 * row : top + 66 * row + 64, left : left + 130].astype(int) for row in range(len(Room))]
    assert sheet.shape[0] == top + 66 * len(Room) - 2 + MARGIN
    assert np.abs(rows[0] - single).max() <= 1, "the first row is the scene without a room"
    assert np.abs(rows[3] - single).max() > 1
    gains, _ = drawn(draw(*sounds, "--sweep", "gain"))
    assert [row["gains_db"] for row in gains["rows"]] == [[0.0, gain - 6] for gain in SWEEP_GAINS_DB]
    levels = [row["lufs"] for row in gains["rows"]]
    assert levels == sorted(levels)


def test_notes_on_limiting_and_length(draw: Draw, root: Path) -> None:
    soundfile.write(root / "long.wav", 0.3 * np.sin(np.arange(3 * 48_000) * 0.06), 48_000)
    result = draw("long.wav", "--gain", "20", "--samples", "1")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        "out.png",
        "note: the model uses the first 2 s of the sound",
        "note: the mixture exceeds full scale and is limited; lower gains avoid this",
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["tone.flac", "--gain", "0", "-12"], 2, "--gain has 2 values for 1 sounds"),
        (["tone.flac", "--gain", "nan"], 2, "--gain nan is not between -60 and 24 dB"),
        (["tone.flac", "--gain", "25"], 2, "--gain 25 is not between"),
        (["tone.flac", "--room", "hall", "--sweep", "room"], 2, "leave one of them out"),
        (["tone.flac", "--audio-scale", "0.5"], 2, "give --text"),
        (["tone.flac", "--text", "at night", "--model", "textless"], 2, "no text encoder"),
        (["tone.flac", "--model", "champion"], 2, "nothing was tracked here"),
        (["tone.flac", "missing.wav"], 2, "missing.wav is not a file"),
        (["tone.flac", "text.wav"], 3, "text.wav"),
        (["image.png"], 3, "image.png is an image"),
    ],
)
def test_errors_are_one_line(
    draw: Draw, root: Path, textless_model: Path, arguments: list[str], code: int, message: str
) -> None:
    (root / "textless").symlink_to(textless_model)
    (root / "text.wav").write_text("not a sound")
    Image.new("RGB", (64, 64), "red").save(root / "image.png")
    result = draw(*arguments)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (root / "out.png").exists()
