"""Recipe `ip_adapter`: trains only the new weights, resumes, exports a model that generates images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from pipeline_steps.core.errors import ConfigError
from pipeline_steps.core.feature_store import FeatureStore
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.diffusion.audio_prompt import AudioPrompt
from pipeline_steps.diffusion.audio_tokens import AudioTokens, TokenPooling
from pipeline_steps.diffusion.ip_adapter import AudioIPAdapter
from pipeline_steps.diffusion.perceiver_resampler import PerceiverResampler
from pipeline_steps.diffusion.pipelines.auto import AutoAudio2ImagePipeline
from pipeline_steps.diffusion.pipelines.ip_adapter import AudioIPAdapterPipeline
from pipeline_steps.diffusion.stable_diffusion import StableDiffusionBackbone
from pipeline_steps.train import stage
from pipeline_steps.train.config import TrainConfig
from pipeline_steps.train.data import BatchPartition, TrainingBatch
from pipeline_steps.train.recipes.base import TrainingRun
from pipeline_steps.train.recipes.ip_adapter.config import IPAdapterConfig
from pipeline_steps.train.recipes.ip_adapter.data import (
    LATENT_COLUMNS,
    IPAdapterDataModule,
    IPAdapterDataset,
    latents_fingerprint,
    load_or_encode_latents,
)
from pipeline_steps.train.recipes.ip_adapter.lightning_module import min_snr_weights
from tests.factories.checkpoints.ast import ast_checkpoint
from tests.factories.checkpoints.stable_diffusion import stable_diffusion
from tests.train.small_run import adapter_phase, merged, model_bytes, small_section

MakeProject = Callable[[Path], ProjectPaths]
TONE = (0.3 * np.sin(np.arange(48_000) / 20)).astype(np.float32)


@pytest.fixture(scope="module")
def make_adapter_project(make_project: MakeProject, tmp_path_factory: pytest.TempPathFactory) -> MakeProject:
    """Small project with a tiny backbone and a tiny encoder."""
    shared = tmp_path_factory.mktemp("frozen")
    stable_diffusion(shared / "stable_diffusion")
    ast_checkpoint(shared / "ast")

    def make(root: Path) -> ProjectPaths:
        layout = make_project(root)
        for name in ("stable_diffusion", "ast"):
            (root / name).symlink_to(shared / name)
        return layout

    return make


def adapter_config(**changes: Any) -> TrainConfig:
    """Small configuration of the recipe with some keys changed; groups are merged."""
    section = small_section(
        resolution=64,
        audio={"encoder": "ast", "ast": {"model": "ast"}},
        image_augmentation={"hflip_prob": 0.5},
        checkpointing_steps=2,
        ip_adapter={
            "backbone": {"model": "stable_diffusion"},
            "resampler": {"num_queries": 3, "dim": 32, "dropout": 0.0},
            **adapter_phase(6, learning_rate=1e-2),
        },
    )
    return TrainConfig.from_params(merged(section, changes))


Uninterrupted = tuple[ProjectPaths, stage.StageReport, TrainingRun]


@pytest.fixture(scope="module")
def uninterrupted(make_adapter_project: MakeProject, tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    """Small project after an uninterrupted training run, its report, and the trained recipe."""
    layout = make_adapter_project(tmp_path_factory.mktemp("uninterrupted"))
    seen: list[TrainingRun] = []
    export = stage._export
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "_export", lambda *given: (seen.append(given[2]), export(*given)))
        report = stage.run(adapter_config(), layout)
    return layout, report, seen[0]


def test_the_recipe_writes_an_adapter_and_its_training_history(uninterrupted: Uninterrupted) -> None:
    layout, report, _ = uninterrupted
    report.check_balance()
    assert (report.n_in, report.cache_misses, report.cache_hits) == (8, 8, 0)
    assert (report.metrics["steps"], report.metrics["pairs_train"], report.metrics["clips_train"]) == (6, 6, 3)
    assert report.metrics["loss"] > 0
    files = set(model_bytes(layout))
    assert {"ip_adapter.safetensors", "model_index.json", "training/loss.csv", "training/step-000006.png"} <= files
    assert len((layout.model / "training/loss.csv").read_text().splitlines()) == 7
    assert not list(layout.runs.rglob("*.ckpt")), "a finished run keeps no checkpoint"
    pipeline = AutoAudio2ImagePipeline.from_pretrained(layout.model, "cpu")
    assert pipeline.families == {"ast", "yamnet", "clip"}
    assert pipeline(TONE, num_samples=2).shape == (2, 64, 64, 3)
    assert pipeline.generate_from_text(["a dog barks"]).shape == (1, 1, 64, 64, 3)
    scheduler = json.loads((layout.model / "scheduler/scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["algorithm_type"]) == ("DPMSolverMultistepScheduler", "dpmsolver++")


def test_batches_are_made_without_the_text_encoder(
    make_adapter_project: MakeProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worker processes of a DataLoader make them, which cannot use a GPU."""
    seen: list[TrainingRun] = []

    class StoppedError(Exception):
        pass

    def stop(_config: TrainConfig, _folder: Path, prepared: TrainingRun, *_: Any) -> None:
        seen.append(prepared)
        raise StoppedError

    monkeypatch.setattr(stage, "_train", stop)
    with pytest.raises(StoppedError):
        stage.run(adapter_config(), make_adapter_project(tmp_path))
    datamodule = seen[0].datamodule
    assert isinstance(datamodule, IPAdapterDataModule)

    def refuse(texts: list[str]) -> torch.Tensor:
        raise AssertionError(f"{texts} are encoded while a batch is made")

    monkeypatch.setattr(datamodule.adapter.backbone, "encode_prompt", refuse)
    texts = torch.cat([datamodule.training_batch(step).audio.text for step in range(12)])
    assert len(texts.unique(dim=0)) > 1, "prompts of several clips"


def test_only_the_new_weights_change(uninterrupted: Uninterrupted) -> None:
    layout, report, prepared = uninterrupted
    backbone = prepared.module.denoiser.backbone
    for part, network in (("unet", backbone.unet), ("vae", backbone.vae)):
        kept = load_file(layout.root / "stable_diffusion" / part / "diffusion_pytorch_model.safetensors")
        now = network.state_dict()
        assert kept.keys() <= now.keys()
        assert all(torch.equal(now[name], value) for name, value in kept.items())
        added = {name for name in now.keys() - kept.keys() if "_ip." not in name and "encoder_hid_proj" not in name}
        assert not added
    trained = {**load_file(layout.model / "ip_adapter.safetensors"), **load_file(layout.model / "resampler/model.safetensors")}
    unet = load_file(layout.root / "stable_diffusion/unet/diffusion_pytorch_model.safetensors")
    first = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    moved = trained["ip_adapter.1.to_k_ip.weight"] - unet[first]
    assert 1e-4 < moved.abs().max() < 0.2, "keys are initialized from those of the text and trained"
    assert report.metrics["num_parameters"] == sum(value.numel() for value in trained.values())
    names = [name for name, weight in prepared.module.named_parameters() if weight.requires_grad]
    assert len(names) == len(trained)
    assert all(name.startswith(("denoiser.resampler.", "denoiser.attention.")) for name in names)
    assert {name for name in trained if name.startswith("ip_adapter.")} == {
        f"ip_adapter.{number}.{kind}.weight" for number in range(1, 32, 2) for kind in ("to_k_ip", "to_v_ip")
    }, "sixteen cross-attentions, as in Stable Diffusion 1.5"


def test_an_interrupted_and_resumed_run_gives_the_same_bytes(
    uninterrupted: Uninterrupted, make_adapter_project: MakeProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = make_adapter_project(tmp_path)
    original = IPAdapterDataModule.training_batch

    def failing(datamodule: IPAdapterDataModule, step: int, micro: int = 0) -> TrainingBatch:
        if step == 5:  # between the checkpoints of steps 4 and 6
            raise OSError(5, "the machine goes down")
        return original(datamodule, step, micro)

    with monkeypatch.context() as patch:
        patch.setattr(IPAdapterDataModule, "training_batch", failing)
        with pytest.raises(OSError, match="goes down"):
            stage.run(adapter_config(), layout)
    checkpoint = next(layout.runs.rglob("last.ckpt"))
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["global_step"] == 4
    assert all(".unet." not in name and ".vae." not in name for name in saved["state_dict"]), "the backbone is not saved again"
    report = stage.run(adapter_config(), layout)
    assert (report.cache_misses, report.cache_hits) == (0, 8)
    assert model_bytes(layout) == model_bytes(uninterrupted[0])


def test_half_precision_applies_to_validation_too(make_adapter_project: MakeProject, tmp_path: Path) -> None:
    layout = make_adapter_project(tmp_path)
    changes = {"precision": "bf16-mixed", "validation_steps": 2, "ip_adapter": adapter_phase(2, 2)}
    report = stage.run(adapter_config(**changes), layout)
    assert report.metrics["validation_loss"] > 0
    assert (layout.model / "training/step-000002.png").is_file()


def test_latents_of_gpu_and_cpu_have_different_fingerprints(make_adapter_project: MakeProject, tmp_path: Path) -> None:
    backbone = StableDiffusionBackbone("stable_diffusion", root=make_adapter_project(tmp_path).root)
    assert latents_fingerprint(backbone, 64, "cpu") != latents_fingerprint(backbone, 64, "gpu")


def test_yamnet_as_audio_encoder(make_adapter_project: MakeProject, tmp_path: Path) -> None:
    layout = make_adapter_project(tmp_path)
    changes: dict[str, Any] = {
        "audio": {"encoder": "yamnet", "num_augmentations": 1},
        "sampling": {"scheduler": "ddim"},
        "ip_adapter": {"backbone": {"prompt": "a photo"}, **adapter_phase(2, 2)},
    }
    stage.run(adapter_config(**changes), layout)
    pipeline = AutoAudio2ImagePipeline.from_pretrained(layout.model, "cpu")
    assert pipeline.families == {"yamnet", "clip"}
    assert json.loads((layout.model / "model_index.json").read_text())["audio_prompt"]["template"] == "a photo"
    assert pipeline(TONE).shape == (1, 64, 64, 3)


def test_pooled_tokens_and_mean_latents_are_stored_and_exported(make_adapter_project: MakeProject, tmp_path: Path) -> None:
    layout = make_adapter_project(tmp_path)
    changes: dict[str, Any] = {
        "audio": {"pool_time": 3, "pool_bands": 5, "num_augmentations": 1},
        "ip_adapter": {"sample_latents": False, **adapter_phase(2, 2)},
    }
    stage.run(adapter_config(**changes), layout)
    stored = {tuple(store.schema.names): store for store in map(_stored_rows, (layout.result_cache / "train").iterdir())}
    clips, images = stored[("key", "grid", "tags", "loudness", "crc32")], stored[("key", "mean", "crc32")]
    steps = -(-20 // 3)  # 2 s
    assert {len(value) for value in clips["grid"].to_pylist()} == {steps * 3 * 24 * 2}
    assert {len(value) for value in images["mean"].to_pylist()} == {4 * 8 * 8 * 2}
    pipeline = AutoAudio2ImagePipeline.from_pretrained(layout.model, "cpu")
    assert isinstance(pipeline, AudioIPAdapterPipeline)
    assert pipeline.encoder is not None
    assert (pipeline.encoder.pooling, pipeline.encoder.bands) == (TokenPooling(3, 5), 3)
    assert pipeline.encoder.tokenize([TONE], 2.0)[0].grid.shape == (-(-10 // 3), 3, 24)
    assert pipeline(TONE).shape == (1, 64, 64, 3)


def _stored_rows(folder: Path) -> pa.Table:
    return pa.concat_tables(pa.ipc.open_file(path).read_all() for path in sorted(folder.glob("*.arrow")))


def test_memory_settings_change_no_gradient(make_adapter_project: MakeProject, tmp_path: Path) -> None:
    layout = make_adapter_project(tmp_path)
    exports = []
    for performance in ({}, {"gradient_checkpointing": True}, {"accumulate_grad_batches": 2}):
        stage.run(adapter_config(performance=performance, ip_adapter=adapter_phase(2, learning_rate=1e-2)), layout)
        exports.append(load_file(layout.model / "ip_adapter.safetensors"))
    for name, value in exports[0].items():
        torch.testing.assert_close(value, exports[1][name], atol=1e-5, rtol=1e-4)
        # AdamW divides a gradient by its magnitude, so rounding can flip the update of one near zero.
        assert (value - exports[2][name]).abs().median() < 1e-5


def test_settings_that_do_not_fit_the_backbone_are_rejected(make_adapter_project: MakeProject, tmp_path: Path) -> None:
    layout = make_adapter_project(tmp_path)
    with pytest.raises(ConfigError, match="multiple of 64"):
        stage.run(adapter_config(resolution=96), layout)
    stable_diffusion(tmp_path / "textless", text="")
    with pytest.raises(ConfigError, match="has no text encoder"):
        stage.run(adapter_config(ip_adapter={"backbone": {"model": "textless", "prompt": "a photo"}}), layout)
    with pytest.raises(ConfigError, match="neither a folder nor a hub id"):
        stage.run(adapter_config(ip_adapter={"backbone": {"model": "no such folder"}}), layout)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ip_adapter": {"backbone": {"model": ""}}}, r"ip_adapter\.backbone\.model\n.*at least 1 character"),
        ({"audio": {"ast": {"model": ""}}}, r"audio\.ast\.model is empty"),
        ({"ip_adapter": {"resampler": {"heads": 5}}}, "not a multiple of heads"),
        ({"ip_adapter": adapter_phase(0, 1)}, r"adapter\.max_steps\n.*greater than or equal to 1"),
    ],
)
def test_invalid_configurations_are_rejected(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        adapter_config(**changes)


def test_min_snr_weights() -> None:
    snr = torch.tensor([0.0, 0.5, 5.0, 50.0])
    torch.testing.assert_close(min_snr_weights(snr, 5.0, "epsilon"), torch.tensor([1.0, 1.0, 1.0, 0.1]))
    torch.testing.assert_close(min_snr_weights(snr, 5.0, "v_prediction"), torch.tensor([0.0, 1 / 3, 5 / 6, 5 / 51]))


def test_latents_are_cached_and_sampled_from_their_distribution(
    make_adapter_project: MakeProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = make_adapter_project(tmp_path)
    backbone = StableDiffusionBackbone("stable_diffusion", root=layout.root).load()
    picture = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)

    def encoded(*ids: str) -> tuple[torch.Tensor, torch.Tensor]:
        store = FeatureStore(tmp_path / "store", LATENT_COLUMNS)
        stored = load_or_encode_latents(backbone, store, lambda _: picture, list(ids), 64, mirror=True)
        both = [rows[[0, 0, 1, 1], [0, 1, 0, 1]].view(2, 2, 4, 8, 8) for rows in stored]
        return both[0], both[1]

    means, stds = encoded("a", "b")
    assert means.shape == stds.shape == (2, 2, 4, 8, 8)
    assert torch.equal(means[0], means[1])
    assert not torch.equal(means[0, 0], means[0, 1]), "the mirrored image has its own latents"
    calls: list[int] = []
    original = backbone.encode
    monkeypatch.setattr(backbone, "encode", lambda rows: (calls.append(len(rows)), original(rows))[1])
    again, _ = encoded("b", "c")
    assert calls == [1, 1], "one new image and its mirror image"
    assert torch.equal(again[0], means[1])

    tokens = AudioTokens(torch.zeros(4, 12, 24, dtype=torch.float16), torch.rand(521), -20.0)
    wide = torch.full_like(stds, 0.5)
    data = IPAdapterDataset(means, wide, [0, 1], [0, 0], [[tokens]])
    config = IPAdapterConfig.model_validate(adapter_phase(9, 64))
    adapter = AudioIPAdapter(backbone, PerceiverResampler(24, 12, output_width=24, dim=32, heads=2), AudioPrompt())

    def batch(step: int, partition: BatchPartition = BatchPartition()) -> TrainingBatch:  # noqa: B008 - frozen
        return IPAdapterDataModule(data, data, adapter, config, 0.0, 0, partition, {}).training_batch(step)

    halves = [batch(7, BatchPartition(rank, 2)) for rank in range(2)]
    assert torch.equal(torch.cat([half.latents for half in halves]), batch(7).latents)
    assert torch.equal(torch.cat([half.times for half in halves]), batch(7).times)
    assert [row for half in halves for row in half.rows] == batch(7).rows
    first, same, other = batch(7), batch(7), batch(8)
    assert torch.equal(first.latents, same.latents)
    assert torch.equal(first.times, same.times)
    assert not torch.equal(first.latents, other.latents)
    sampled = torch.cat([batch(step).latents for step in range(8)]) / backbone.vae.config.scaling_factor
    assert (sampled.mean(0) - means[0, 0].float()).abs().mean() < 0.03
    assert abs(float(sampled.std(0).mean()) - 0.5) < 0.01
    assert first.times.min() > 0
    assert first.times.max() < 1
