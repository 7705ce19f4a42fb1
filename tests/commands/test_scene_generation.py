"""Images of scenes by real tiny models, with and without a text encoder, chosen by folder or version."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline_steps import tracking
from pipeline_steps.commands.scene_generation import MAX_TEXT_LENGTH, GenerationSettings, generate_images, model_folder
from pipeline_steps.core.errors import ConfigError, DataError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.diffusion.pipelines.auto import AutoAudio2ImagePipeline
from pipeline_steps.diffusion.pipelines.base import AudioConditionedPipeline
from pipeline_steps.diffusion.pipelines.ip_adapter import MODELS_VARIABLE
from pipeline_steps.tracking.client.uploader import sync
from pipeline_steps.tracking.lineage.dvc_digests import hash_path
from tests.tracking.helpers import Config

TONE = (0.3 * np.sin(np.arange(48_000) / 20)).astype(np.float32)
NOISE = (0.2 * np.random.default_rng(1).standard_normal(48_000)).astype(np.float32)


@pytest.fixture(scope="module")
def adapter(exported_adapter: Path) -> AudioConditionedPipeline:
    return AutoAudio2ImagePipeline.from_pretrained(exported_adapter, "cpu")


def test_scenes_are_drawn_by_the_pipeline(adapter: AudioConditionedPipeline) -> None:
    images = generate_images(adapter, [TONE, NOISE], GenerationSettings(2, 3, 2.0, 2))
    assert images.shape == (2, 2, 64, 64, 3)
    for clip, row in zip((TONE, NOISE), images, strict=True):
        expected = adapter(clip, num_samples=2, seed=3, guidance_scale=2.0, num_inference_steps=2)
        assert np.abs(row.astype(int) - expected).max() <= 1
    assert not np.array_equal(images[0], images[1])


def test_one_known_track_changes_nothing_and_two_are_encoded_as_a_mixture(adapter: AudioConditionedPipeline) -> None:
    settings, mixture = GenerationSettings(1, 3, 2.0, 2), TONE + NOISE
    plain = generate_images(adapter, [mixture], settings)
    assert np.array_equal(generate_images(adapter, [mixture], settings, [[mixture]]), plain)
    named = generate_images(adapter, [mixture], settings, [[TONE, NOISE]])
    expected = adapter.generate_batch([adapter.encode_mixture(mixture, [TONE, NOISE])], 1, 3, 2.0, 2)
    assert np.array_equal(named, expected)


def test_a_text_beside_the_audio_has_its_weight(adapter: AudioConditionedPipeline) -> None:
    def beside(text: str | None, scale: float = 0.5) -> np.ndarray:
        return generate_images(adapter, [TONE], GenerationSettings(1, 2, text=text, audio_scale=scale))[0].astype(int)

    text_alone, audio_alone = adapter.generate_from_text(["a dog barks"], 1, seed=2)[0], adapter(TONE, 1, seed=2)
    assert np.abs(beside(" a dog barks\n", 0.0) - text_alone).max() <= 1
    assert np.abs(beside("a dog barks", 1.0) - audio_alone).max() <= 1
    assert np.abs(beside(None) - audio_alone).max() <= 1
    assert not np.array_equal(beside("a dog barks"), beside("rain on a roof"))
    assert np.abs(beside("a dog barks") - audio_alone).max() > 1
    assert np.abs(beside("a dog barks") - text_alone).max() > 1


@pytest.mark.parametrize("text", ["", "  ", "x" * (MAX_TEXT_LENGTH + 1)])
def test_a_text_has_a_length(adapter: AudioConditionedPipeline, text: str) -> None:
    with pytest.raises(ConfigError, match=f"has {len(text)} characters"):
        generate_images(adapter, [TONE], GenerationSettings(text=text))


def test_a_model_without_text_encoder_takes_no_text(textless_model: Path) -> None:
    pipeline = AutoAudio2ImagePipeline.from_pretrained(textless_model)
    with pytest.raises(ConfigError, match="no text encoder"):
        generate_images(pipeline, [TONE], GenerationSettings(text="at night"))


@pytest.mark.usefixtures("sqlite")
def test_a_model_is_a_folder_or_a_version(layout: ProjectPaths, exported_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MODELS_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="there is no trained model"):
        model_folder(layout, None)
    with tracking.run("train", layout, Config()) as tracker:
        tracker.log_model(exported_model)
    assert sync(layout) == {}
    assert model_folder(layout, str(exported_model)) == exported_model
    fetched = model_folder(layout, "challenger")
    assert layout.runs in fetched.parents
    assert hash_path(fetched) == hash_path(exported_model)
    assert sorted(path.name for path in fetched.parent.iterdir()) == [fetched.name], "nothing is left of the download"
    assert os.environ[MODELS_VARIABLE] == str(layout.root.resolve()), "folders that the export names are the project's"
    assert AutoAudio2ImagePipeline.from_pretrained(fetched)(TONE, 1).shape == (1, 32, 32, 3)

    before = (fetched / "model_index.json").stat().st_mtime_ns
    assert model_folder(layout, "1") == fetched
    assert (fetched / "model_index.json").stat().st_mtime_ns == before, "it is downloaded once"
    (fetched / "model_index.json").write_text("{}")
    assert hash_path(model_folder(layout, "1")) == hash_path(exported_model), "a damaged one is downloaded again"
    shutil.copytree(exported_model, layout.model)
    assert model_folder(layout, "1") == model_folder(layout, None) == layout.model
    with pytest.raises(DataError, match="'9' is no version"):
        model_folder(layout, "9")
