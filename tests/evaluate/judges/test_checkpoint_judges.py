"""Judges with a checkpoint in the whole stage, and the rejection of judges of used families."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline_steps.core.errors import ConfigError
from pipeline_steps.core.l2_normalize import l2_normalize
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.evaluate.config import EvaluateConfig
from pipeline_steps.evaluate.judges.base import IMAGE_JUDGES
from pipeline_steps.evaluate.judges.feature_extractors import CachedFeatures, extract_image_features, judge_setup
from pipeline_steps.evaluate.judges.independence import undeclared_family_warnings
from pipeline_steps.evaluate.metrics.distribution import CMMD_BANDWIDTH, cmmd_kernel, rbf_kernel
from pipeline_steps.evaluate.stage import evaluate
from pipeline_steps.tracking.client.tracker import NoOpTracker
from tests.evaluate.synthetic_dataset import CONFIG, ColorGenerator, OtherReports, SyntheticDataset, TextColorGenerator
from tests.factories.checkpoints.inception import inception_checkpoint
from tests.factories.checkpoints.vision_towers import clip_checkpoint, dinov2_checkpoint

SETTINGS = {"image_judges": ["dinov2", "clip", "inception"], "gain_sensitivity": {"num_clips": 0}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> SyntheticDataset:
    made = SyntheticDataset(tmp_path_factory.mktemp("world"), assets)
    root = made.layout.root
    dinov2_checkpoint(root / "models/dinov2")
    clip_checkpoint(root / "models/clip")
    inception_checkpoint(root / "models/inception")
    return made


@pytest.fixture(scope="module")
def config() -> EvaluateConfig:
    chosen = {name: {"model": f"models/{name}"} for name in ("dinov2", "clip", "inception")}
    return EvaluateConfig.model_validate({**CONFIG.model_dump(), **SETTINGS, "judge_checkpoints": chosen})


def test_the_stage_with_three_checkpoint_judges(world: SyntheticDataset, config: EvaluateConfig, tmp_path: Path) -> None:
    report = evaluate(config, OtherReports(world.layout.root, tmp_path), ColorGenerator(), NoOpTracker())
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    rows = evaluation["test"]["rows"]
    for name in ("dinov2", "clip", "inception"):
        judge = evaluation["judges"][name]
        assert judge["family"] == name
        assert len(judge["sha256"]) == 64
        assert rows["model"][f"kid_{name}"]["judge"] == name
        assert rows["real_images"][f"win_rate_{name}"]["value"] > 0.6  # random weights distinguish colors
        assert rows["model"][f"win_rate_{name}"]["value"] > rows["shuffled_audio"][f"win_rate_{name}"]["value"]
    assert "cmmd_clip" in rows["model"]
    assert {"mmd_rbf_dinov2", "mmd_rbf_inception"} < set(rows["model"])
    assert "mmd_rbf_clip" not in rows["model"]
    assert str(world.layout.root) not in (tmp_path / "evaluation.json").read_text()
    # A second run reads every feature from the cache and gives the same numbers.
    assert report.cache_misses > 0
    again = tmp_path / "again"
    second = evaluate(config, OtherReports(world.layout.root, again), ColorGenerator(), NoOpTracker())
    assert second.cache_misses == 0
    assert (again / "evaluation.json").read_bytes() == (tmp_path / "evaluation.json").read_bytes()


def test_the_page_explains_cmmd_if_clip_is_first(world: SyntheticDataset, config: EvaluateConfig, tmp_path: Path) -> None:
    alone = config.model_copy(update={"image_judges": ["clip"]})
    evaluate(alone, OtherReports(world.layout.root, tmp_path), ColorGenerator(), NoOpTracker())
    assert "<dt>cmmd_clip</dt><dd>CMMD" in (tmp_path / "index.html").read_text()


def meta(world: SyntheticDataset, folder: str, **value: object) -> None:
    path = getattr(world.layout, folder) / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **value}))


def test_clip_is_rejected_after_a_clip_captioner_or_text_encoder(
    world: SyntheticDataset, config: EvaluateConfig, tmp_path: Path
) -> None:
    layout = OtherReports(world.layout.root, tmp_path)
    meta(world, "captions", captioner="vlm", families=["clip", "llava"])
    try:
        with pytest.raises(ConfigError, match="judge clip has model family clip, which is also used in captions"):
            evaluate(config, layout, ColorGenerator(), NoOpTracker())
        evaluate(config.model_copy(update={"image_judges": ["dinov2"]}), layout, ColorGenerator(), NoOpTracker())
        flagged = config.model_copy(update={"image_judges": ["clip"], "allow_shared_family": True})
        evaluate(flagged, layout, ColorGenerator(), NoOpTracker())
        warnings = json.loads((tmp_path / "evaluation.json").read_text())["warnings"]
        assert "judge clip has model family clip, which is also used in captions" in warnings
    finally:
        meta(world, "captions", captioner="tagger", families=["efficientnet"])
    with pytest.raises(ConfigError, match="judge clip has model family clip, which is also used in model"):
        evaluate(config, layout, TextColorGenerator(families=frozenset({"ast", "clip"})), NoOpTracker())


def test_an_undeclared_vision_tower_gives_a_warning() -> None:
    judges = {"clip": "clip", "inception": "inception", "aisfx": "aisfx"}
    undeclared = undeclared_family_warnings(
        judges, {"captioner": "openai_server", "families": ["some-vlm"], "families_complete": False}
    )
    assert undeclared == [
        "judge clip has model family clip, and the vision tower of captioner openai_server is not declared: "
        "set caption.openai_server.vision_families"
    ]
    assert undeclared_family_warnings(judges, {"captioner": "openai_server", "families_complete": True}) == []
    assert undeclared_family_warnings(judges, {"captioner": "tagger", "families": ["efficientnet"]}) == []


def test_missing_weights_and_duplicate_judges_are_configuration_errors(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"judge dinov2 needs judge_checkpoints\.dinov2\.model"):
        EvaluateConfig(image_judges=["dinov2"])
    with pytest.raises(ValidationError, match="names a judge twice"):
        EvaluateConfig(image_judges=["augnet", "augnet"])
    lost = EvaluateConfig(image_judges=["clip"], judge_checkpoints={"clip": {"model": "models/nowhere"}})  # type: ignore[arg-type]
    judge = IMAGE_JUDGES.get("clip").from_setup(judge_setup(lost, "clip", ProjectPaths(tmp_path)))
    with pytest.raises(ConfigError, match=r"evaluate\.judge_checkpoints\.clip\.revision: '' is not a commit"):
        judge.fetch()
    needs_checkpoint = {name for name in IMAGE_JUDGES.names() if IMAGE_JUDGES.get(name).requires_checkpoint}
    assert needs_checkpoint == {"dinov2", "clip", "siglip2", "inception", "inception_v3"}


def test_cmmd_kernel_equals_the_formula_of_the_paper() -> None:
    """Kernel on unit rows: exp(-|x - y|^2 / 200)."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(5, 12)), random.normal(size=(4, 12))
    unit_x, unit_y = x / np.linalg.norm(x, axis=1, keepdims=True), y / np.linalg.norm(y, axis=1, keepdims=True)
    wanted = [[np.exp(-((a - b) ** 2).sum() / 200.0) for b in unit_y] for a in unit_x]
    np.testing.assert_allclose(cmmd_kernel(x, y), wanted, rtol=1e-12)
    np.testing.assert_array_equal(cmmd_kernel(7.0 * x, y), rbf_kernel(CMMD_BANDWIDTH)(l2_normalize(7.0 * x), l2_normalize(y)))


def test_batched_features_equal_single_ones(world: SyntheticDataset, config: EvaluateConfig) -> None:
    """Batch size of a GPU, computed on the CPU."""
    judge = IMAGE_JUDGES.get("dinov2").from_setup(judge_setup(config, "dinov2", world.layout))
    images = list(np.random.default_rng(3).integers(0, 256, (7, 48, 48, 3), dtype=np.uint8))
    one_by_one = extract_image_features(judge, images)

    class Batched(type(judge)):  # type: ignore[misc]
        batch_size = 4

    judge.__class__ = Batched
    np.testing.assert_allclose(extract_image_features(judge, images), one_by_one, rtol=1e-4, atol=1e-5)


def test_missing_features_are_computed_in_batches(tmp_path: Path) -> None:
    from pipeline_steps.core.result_cache import ResultCache
    from pipeline_steps.evaluate.judges.feature_extractors import VECTOR

    batches: list[list[str]] = []

    def compute(keys: list[str]) -> np.ndarray:
        batches.append(list(keys))
        return np.array([[len(key), 1.0] for key in keys], np.float32)

    cached = CachedFeatures(ResultCache(str(tmp_path), "stage", "f" * 16, VECTOR), 2)
    rows = cached.rows(["ccc", "a", "bb", "a"], compute)
    assert batches == [["a", "bb"], ["ccc"]]
    assert {key: row.tolist() for key, row in rows.items()} == {"a": [1, 1], "bb": [2, 1], "ccc": [3, 1]}
