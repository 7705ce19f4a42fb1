"""Preset `full` as one pipeline: its models tiny, its numbers shrunk, its code paths all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from ruamel.yaml import YAML
from safetensors import safe_open

from pipeline_steps.__main__ import STAGES
from pipeline_steps.core.presets import load_overlay, merge
from pipeline_steps.diffusion.pipelines.auto import AutoAudio2ImagePipeline
from pipeline_steps.diffusion.pipelines.ip_adapter import AudioIPAdapterPipeline
from pipeline_steps.evaluate.metrics.set_metrics import ROWS
from tests.factories.demo_project import PROJECT, build, demo_rows, repro, write_params
from tests.factories.hub_cache import fill_hub

LABELS = ("cow", "sheep", "dog", "duck", "horse", "guitar")
JUDGES = ("dinov2", "ssd_mobilenet_v2")

pytestmark = [pytest.mark.full, pytest.mark.slow, pytest.mark.timeout(1500)]

# The captioner, untrained, says one of a few things of each picture if phrases are short, so what is held out was heard in
# training, and pairs spread over the splits with this seed; see `talkative_qwen3_vl`.
SHRUNK: dict[str, Any] = {
    "assets.names": ["aisfx", "ssd_mobilenet_v2", "yamnet"],
    "caption.min_confidence": 0.0,
    "caption.max_phrase_chars": 8,
    "pair.seed": 4,
    "pair.min_confidence": 0.0,
    "pair.null_quantile": 0.0,
    "pair.splits.audio.val": 0.2,
    "pair.splits.image.val": 0.3,
    "pair.min_relative_value_in_split": 0.2,
    "train.resolution": 64,
    "train.audio.num_augmentations": 2,
    "train.ip_adapter.resampler.num_queries": 4,
    "train.ip_adapter.resampler.dim": 32,
    "train.ip_adapter.resampler.depth": 1,
    "train.ip_adapter.phases.adapter.max_steps": 6,
    "train.ip_adapter.phases.adapter.batch_size": 4,
    "train.optimizer.lr_warmup_steps": 2,
    "train.checkpointing_steps": 3,
    "train.validation_steps": 3,
    "train.sampling.num_inference_steps": 2,
    "evaluate.samples_per_audio": 2,
    "evaluate.unconditional_samples": 4,
    "evaluate.max_test_pairs": 8,
    "evaluate.num_calibration_images": 20,
    "evaluate.num_bootstrap": 100,
    "evaluate.gain_sensitivity.num_clips": 1,
    "evaluate.abilities.num_clips": 3,
    "evaluate.abilities.num_samples": 1,
    "evaluate.report.max_pairs": 6,
    "evaluate.report.max_samples": 6,
}


def build_small(folder: Path, preset: str = "full") -> dict[str, str]:
    """A subset of the demo data, the preset shrunk; returns the environment in which its hub is read."""
    chosen = [row for row in demo_rows() if row["label"] in LABELS]
    build(folder, chosen)
    params = YAML().load(PROJECT / "params.yaml")
    merge(params, load_overlay(PROJECT, preset))
    sounds = [folder / "data/demo" / row["file"] for row in chosen if row["kind"] == "sound"]
    hub = fill_hub(folder / "hub", params, sounds)
    write_params(folder, params, SHRUNK)
    return hub


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


@pytest.mark.usefixtures("assets")  # leaves the wheels in .cache/wheels
def test_full_preset_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "project"
    hub = build_small(folder)
    said = repro(folder, **hub)
    assert [stage for stage in STAGES if f"Running stage '{stage}'" in said] == list(STAGES)

    for stage in STAGES:
        report = read(folder / f"reports/{stage}.json")
        assert report["n_in"] == report["n_ok"] + report["n_abstained"] + report["n_quarantined"] > 0, stage
        assert report["n_quarantined"] == 0, stage
    named = YAML(typ="safe").load(folder / "params.yaml")
    look_at_captions_and_vectors(folder, named)
    look_at_pairs(folder)
    look_at_model(folder, named, hub, monkeypatch)
    look_at_evaluation(folder, named)

    assert "Running stage" not in repro(folder, **hub), "a second dvc repro must find nothing to do"


def look_at_captions_and_vectors(folder: Path, params: Any) -> None:
    meta = read(folder / "data/captions/meta.json")
    assert meta["captioner"] == "vlm"
    assert meta["families"] == ["qwen3_vl", "qwen3_vl_vision", "siglip"]
    events = pq.read_table(folder / "data/captions/events.parquet").to_pylist()
    assert len({event["phrase"] for event in events}) > 1, "what it says depends on the picture"

    meta = read(folder / "data/embeddings/meta.json")
    clap = params["embed"]["clap"]
    assert meta["space"] == f"clap@{clap['model']}@{clap['revision']}"
    for name in ("text", "audio"):
        rows = np.load(folder / f"data/embeddings/{name}.npy")
        assert rows.shape[1] == meta["dimension"]
        assert np.allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-5)


def look_at_pairs(folder: Path) -> None:
    pairs = pq.read_table(folder / "data/pairs/pairs.parquet").to_pylist()
    splits = [[pair for pair in pairs if pair["split"] == split] for split in ("train", "val", "test")]
    assert min(map(len, splits)) >= 2
    for kind in ("image_group", "audio_group"):
        apart = [{pair[kind] for pair in split} for split in splits]
        assert len(set.union(*apart)) == sum(map(len, apart)), "no group in two splits"


def look_at_model(folder: Path, params: Any, hub: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = folder / "models/audio2image"
    index = read(model / "model_index.json")
    train = params["train"]
    for part, given in (("backbone", train["ip_adapter"]["backbone"]), ("encoder", train["audio"]["ast"])):
        assert index[part].items() >= {"kind": "hub", "model": given["model"], "revision": given["revision"]}.items()
    with safe_open(model / "ip_adapter.safetensors", "np") as tensors:
        names = set(tensors.keys())
    attentions = {name.split(".")[1] for name in names if name.startswith("ip_adapter.")}
    assert attentions == {str(place) for place in range(1, 2 * len(attentions), 2)}
    assert len(attentions) == 16, "every cross-attention of a Stable Diffusion"
    expected = {f"image_proj.proj.{layer}.{part}" for layer in (0, 2, 3) for part in ("weight", "bias")}
    expected |= {f"ip_adapter.{place}.to_{part}_ip.weight" for place in attentions for part in "kv"}
    assert names == expected

    # huggingface_hub has read the environment when it was imported: this process is told afterwards.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", f"{hub['HF_HOME']}/hub")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    pipeline = AutoAudio2ImagePipeline.from_pretrained(model, "cpu")
    assert isinstance(pipeline, AudioIPAdapterPipeline)
    tone = (0.3 * np.sin(np.arange(48_000) / 20)).astype(np.float32)
    generated = pipeline(tone, num_samples=2, seed=1)
    assert generated.shape == (2, 64, 64, 3)
    assert not np.array_equal(generated, pipeline(tone[::-1].cumsum() * np.float32(0.01), num_samples=2, seed=1)), (
        "audio is used"
    )


def look_at_evaluation(folder: Path, params: Any) -> None:
    evaluation = read(folder / "reports/evaluation.json")
    comparable = {
        "test": ("model", "unconditional", "real_images", "shuffled_audio"),  # few phrases there: no rival of another text
        "gold": ("model", "unconditional", "real_images", "shuffled_audio", "text_oracle"),
    }
    for name, rated in comparable.items():
        rows = evaluation[name]["rows"]
        assert set(rows) == set(ROWS)
        assert rows["text_oracle"].get("applicable", True), "its Stable Diffusion reads text"
        assert rows["caption_route"].get("applicable", True), "the exported model has YAMNet"
        for judge in JUDGES:
            for row in rated:
                assert 0 <= rows[row][f"win_rate_{judge}"]["value"] <= 1, (name, row)
    seen_by = evaluation["judges"]["dinov2"]
    assert seen_by.items() >= params["evaluate"]["judge_checkpoints"]["dinov2"].items()
    assert evaluation["protocol"]["image_judges"] == list(JUDGES)
    assert evaluation["protocol"]["shared_families"] == []
    assert len(set(evaluation["warnings"])) == len(evaluation["warnings"])
    page = (folder / "reports/index.html").read_text(encoding="utf-8")
    assert len(page) > 10_000
    assert "dinov2" in page
