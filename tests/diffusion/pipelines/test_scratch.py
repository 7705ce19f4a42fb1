"""The exported model: drawing is a function of sound, seed and guidance; a tampered folder is refused."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from pipeline_steps.core.errors import DataError, IntegrityError
from pipeline_steps.diffusion.audio_conditioner import AudioConditioner
from pipeline_steps.diffusion.autoencoder import PatchPCAAutoencoder
from pipeline_steps.diffusion.denoiser import Denoiser, build_unet
from pipeline_steps.diffusion.gaussian_prior import GaussianDenoiser
from pipeline_steps.diffusion.mlp_denoiser import MLPDenoiser
from pipeline_steps.diffusion.pipelines.auto import AutoAudio2ImagePipeline
from pipeline_steps.diffusion.pipelines.base import Audio2ImagePipeline, initial_latents
from pipeline_steps.diffusion.pipelines.safetensors_io import (
    UNET_WEIGHTS,
    AtomicCheckpointIO,
    new_scheduler,
    read_checkpoint,
    save_model,
)
from pipeline_steps.diffusion.pipelines.scratch import Audio2ImageFlowPipeline

DEFAULTS = {"steps": 3, "guidance_scale": 2.0, "max_seconds": 5.0, "picture_size": 32}


@pytest.fixture(scope="module")
def folder(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained model, exported."""
    torch.manual_seed(0)
    conditioner = AudioConditioner(frames=4, frame_components=8, tag_components=8, width=32, layers=1, dropout=0.0)
    with torch.no_grad():
        for axes in (conditioner.frame_axes, conditioner.tag_axes):
            axes.basis.normal_()
    codec = PatchPCAAutoencoder(8, 0.5, 8)
    pictures = torch.rand(16, 3, 32, 32) * 2 - 1
    codec.fit(pictures)
    prior = GaussianDenoiser(8, 4, 4)
    prior.fit(codec.encode(pictures))
    composer = MLPDenoiser(8, 4, conditioner.summary_width, width=64, blocks=1, dropout=0.0)
    torch.nn.init.normal_(composer.leave.weight, std=0.2)
    unet = build_unet(16, 8, 4, (32, 32), 32, 16)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    denoiser = Denoiser(unet, conditioner, composer, prior, "residual")
    target = tmp_path_factory.mktemp("model") / "audio2image"
    save_model(target, denoiser, codec, new_scheduler(3.0), DEFAULTS, assets)
    return target


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Audio2ImagePipeline:
    return AutoAudio2ImagePipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def tone() -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000)).astype(np.float32)


def test_drawing_is_a_function_of_the_seed(pipeline: Audio2ImagePipeline, tone: np.ndarray) -> None:
    first = pipeline.draw(tone, num_samples=2, seed=7)
    assert first.shape == (2, 32, 32, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, pipeline.draw(tone, num_samples=2, seed=7))
    assert not np.array_equal(first, pipeline.draw(tone, num_samples=2, seed=8))
    assert not np.array_equal(first[0], first[1])


def test_the_first_sample_does_not_depend_on_how_many_are_asked_for(pipeline: Audio2ImagePipeline, tone: np.ndarray) -> None:
    one, three = pipeline.draw(tone, num_samples=1, seed=1), pipeline.draw(tone, num_samples=3, seed=1)
    assert np.abs(one[0].astype(int) - three[0].astype(int)).max() <= 1


def test_guidance_and_sound_change_the_picture(pipeline: Audio2ImagePipeline, tone: np.ndarray) -> None:
    plain, guided = pipeline.draw(tone, guidance_scale=1.0), pipeline.draw(tone, guidance_scale=6.0)
    assert not np.array_equal(plain, guided)
    noise = np.random.default_rng(0).normal(0, 0.1, 48_000).astype(np.float32)
    assert not np.array_equal(guided, pipeline.draw(noise, guidance_scale=6.0))
    assert np.array_equal(pipeline.draw(tone, guidance_scale=0.0), pipeline.draw(noise, guidance_scale=0.0))
    assert np.array_equal(pipeline.draw(tone, guidance_scale=0.0)[0], pipeline.generate_unconditional(1)[0])


def test_loudness_is_heard(pipeline: Audio2ImagePipeline, tone: np.ndarray) -> None:
    assert not np.array_equal(pipeline.draw(tone), pipeline.draw(tone * 0.1))


def test_latents_are_decoded_where_the_codec_is(folder: Path, tone: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training the denoiser may be on a GPU and the codec is on the CPU; here `meta` stands for the other device."""
    pipeline = Audio2ImageFlowPipeline.read(folder)
    pipeline.codec.to("meta")
    seen: list[str] = []

    def decode(latents: torch.Tensor) -> torch.Tensor:
        seen.append(latents.device.type)
        return torch.zeros(len(latents), 3, 32, 32)

    monkeypatch.setattr(pipeline.codec, "decode", decode)
    pipeline.draw(tone)
    assert seen == ["meta"]


def test_many_sounds_at_once_draw_the_same_as_one(pipeline: Audio2ImagePipeline, tone: np.ndarray) -> None:
    tokens = [pipeline.encode_audio(tone), pipeline.encode_audio(tone * 0.2)]
    many = pipeline.generate_batch(tokens, num_samples=2, seed=3)
    assert many.shape == (2, 2, 32, 32, 3)
    alone = pipeline.draw(tone * 0.2, num_samples=2, seed=3)
    assert np.abs(many[1].astype(int) - alone.astype(int)).max() <= 1
    assert pipeline.generate_batch([], num_samples=2).shape == (0, 2, 32, 32, 3)


def test_starting_noise_is_pinned() -> None:
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
    name = "codec/model.safetensors"
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
    checkpoint = tmp_path / "last.ckpt"
    torch.save({"state_dict": {}, "payload": _Payload(marker)}, checkpoint)
    with pytest.raises(IntegrityError, match="not a plain checkpoint"):
        AtomicCheckpointIO().load_checkpoint(checkpoint, weights_only=False)
    assert not marker.exists()


def test_a_checkpoint_that_names_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {"_instantiator": "os.system"}}, path)
    with pytest.raises(IntegrityError, match="_instantiator"):
        read_checkpoint(path)
    torch.save({"state_dict": {}, "digest": "x"}, path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(IntegrityError, match="not a plain checkpoint"):
        read_checkpoint(path)


@pytest.mark.parametrize("key", ["auto_map", "trust_remote_code"])
def test_foreign_code_in_a_config_is_refused(folder: Path, tmp_path: Path, key: str) -> None:
    copy = _copy(folder, tmp_path)
    path = copy / "unet/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "nested": {key: True}}))
    with pytest.raises(IntegrityError, match="foreign code"):
        AutoAudio2ImagePipeline.from_pretrained(copy)


def test_every_weight_that_was_saved_is_loaded(folder: Path) -> None:
    """Two loads draw alike: no part keeps the random weights it was built with."""
    first, second = AutoAudio2ImagePipeline.from_pretrained(folder), AutoAudio2ImagePipeline.from_pretrained(folder)
    for one, other in ((first.denoiser, second.denoiser), (first.codec, second.codec)):
        states = one.state_dict(), other.state_dict()
        assert states[0].keys() == states[1].keys()
        assert not [key for key in states[0] if not torch.equal(states[0][key], states[1][key])]
