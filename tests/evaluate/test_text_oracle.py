"""Text oracle and caption route: rows of models with a text encoder, generated from captions and never from labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.diffusion.audio_prompt import AudioPrompt
from pipeline_steps.diffusion.audio_tokens import AstTokenizer
from pipeline_steps.diffusion.ip_adapter import AudioIPAdapter
from pipeline_steps.diffusion.perceiver_resampler import PerceiverResampler
from pipeline_steps.diffusion.pipelines.base import GenerationConfig
from pipeline_steps.diffusion.pipelines.ip_adapter import AudioIPAdapterPipeline, save_adapter
from pipeline_steps.diffusion.pipelines.safetensors_io import copy_encoder_weights
from pipeline_steps.diffusion.stable_diffusion import StableDiffusionBackbone
from pipeline_steps.evaluate.config import AbilitiesConfig, EvaluateConfig
from pipeline_steps.evaluate.evaluation_plan import EvalAudio, EvalPair, EvaluationPlan, pair_texts
from pipeline_steps.evaluate.generation import load_generator
from pipeline_steps.evaluate.metrics.win_rate_rows import JudgeFeatures, win_rates_per_pair
from pipeline_steps.evaluate.stage import evaluate, find_audio_tagger
from pipeline_steps.models.audio.ast import AstEncoder
from pipeline_steps.models.audio.yamnet import YamNet
from pipeline_steps.tracking.client.tracker import NoOpTracker
from tests.evaluate.synthetic_dataset import CLASSES, CONFIG, ColorGenerator, OtherReports, SyntheticDataset, TextColorGenerator
from tests.factories.checkpoints.ast import ast_checkpoint
from tests.factories.checkpoints.stable_diffusion import stable_diffusion
from tests.factories.checkpoints.vision_towers import dinov2_checkpoint

WITH_DINOV2 = {
    "image_judges": ["dinov2"],
    "judge_checkpoints": {"dinov2": {"model": "models/dinov2"}},
    "gain_sensitivity": {"num_clips": 0},
}
SETTINGS = EvaluateConfig.model_validate({**CONFIG.model_dump(), **WITH_DINOV2})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> SyntheticDataset:
    made = SyntheticDataset(tmp_path_factory.mktemp("world"), assets)
    dinov2_checkpoint(made.layout.root / "models/dinov2")  # random weights distinguish colors; the network is small
    return made


class RecordingTextGenerator(TextColorGenerator):
    """Records the texts that it receives."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def generate_from_text(self, texts: Any, num_samples: int, seed: int) -> Any:
        self.texts += texts
        return super().generate_from_text(texts, num_samples, seed)


def test_a_model_with_a_text_encoder_has_the_text_rows(world: SyntheticDataset, tmp_path: Path) -> None:
    generator = RecordingTextGenerator()
    evaluate(SETTINGS, OtherReports(world.layout.root, tmp_path), generator, NoOpTracker())
    phrases = {f"a {label}" for label in CLASSES}
    assert phrases < set(generator.texts)  # and the tags of the clips
    assert generator.texts == sorted(set(generator.texts))  # each text once
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    for name in ("test", "gold", "gold_seen_classes"):
        row = evaluation[name]["rows"]["text_oracle"]
        assert row["win_rate_dinov2"]["value"] > 0.9
        assert row["win_rate_dinov2"]["n"] == evaluation[name]["n_pairs"]
        assert "applicable" not in row
        route = evaluation[name]["rows"]["caption_route"]["win_rate_dinov2"]
        assert route["value"] is None or 0 <= route["value"] <= 1
    row = evaluation["test"]["rows"]["text_oracle"]
    assert set(row) == set(evaluation["test"]["rows"]["model"])
    assert row["kid_dinov2"]["n"] == 3 * CONFIG.samples_per_audio
    assert row["kid_dinov2"]["clusters"] == 3
    assert "not applicable" not in (tmp_path / "index.html").read_text()
    assert "win_rate_dinov2.text_oracle" in (tmp_path / "plots/per_pair.csv").read_text().splitlines()[0]
    # The text rows do not change the other rows.
    without_text = tmp_path / "without"
    evaluate(SETTINGS, OtherReports(world.layout.root, without_text), ColorGenerator(), NoOpTracker())
    without = json.loads((without_text / "evaluation.json").read_text())
    assert without["test"]["rows"]["model"] == evaluation["test"]["rows"]["model"]
    for name in ("text_oracle", "caption_route"):
        assert without["test"]["rows"][name]["applicable"] is False


@pytest.fixture(scope="module")
def exported_adapter(world: SyntheticDataset, assets: Path) -> Path:
    """A tiny Stable Diffusion with random weights and an untrained adapter, as the stage `train` exports it."""
    root = world.layout.root
    ast_checkpoint(root / "models/ast")
    torch.manual_seed(0)
    backbone = StableDiffusionBackbone(str(stable_diffusion(root / "models/diffusion"))).load()
    resampler = PerceiverResampler(24, 12, num_queries=2, output_width=24, dim=16, depth=1, heads=2)
    adapter = AudioIPAdapter(backbone, resampler, AudioPrompt("a drawing of {}"))
    generation_config = GenerationConfig(num_inference_steps=2, guidance_scale=2.0, max_seconds=1.0, resolution=64)
    pipeline = AudioIPAdapterPipeline(adapter, backbone.build_scheduler("dpm++"), None, generation_config)
    save_adapter(root / "models/adapter", pipeline, AstTokenizer(AstEncoder(str(root / "models/ast")), YamNet(assets)), assets)
    return root / "models/adapter"


def test_the_tagger_is_that_of_the_model_or_of_the_assets(world: SyntheticDataset, assets: Path, tmp_path: Path) -> None:
    assert find_audio_tagger(ProjectPaths(tmp_path)) is None
    tagger = find_audio_tagger(world.layout)
    assert tagger is not None
    assert tagger.assets == world.layout.assets
    copy_encoder_weights(assets, ProjectPaths(tmp_path).model / "encoder")
    own = find_audio_tagger(ProjectPaths(tmp_path))
    assert own is not None
    assert own.assets == ProjectPaths(tmp_path).model / "encoder"
    assert own.load().class_names == tagger.load().class_names


def test_the_text_rows_of_an_exported_adapter(world: SyntheticDataset, exported_adapter: Path, tmp_path: Path) -> None:
    source = load_generator(exported_adapter, None, None)
    assert source.has_text_encoder
    assert source.families == {"ast", "clip", "yamnet"}  # clip: the text encoder of the backbone
    abilities = AbilitiesConfig(names=["words_and_sound", "interpolation"], num_clips=3, num_samples=1)
    config = SETTINGS.model_copy(update={"abilities": abilities})
    evaluate(config, OtherReports(world.layout.root, tmp_path), source, NoOpTracker())
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    row = evaluation["test"]["rows"]["text_oracle"]
    for name, points in (("words_and_sound", 5), ("interpolation", 9)):
        sweep = evaluation["abilities"][name]["sweep"]
        assert sweep["spearman"]["n"] == 3
        assert len(sweep["curve"]) == points
        assert all(np.isfinite(point["value"]) for point in sweep["curve"])
    assert 0 <= row["win_rate_dinov2"]["value"] <= 1
    assert row["win_rate_dinov2"]["n"] == 6
    assert row["kid_dinov2"]["n"] == 6


def item(name: str, image: str, sound: int) -> EvalPair:
    return EvalPair(name, image, image, sound)


def test_texts_are_phrases_of_the_pair_or_events_of_the_image() -> None:
    sounds = (EvalAudio("s0", "g0", "dog label"), EvalAudio("s1", "g1", "rain label"))
    sets = {"test": (item("p0", "i0", 0), item("p1", "i1", 1)), "gold": (item("gold 0", "i2", 0), item("gold 1", "i3", 1))}
    plan = EvaluationPlan(sounds, sets)
    pairs = [
        {"pair_id": "p0", "tracks": [{"phrase": "a dog barking"}, {"phrase": "rain on a roof"}]},
        {"pair_id": "p1", "tracks": [{"phrase": "rain falling"}]},
    ]
    events = [
        {"image_id": "i2", "rank": 1, "phrase": "wind in trees"},
        {"image_id": "i2", "rank": 0, "phrase": "a dog panting"},
        {"image_id": "i1", "rank": 0, "phrase": "not what pairing used"},
    ]
    words = pair_texts(plan, pairs, events)
    assert words == {"p0": "a dog barking and rain on a roof", "p1": "rain falling", "gold 0": "a dog panting"}
    assert not any("label" in text for text in words.values())


def test_a_pair_without_text_or_without_negatives_of_another_text_has_no_rate() -> None:
    sounds = [EvalAudio(f"s{row}", f"g{row}", None) for row in range(3)]
    items = [item(f"p{row}", f"i{row}", row) for row in range(3)]
    targets = np.eye(3)
    from_text = np.repeat(np.eye(3)[:2][:, None], 2, axis=1)  # text n gives the target of pair n
    empty = [np.array([], np.int64)] * 3

    def rates(text: list[int]) -> list[float]:
        features = JudgeFeatures(
            targets, np.repeat(targets[:, None], 2, 1), np.zeros((2, 3)), targets, empty, empty, from_text, np.array(text)
        )
        return win_rates_per_pair(features, sounds, items)["text_oracle"].tolist()

    np.testing.assert_array_equal(rates([0, 1, -1]), [1.0, 1.0, np.nan])
    np.testing.assert_array_equal(rates([1, 0, 0]), [0.0, 0.0, 0.5])
    np.testing.assert_array_equal(rates([0, 0, 0]), [np.nan] * 3)
