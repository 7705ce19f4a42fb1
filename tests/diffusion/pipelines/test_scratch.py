"""Exported model of recipe `scratch`: images are a function of audio, seed and guidance; a modified folder is rejected."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from pipeline_steps.diffusion.audio_conditioner import AudioConditioner
from pipeline_steps.diffusion.autoencoder import PatchPCAAutoencoder
from pipeline_steps.diffusion.denoiser import Denoiser, build_unet
from pipeline_steps.diffusion.gaussian_prior import GaussianDenoiser
from pipeline_steps.diffusion.mlp_denoiser import MLPDenoiser
from pipeline_steps.diffusion.pipelines.scratch import UNET_WEIGHTS, Audio2ImageFlowPipeline, new_scheduler, save_model

from pipeline_steps.core.errors import DataError, IntegrityError
from pipeline_steps.diffusion.pipelines.auto import AutoAudio2ImagePipeline
from pipeline_steps.diffusion.pipelines.base import Audio2ImagePipeline, GenerationConfig, initial_latents

GENERATION = GenerationConfig(num_inference_steps=3, guidance_scale=2.0, max_seconds=5.0, resolution=32)


@pytest.fixture(scope="module")
def folder(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained model, exported."""
    torch.manual_seed(0)
    conditioner = AudioConditioner(num_time_tokens=4, frame_pca_dim=8, tag_pca_dim=8, hidden_dim=32, num_layers=1, dropout=0.0)
    with torch.no_grad():
        for axes in (conditioner.frame_axes, conditioner.tag_axes):
            axes.basis.normal_()
    autoencoder = PatchPCAAutoencoder(8, 0.5, 8)
    images = torch.rand(16, 3, 32, 32) * 2 - 1
    autoencoder.fit(images)
    prior = GaussianDenoiser(8, 4, 4)
    prior.fit(autoencoder.encode(images))
    mlp = MLPDenoiser(8, 4, conditioner.summary_width, hidden_dim=64, num_blocks=1, dropout=0.0)
    torch.nn.init.normal_(mlp.leave.weight, std=0.2)
    unet = build_unet(16, 8, 4, (32, 32), 32, 16)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    denoiser = Denoiser(unet, conditioner, mlp, prior, "residual")
    target = tmp_path_factory.mktemp("model") / "audio2image"
    save_model(target, Audio2ImageFlowPipeline(denoiser, autoencoder, new_scheduler(3.0), None, GENERATION), assets)
    return target


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Audio2ImagePipeline:
    return AutoAudio2ImagePipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def tone() -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000)).astype(np.float32)


def test_images_are_a_function_of_the_seed(pipeline: Audio2ImagePipeline, tone: np.ndarray) -> None:
    first = pipeline(tone, num_samples=2, seed=7)
    assert first.shape == (2, 32, 32, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, pipeline(tone, num_samples=2, seed=7))
    assert not np.array_equal(first, pipeline(tone, num_samples=2, seed=8))
    assert not np.array_equal(first[0], first[1])


def test_the_first_sample_does_not_depend_on_how_many_are_asked_for(pipeline: Audio2ImagePipeline, tone: np.ndarray) -> None:
    one, three = pipeline(tone, num_samples=1, seed=1), pipeline(tone, num_samples=3, seed=1)
    assert np.abs(one[0].astype(int) - three[0].astype(int)).max() <= 1


def test_guidance_and_audio_change_the_image(pipeline: Audio2ImagePipeline, tone: np.ndarray) -> None:
    plain, guided = pipeline(tone, guidance_scale=1.0), pipeline(tone, guidance_scale=6.0)
    assert not np.array_equal(plain, guided)
    noise = np.random.default_rng(0).normal(0, 0.1, 48_000).astype(np.float32)
    assert not np.array_equal(guided, pipeline(noise, guidance_scale=6.0))
    assert np.array_equal(pipeline(tone, guidance_scale=0.0), pipeline(noise, guidance_scale=0.0))
    assert np.array_equal(pipeline(tone, guidance_scale=0.0)[0], pipeline.generate_unconditional(1)[0])


def test_loudness_changes_the_image(pipeline: Audio2ImagePipeline, tone: np.ndarray) -> None:
    assert not np.array_equal(pipeline(tone), pipeline(tone * 0.1))


def test_latents_are_decoded_where_the_autoencoder_is(folder: Path, tone: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training the denoiser may be on a GPU and the autoencoder is on the CPU; here `meta` stands for the other device."""
    pipeline = Audio2ImageFlowPipeline.from_pretrained(folder)
    pipeline.autoencoder.to("meta")
    devices: list[str] = []

    def decode(latents: torch.Tensor) -> torch.Tensor:
        devices.append(latents.device.type)
        return torch.zeros(len(latents), 3, 32, 32)

    monkeypatch.setattr(pipeline.autoencoder, "decode", decode)
    pipeline(tone)
    assert devices == ["meta"]


def test_a_batch_gives_the_same_images_as_single_clips(pipeline: Audio2ImagePipeline, tone: np.ndarray) -> None:
    tokens = [pipeline.encode_audio(tone), pipeline.encode_audio(tone * 0.2)]
    many = pipeline.generate_batch(tokens, num_samples=2, seed=3)
    assert many.shape == (2, 2, 32, 32, 3)
    alone = pipeline(tone * 0.2, num_samples=2, seed=3)
    assert np.abs(many[1].astype(int) - alone.astype(int)).max() <= 1
    assert pipeline.generate_batch([], num_samples=2).shape == (0, 2, 32, 32, 3)


def test_initial_latents_are_a_function_of_seed_and_index() -> None:
    noise = initial_latents(0, 0, (2, 2, 2))
    assert torch.equal(noise, initial_latents(0, 0, (2, 2, 2)))
    assert not torch.equal(noise, initial_latents(0, 1, (2, 2, 2)))


def test_diffusers_reads_the_unet(folder: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=True)
    assert unet.config.cross_attention_dim == 32


def _copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target / "model")
    return target / "model"


def _rehash(folder: Path, name: str, payload: bytes) -> None:
    """Write a weight file and make the index agree, as an attacker would."""
    from pipeline_steps.core.hashing import sha256_bytes

    (folder / name).write_bytes(payload)
    index = json.loads((folder / "model_index.json").read_text())
    index["sha256"][name] = sha256_bytes(payload)
    (folder / "model_index.json").write_text(json.dumps(index))


def test_a_changed_byte_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = _copy(folder, tmp_path)
    payload = bytearray((copy / UNET_WEIGHTS).read_bytes())
    payload[-1] ^= 1
    (copy / UNET_WEIGHTS).write_bytes(payload)
    with pytest.raises(IntegrityError, match="sha256"):
        AutoAudio2ImagePipeline.from_pretrained(copy)


def test_wrong_shapes_missing_keys_and_broken_headers_are_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load, save

    copy = _copy(folder, tmp_path)
    name = "autoencoder/model.safetensors"
    state = load((copy / name).read_bytes())
    for broken, words in (
        ({**state, "mean": torch.zeros(3)}, "mean has shape"),
        ({key: value for key, value in state.items() if key != "basis"}, "key basis is missing"),
        ({**state, "extra": torch.zeros(1)}, "key extra is unknown"),
    ):
        _rehash(copy, name, save(broken))
        with pytest.raises(IntegrityError, match=words):
            AutoAudio2ImagePipeline.from_pretrained(copy)
    _rehash(copy, name, (2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(IntegrityError, match="not a safetensors"):
        AutoAudio2ImagePipeline.from_pretrained(copy)
    (copy / name).unlink()
    with pytest.raises(DataError, match="missing"):
        AutoAudio2ImagePipeline.from_pretrained(copy)


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_pickles_are_never_loaded(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    copy = _copy(folder, tmp_path)
    _rehash(copy, UNET_WEIGHTS, pickle.dumps(_Payload(marker)))
    with pytest.raises(IntegrityError):
        AutoAudio2ImagePipeline.from_pretrained(copy)
    assert not marker.exists()


@pytest.mark.parametrize("key", ["auto_map", "trust_remote_code"])
def test_foreign_code_in_a_config_is_refused(folder: Path, tmp_path: Path, key: str) -> None:
    copy = _copy(folder, tmp_path)
    path = copy / "unet/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "nested": {key: True}}))
    with pytest.raises(IntegrityError, match="foreign code"):
        AutoAudio2ImagePipeline.from_pretrained(copy)


def test_an_unknown_class_and_an_older_format_are_rejected(folder: Path, tmp_path: Path) -> None:
    copy = _copy(folder, tmp_path)
    index = json.loads((copy / "model_index.json").read_text())
    for changes, words in (({"_class_name": "OtherPipeline"}, "unknown _class_name"), ({"format": 1}, "not a .* of format 2")):
        (copy / "model_index.json").write_text(json.dumps(index | changes))
        with pytest.raises(IntegrityError, match=words):
            AutoAudio2ImagePipeline.from_pretrained(copy)


def test_every_weight_that_was_saved_is_loaded(folder: Path) -> None:
    """Two loads are equal: no part keeps the random weights of its construction."""
    first, second = AutoAudio2ImagePipeline.from_pretrained(folder), AutoAudio2ImagePipeline.from_pretrained(folder)
    for one, other in ((first.denoiser, second.denoiser), (first.autoencoder, second.autoencoder)):
        states = one.state_dict(), other.state_dict()
        assert states[0].keys() == states[1].keys()
        assert not [key for key in states[0] if not torch.equal(states[0][key], states[1][key])]
