"""Registry of judges: a new judge is one file; a lookup imports only that module; the configuration is validated."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline_steps.core.config import parse_section
from pipeline_steps.core.errors import ConfigError
from pipeline_steps.evaluate.config import EvaluateConfig
from pipeline_steps.evaluate.judges.base import AUDIO_JUDGES, IMAGE_JUDGES
from pipeline_steps.evaluate.stage import evaluate
from pipeline_steps.tracking.client.tracker import NoOpTracker
from tests.evaluate.conftest import TOY
from tests.evaluate.synthetic_dataset import CONFIG, ColorGenerator, SyntheticDataset


def test_a_new_judge_is_one_file_and_one_line_of_parameters(toy: None, tmp_path: Path, assets: Path) -> None:
    (tmp_path / "project").mkdir()
    dataset = SyntheticDataset(tmp_path / "project", assets)
    section = {**CONFIG.model_dump(), "image_judges": ["toy"], "toy": {"grid": 3}}
    config = parse_section(EvaluateConfig, "evaluate", {"evaluate": section})
    evaluate(config, dataset.layout, ColorGenerator(), NoOpTracker())
    found = json.loads((dataset.layout.reports / "evaluation.json").read_text())
    rows = found["test"]["rows"]
    assert found["judges"]["toy"]["family"] == "toy"
    assert rows["model"]["win_rate_toy"]["value"] > 0.9
    assert rows["shuffled_audio"]["win_rate_toy"]["value"] < 0.5
    assert {"kid_toy", "mmd_rbf_toy", "fd_toy", "density_toy", "coverage_toy", "ais_win_rate_aisfx_toy"} < set(rows["model"])
    assert len(TOY.splitlines()) <= 50


def test_a_new_audio_judge_is_one_file_and_one_line_of_parameters(toy: None, tmp_path: Path, assets: Path) -> None:
    (tmp_path / "project").mkdir()
    dataset = SyntheticDataset(tmp_path / "project", assets)
    section = {**CONFIG.model_dump(), "image_judges": ["toy"], "audio_judge": "toy_audio"}
    config = parse_section(EvaluateConfig, "evaluate", {"evaluate": section})
    evaluate(config, dataset.layout, ColorGenerator(), NoOpTracker())
    found = json.loads((dataset.layout.reports / "evaluation.json").read_text())
    assert found["test"]["rows"]["model"]["ais_win_rate_toy_audio_toy"]["value"] > 0.75
    assert found["test"]["rows"]["shuffled_audio"]["ais_win_rate_toy_audio_toy"]["value"] < 0.5


def test_the_group_of_a_new_judge_is_validated(toy: None) -> None:
    section = {"image_judges": ["toy"], "toy": {"gird": 3}}
    with pytest.raises(ConfigError, match=r"evaluate\.toy\.gird is unknown; did you mean grid\?"):
        parse_section(EvaluateConfig, "evaluate", {"evaluate": section})


def test_names_of_the_judges() -> None:
    assert set(IMAGE_JUDGES.names()) == {
        "augnet", "clip", "dinov2", "efficientnet_lite0", "inception", "inception_v3", "siglip2", "ssd_mobilenet_v2",
    }  # fmt: skip
    assert AUDIO_JUDGES.names() == ("aisfx",)
    for registry in (IMAGE_JUDGES, AUDIO_JUDGES):
        for name in registry.names():
            assert registry.get(name).name == name


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"image_judges": ["dinov3"]}, r"unknown image judge 'dinov3' -> did you mean dinov2\?"),
        ({"audio_judge": "clip"}, "unknown audio judge 'clip'"),
        ({"judge_checkpoints": {"dinov3": {}}}, "dinov3 is neither an option nor a judge"),
        ({"judge_checkpoints": {"clip": {"modle": "x"}}}, r"judge_checkpoints\.clip\.modle is unknown; did you mean model\?"),
        ({"image_judges": ["clip"]}, r"judge clip needs judge_checkpoints\.clip\.model, a hub id or a folder"),
    ],
)
def test_errors_of_the_configuration(section: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_section(EvaluateConfig, "evaluate", {"evaluate": section})


def test_a_lookup_imports_only_the_module_of_the_judge(project: Path) -> None:
    code = """
import sys
from pipeline_steps.evaluate.config import EvaluateConfig
assert "torch" not in sys.modules
EvaluateConfig.from_params({"image_judges": ["augnet"]})
print([name for name in sys.modules if name.startswith("pipeline_steps.evaluate.judges.")])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=True)
    prefix = "pipeline_steps.evaluate.judges"
    assert set(json.loads(done.stdout.replace("'", '"'))) == {f"{prefix}.base", f"{prefix}.augnet", f"{prefix}.aisfx"}
