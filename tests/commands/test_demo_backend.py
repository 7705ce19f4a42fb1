"""Computations of the demo page: drawing at true level, limits, models of the registry, sounds for an image."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from pipeline_steps.commands import demo_backend
from pipeline_steps.commands.audio_scene import Room
from pipeline_steps.commands.demo_backend import DemoBackend, Drawing
from pipeline_steps.commands.draw import load_audio
from pipeline_steps.commands.scene_generation import GenerationSettings
from pipeline_steps.core.errors import ConfigError, DataError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.diffusion.pipelines.safetensors_io import INDEX
from tests.factories.registered_models import register

RATE = 48_000


@pytest.fixture(scope="module")
def backend(page_project: Path) -> Iterator[DemoBackend]:
    with DemoBackend(ProjectPaths(page_project)) as opened:
        yield opened


@pytest.fixture
def tone(tmp_path: Path) -> Path:
    """Two seconds at 26 dB below full scale."""
    path = tmp_path / "tone.wav"
    soundfile.write(path, 0.05 * np.sin(np.arange(2 * RATE) * 0.06), RATE)
    return path


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    path = tmp_path / "noise.flac"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, RATE), RATE)
    return path


def played_samples(drawing: Drawing) -> np.ndarray:
    samples, rate = soundfile.read(io.BytesIO(drawing.mixture), dtype="float32")
    assert rate == RATE
    return samples


def test_four_images_and_the_mixture_at_its_own_level(backend: DemoBackend, page_project: Path, tone: Path) -> None:
    drawing = backend.draw([(tone, -6.0)], Room.NONE, GenerationSettings(seed=3))
    assert drawing.images.shape == (4, 64, 64, 3)
    assert drawing.label == "tone.wav -6 dB, seed 3"
    assert drawing.notes == ()
    expected = 10 ** (-6 / 20) * load_audio(ProjectPaths(page_project), tone)
    np.testing.assert_allclose(played_samples(drawing), expected, atol=2 / 2**15)
    again = backend.draw([(tone, -6.0)], Room.NONE, GenerationSettings(seed=3))
    assert np.array_equal(drawing.images, again.images)


def test_second_sound_room_and_words_change_images_and_label(backend: DemoBackend, tone: Path, noise: Path) -> None:
    alone = backend.draw([(tone, 0.0)], Room.NONE, GenerationSettings())
    mixed = backend.draw([(tone, 0.0), (noise, -3.0)], Room.NONE, GenerationSettings())
    room = backend.draw([(tone, 0.0)], Room.CHURCH, GenerationSettings())
    words = backend.draw([(tone, 0.0)], Room.NONE, GenerationSettings(text="at night"))
    assert [drawing.label for drawing in (mixed, room, words)] == [
        "tone.wav 0 dB + noise.flac -3 dB, seed 0",
        "tone.wav 0 dB, church, seed 0",
        'tone.wav 0 dB, "at night", seed 0',
    ]
    for other in (mixed, room, words):
        assert np.abs(other.images.astype(int) - alone.images).max() > 1
    loud = backend.draw([(tone, 0.0), (noise, 20.0)], Room.NONE, GenerationSettings())
    assert loud.notes == ("the mixture exceeds full scale and is limited; lower gains avoid this",)


@pytest.mark.parametrize(
    ("gain", "settings", "message"),
    [
        (float("nan"), GenerationSettings(), "the gain is nan -> choose a value between -60 and 24"),
        (25.0, GenerationSettings(), "the gain is 25"),
        (0.0, GenerationSettings(seed=-1), "the seed is -1"),
        (0.0, GenerationSettings(guidance_scale=1e9), "the guidance scale is 1e"),
        (0.0, GenerationSettings(text="x", audio_scale=-1.0), "the weight of the sound is -1"),
        (0.0, GenerationSettings(text="x" * 301), "301 characters"),
    ],
)
def test_values_out_of_range(backend: DemoBackend, tone: Path, gain: float, settings: GenerationSettings, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        backend.draw([(tone, gain)], Room.NONE, settings)
    assert message in str(caught.value)


def test_unusable_files_are_named_without_their_folder(
    backend: DemoBackend, tone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.wav").write_text("not a sound")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "image.png")
    for name, message in (("text.wav", "AUD_CORRUPT"), ("image.png", "is an image")):
        with pytest.raises(DataError, match=message) as caught:
            backend.draw([(tmp_path / name, 0.0)], Room.NONE, GenerationSettings())
        assert str(caught.value).startswith(name)
        assert str(tmp_path) not in str(caught.value)
    monkeypatch.setattr(demo_backend, "MAX_SECONDS", 1.0)
    with pytest.raises(DataError, match=r"tone.wav has 2.0 s -> use at most 1 s"):
        backend.draw([(tone, 0.0)], Room.NONE, GenerationSettings())
    monkeypatch.undo()
    assert len(backend.draw([(tone, 0.0)], Room.NONE, GenerationSettings()).images) == 4, "the decoding process still works"


def test_one_decoding_process_serves_all_files(backend: DemoBackend, tone: Path, noise: Path) -> None:
    backend.draw([(tone, 0.0)], Room.NONE, GenerationSettings())
    pool = backend._workers._pool
    backend.draw([(tone, 0.0), (noise, 0.0)], Room.NONE, GenerationSettings())
    assert pool is not None
    assert backend._workers._pool is pool


def test_an_image_suggests_sounds(backend: DemoBackend, page_project: Path, noise: Path) -> None:
    pixels, found = backend.find(page_project / "data/demo/images/i-dog-000.webp")
    assert pixels.shape[2] == 3
    assert "dog" in found.events[0]["phrase"]
    assert Path(found.clips[0]["path"]).name.startswith("s-dog-")
    assert found.clips[0]["because"] == found.events[0]["phrase"]
    samples, rate = soundfile.read(io.BytesIO(backend.audio_file(found.clips[0]["audio_id"])))
    assert len(samples) / rate == pytest.approx(found.clips[0]["duration_s"], abs=0.1)
    with pytest.raises(DataError, match=r"noise.flac is a sound -> drop sounds on the other tab"):
        backend.find(noise)


def test_examples_are_held_out_items(backend: DemoBackend, tmp_path: Path) -> None:
    assert list(backend.examples("audio").values()) == ["s-badger-000"]
    assert list(backend.examples("image").values()) == ["i-badger-000", "i-dog-000"]
    samples, rate = soundfile.read(io.BytesIO(backend.payload(next(iter(backend.examples("audio"))))))
    assert (samples.ndim, rate) == (1, RATE)
    assert DemoBackend(ProjectPaths(tmp_path)).examples("audio") == {}


def test_models_are_the_projects_and_the_registrys(layout: ProjectPaths, sqlite: None) -> None:
    backend = DemoBackend(layout)
    assert backend.models() == {"models/audio2image": None}
    register(layout, [0.5, 0.5], version=1)
    register(layout, [0.6, 0.6], version=2)
    assert backend.models() == {"models/audio2image": None, "version 2 @challenger": "2", "version 1": "1"}
    assert next(iter(DemoBackend(layout, "challenger").models().items())) == ("challenger", "challenger")


def test_a_replaced_model_is_loaded_again_and_few_are_kept(
    tmp_path: Path, exported_adapter: Path, textless_model: Path
) -> None:
    backend = DemoBackend(ProjectPaths(tmp_path))
    with pytest.raises(ConfigError, match="there is no trained model -> sonify run train"):
        backend.pipeline(None)
    folder = ProjectPaths(tmp_path).model
    shutil.copytree(exported_adapter, folder)
    first = backend.pipeline(None)
    assert backend.pipeline(None) is first
    assert first.has_text_encoder
    shutil.rmtree(folder)
    shutil.copytree(textless_model, folder)
    os.utime(folder / INDEX, ns=(1, 1))
    assert not backend.pipeline(None).has_text_encoder
    backend.pipeline(str(textless_model))
    assert len(backend._loaded) == demo_backend.MAX_LOADED_MODELS
