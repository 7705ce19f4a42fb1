"""Batch order, exact resume, and the export."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from backbone import threads
from backbone.autoencoder import create_autoencoder, encode_all, whiten
from backbone.config import params
from backbone.evaluate import generate, measure
from backbone.export import assemble, averaged_unet, export, publish
from backbone.model import create_unet
from backbone.train import TrainingData, ema_exponent, make_batch, published_unet, sample_times


def train_command(tiny_params: Path, run: str, until: int) -> list[str]:
    options = ["--run", run, "--params", str(tiny_params), "--until", str(until), "--threads", "1", "--device", "cpu"]
    return [sys.executable, "-m", "backbone.train", *options]


def test_batches_depend_on_seed_and_step_only(tiny_data: Path) -> None:
    settings = params("train") | {"batch_size": 8}
    first, second = (TrainingData.load(tiny_data) for _ in range(2))
    make_batch(second, 3, settings)
    a, b, other = make_batch(first, 7, settings), make_batch(second, 7, settings), make_batch(first, 8, settings)
    for name in ("latents", "noise", "timesteps", "states", "pooled_states"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert not torch.equal(a.noise, other.noise)


def test_batches_have_no_validation_or_unusable_images(tiny_data: Path) -> None:
    settings = params("train") | {"batch_size": 64}
    data = TrainingData.load(tiny_data)
    used = {int(i) for step in range(10) for i in make_batch(data, step, settings).images}
    assert used == set(range(12)) - {4, 5}
    assert data.validation.tolist() == [4]


def test_scenes_have_blended_token_states(tiny_data: Path) -> None:
    no_noise = {"condition_dropout": 0.0, "pooled_dropout": 0.0, "text_noise": 0.0, "scene_fraction": 0.5}
    settings = params("train") | {"batch_size": 64} | no_noise
    data = TrainingData.load(tiny_data)
    batch = make_batch(data, 0, settings)
    captions = data.states.astype(np.float32)
    scene_latents = torch.from_numpy(np.array(data.scene_latents)).flatten(0, 1)
    for row in range(64):
        own = captions[data.captions[int(batch.images[row])]]
        if row < 32:
            expected = own
            assert any(torch.equal(batch.latents[row], torch.from_numpy(v)) for v in data.latents[batch.images[row]])
        else:
            assert any(torch.equal(batch.latents[row], latents) for latents in scene_latents)
            two = batch.images[row] == 0
            other = captions[data.captions[1]] if two else captions[:1]
            weight = 0.6 if two else 0.3
            expected = weight * own[:, None] + (1 - weight) * other[None]
            expected = expected.reshape(-1, *expected.shape[2:])
        assert np.abs(expected - batch.states[row].numpy()).max((1, 2)).min() < 1e-5
        assert torch.equal(batch.states[row], batch.pooled_states[row])


def test_a_batch_without_captions_has_the_empty_prompt(tiny_data: Path) -> None:
    settings = params("train") | {"batch_size": 16, "condition_dropout": 1.0, "scene_fraction": 0.5}
    data = TrainingData.load(tiny_data)
    batch = make_batch(data, 0, settings)
    empty = torch.from_numpy(data.states[0].astype(np.float32)).expand_as(batch.states)
    assert torch.equal(batch.states, empty)
    assert torch.equal(batch.pooled_states, empty)


def test_times_cover_the_schedule() -> None:
    times = sample_times(4096, params("train"), torch.Generator().manual_seed(0))
    assert times.min() < 20
    assert times.max() > 980
    assert abs(times.float().mean() - 500) < 15


def test_ema_exponent_gives_the_relative_deviation() -> None:
    for deviation in (0.05, 0.1):
        gamma = ema_exponent(deviation)
        assert np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(deviation, rel=1e-6)


def test_whitening_keeps_reconstructions() -> None:
    settings = params("autoencoder") | {"block_out_channels": [8, 8, 8, 8], "resolution": 64}
    model = create_autoencoder(settings).eval()
    images = np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), dtype=np.uint8)
    before = encode_all(model, images, mirrored=False)
    with torch.no_grad():
        expected = model.decode(torch.from_numpy(before)).sample
        whiten(model, before, 0.5)
        after = encode_all(model, images, mirrored=False)
        assert torch.allclose(model.decode(torch.from_numpy(after)).sample, expected, atol=1e-4)
    covariance = np.cov(np.moveaxis(after, 1, 0).reshape(after.shape[1], -1))
    assert np.trace(covariance) / len(covariance) == pytest.approx(1, rel=1e-3)
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 1e-3


def test_resume_after_kill_is_exact(tiny_data: Path, tiny_params: Path, environment: dict[str, str], tmp_path: Path) -> None:
    subprocess.run(train_command(tiny_params, "whole", 8), env=environment, check=True, timeout=300)
    with (tmp_path / "killed.log").open("w") as log:
        process = subprocess.Popen(train_command(tiny_params, "killed", 10**6), env=environment, stdout=log, stderr=log)
        checkpoint, deadline = tiny_data / "killed" / "checkpoint.pt", time.monotonic() + 200
        while not (checkpoint.exists() and torch.load(checkpoint, weights_only=True)["step"] >= 1):
            assert process.poll() is None, (tmp_path / "killed.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    reached = torch.load(checkpoint, weights_only=True)["step"]
    subprocess.run(train_command(tiny_params, "killed", max(8, reached + 2)), env=environment, check=True, timeout=300)
    if reached + 2 > 8:
        subprocess.run(train_command(tiny_params, "whole", reached + 2), env=environment, check=True, timeout=300)
    whole, killed = (torch.load(tiny_data / run / "checkpoint.pt", weights_only=True) for run in ("whole", "killed"))
    assert whole["step"] == killed["step"] > reached
    for name, value in whole["unet"].items():
        assert torch.equal(value, killed["unet"][name]), name
    for a, b in zip(whole["averages"], killed["averages"], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_training_and_latents_start_from_a_published_folder(
    tiny_data: Path, tiny_params: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    settings = params("unet", tiny_params)
    vae = AutoencoderKL.from_pretrained(tiny_data / "autoencoder" / "vae").eval()
    unet = create_unet(settings, vae.config.latent_channels, 8, seed=5)
    export(assemble(unet, vae, tiny_data / "dataset" / "text"), tmp_path / "published")
    command = [*train_command(tiny_params, "continued", 1), "--init-from", str(tmp_path / "published")]
    subprocess.run(command, env=environment, check=True, timeout=300)
    state, published = torch.load(tiny_data / "continued" / "checkpoint.pt", weights_only=True), unet.float().state_dict()
    largest = max(float((value - published[name]).abs().max()) for name, value in state["unet"].items())
    assert 0 < largest < 3 * params("train")["lr"], "one step away"
    assert state["step"] == 1
    other = create_unet(settings | {"block_out_channels": [32, 32, 64]}, vae.config.latent_channels, 8, seed=5)
    with pytest.raises(ValueError, match=r"published/unet: shape of .* is .*; params.yaml"):
        published_unet(tmp_path / "published", other)

    folder = tmp_path / "data" / "dataset"
    shutil.copytree(tiny_data / "dataset", folder)
    images = np.load(folder / "images.npy")
    np.save(folder / "scenes.npy", images[:3])
    command = [sys.executable, "-m", "backbone.autoencoder", "--init-from", str(tmp_path / "published")]
    subprocess.run(command, env=environment | {"BACKBONE_DATA": str(folder.parent)}, check=True, timeout=300)
    expected = encode_all(vae.float(), images[:3], mirrored=True)
    assert np.allclose(np.load(folder.parent / "autoencoder" / "scene_latents.npy")[:, 1], expected, atol=1e-5)


def test_other_data_is_refused(tiny_data: Path, tiny_params: Path, environment: dict[str, str]) -> None:
    folder = tiny_data / "other"
    folder.mkdir()
    torch.save({"identity": {"data": "x", "unet": "", "seed": 0}}, folder / "checkpoint.pt")
    done = subprocess.run(train_command(tiny_params, "other", 2), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode
    assert "belongs to other data" in done.stderr


STOCK = """
import sys, json, torch
from diffusers import StableDiffusionPipeline
assert not any(name.startswith("backbone") for name in sys.modules)
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
pipeline.set_progress_bar_config(disable=True)
images = pipeline(["dog", "church bell"], num_inference_steps=2, guidance_scale=3.0, output_type="np",
                  generator=[torch.Generator().manual_seed(s) for s in (0, 0)]).images
print(json.dumps({"shape": images.shape, "mean": float(images.mean()), "differ": float(abs(images[0] - images[1]).mean())}))
"""


def test_export_loads_in_a_fresh_process_with_diffusers_alone(
    tiny_data: Path, tiny_params: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    subprocess.run(train_command(tiny_params, "exported", 2), env=environment, check=True, timeout=300)
    vae = AutoencoderKL.from_pretrained(tiny_data / "autoencoder" / "vae")
    unet = averaged_unet(
        tiny_data / "exported" / "checkpoint.pt", params("unet", tiny_params), vae.config.latent_channels, 8, -1
    )
    report = export(assemble(unet, vae, tiny_data / "dataset" / "text"), tmp_path / "export")
    assert report["bytes_without_text_encoder"] < 60e6
    entry = tomllib.loads("[[asset]]\n" + publish(tmp_path / "export", tmp_path / "weights"))["asset"][0]
    assert not (tmp_path / "weights/text_encoder/model.safetensors").exists(), "it is an asset of its own"
    for output, member in zip(entry["outputs"], entry["members"].values(), strict=True):
        content = (tmp_path / "weights" / member["path"]).read_bytes()
        assert output == f"backbone/{member['path']}"
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (member["sha256"], member["bytes"])
        assert str(tmp_path).encode() not in content
        assert str(tiny_data).encode() not in content
    clean = {k: v for k, v in environment.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(tmp_path / "export")],
        env=clean,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["shape"] == [2, 64, 64, 3]
    assert result["differ"] > 0


def test_generate_equals_the_stock_pipeline(tiny_data: Path, tiny_params: Path) -> None:
    vae = AutoencoderKL.from_pretrained(tiny_data / "autoencoder" / "vae")
    unet = create_unet(params("unet", tiny_params), vae.config.latent_channels, 8, seed=1).eval()
    pipeline = assemble(unet, vae, tiny_data / "dataset" / "text")
    pipeline.set_progress_bar_config(disable=True)
    ours = generate(pipeline, ["dog", "church bell"], seeds=2, guidance_scale=3.0, steps=3)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    stock = pipeline(
        ["church bell"] * 2, num_inference_steps=3, guidance_scale=3.0, generator=generators, output_type="np"
    ).images
    assert np.abs(ours[1].astype(int) - np.round(stock * 255).astype(int)).max() <= 1
    assert np.abs(ours[0].astype(int) - ours[1].astype(int)).max() > 1


def test_memorised_samples_are_reported() -> None:
    rng = np.random.default_rng(0)
    training, validation = (rng.integers(0, 255, (n, 16, 16, 3), dtype=np.uint8) for n in (12, 4))
    things = np.array(["dog", "cat"] * 6)
    copies = np.stack([training[[0, 2]], training[[1, 1]]])
    report = measure(copies, ["dog", "cat"], training, things, validation)
    assert report["fraction_within_rmse_25_of_training"] == 1
    assert report["fraction_within_rmse_25_of_validation_images"] == 0
    assert report["nearest5_thing_agreement"] == 1
    assert report["training_images_recalled"] == 3
    assert report["fraction_of_prompts_without_two_samples_within_rmse_20"] == 0.5


def test_threads_follow_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"time": 0.0, "busy": 0.0, "own": 0.0}
    monkeypatch.setattr(threads.time, "monotonic", lambda: clock["time"])
    monkeypatch.setattr(threads.time, "process_time", lambda: clock["own"])
    monkeypatch.setattr(threads, "busy_seconds", lambda: clock["busy"])
    chosen = []
    monkeypatch.setattr(threads.torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 2)
    tuner = threads.ThreadTuner(0)
    for others in (0.1, 1.0, 2.0, 0.3):
        clock["time"] += 10
        clock["own"] += 10
        clock["busy"] += 10 * (1 + others)
        tuner.step()
    assert chosen == [1, 2, 1, 1, 2]


def test_real_model_is_small() -> None:
    with torch.device("meta"):
        unet = create_unet(params("unet"), params("autoencoder")["latent_channels"], 8, 0)
        vae = create_autoencoder(params("autoencoder") | {"resolution": 64})
    assert 2 * sum(p.numel() for m in (unet, vae) for p in m.parameters()) < 60e6
