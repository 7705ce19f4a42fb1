"""Tests of the promotion gate."""

from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline_steps.core.errors import ConfigError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.registry.evaluation_results import MetricComparison
from pipeline_steps.tracking.registry.paired_bootstrap import PairedDifference
from pipeline_steps.tracking.registry.promotion_gate import PromotionGate, evaluate_gate, read_gate

PROJECT = Path(__file__).resolve().parents[3]


def metric(name: str, gain: float, low: float, high: float, higher: bool = True, clusters: int = 30) -> MetricComparison:
    """A comparison with this gain; for a distance the difference has the opposite sign."""
    signed = (gain, low, high) if higher else (-gain, -high, -low)
    return MetricComparison(name, higher, 0.5, 0.5 + signed[0], PairedDifference(*signed, 0.01, clusters, clusters))


def gate(**more: object) -> PromotionGate:
    rules = {
        "improve": [{"metric": "test/rate", "least": 0.02}],
        "must_not_worsen": [{"metric": "test/kid", "tolerance": 0.01}],
    }
    return PromotionGate.model_validate(rules | more)


UNCHANGED = metric("test/kid", 0.0, -0.01, 0.01, higher=False)


def test_significant_improvement_passes() -> None:
    found = evaluate_gate(gate(), [metric("test/rate", 0.05, 0.01, 0.09), UNCHANGED])
    assert found.passed
    assert all(reason.startswith("yes") for reason in found.reasons)


@pytest.mark.parametrize(
    ("metrics", "why"),
    [
        ([metric("test/rate", 0.05, -0.01, 0.11), UNCHANGED], "the interval must be above zero"),
        ([metric("test/rate", 0.01, 0.005, 0.02), UNCHANGED], r"at least \+0.0200"),
        ([metric("test/rate", 0.05, 0.01, 0.09, clusters=7), UNCHANGED], "on 7 independent clips; at least 20 are required"),
        (
            [metric("test/rate", 0.05, 0.01, 0.09), metric("test/kid", -0.02, -0.03, 0.0, higher=False)],
            "kid changes by -0.0200",
        ),
        ([metric("test/rate", 0.05, 0.01, 0.09)], "test/kid is not in both evaluations; common metrics: test/rate"),
    ],
)
def test_unmet_rules_are_named(metrics: list[MetricComparison], why: str) -> None:
    import re

    found = evaluate_gate(gate(), metrics)
    assert not found.passed
    assert any(reason.startswith("NO: ") and re.search(why, reason) for reason in found.reasons)


def test_distances_improve_downwards() -> None:
    rule = gate(improve=[{"metric": "test/kid", "least": 0.01}], must_not_worsen=[])
    assert evaluate_gate(rule, [metric("test/kid", 0.02, 0.01, 0.03, higher=False)]).passed
    assert not evaluate_gate(rule, [metric("test/kid", -0.02, -0.03, -0.01, higher=False)]).passed


def test_beyond_noise_can_be_disabled() -> None:
    rule = gate(improve=[{"metric": "test/rate", "beyond_noise": False}], must_not_worsen=[])
    assert evaluate_gate(rule, [metric("test/rate", 0.05, -0.01, 0.11)]).passed


def test_markdown_shows_verdict_reasons_and_numbers() -> None:
    text = evaluate_gate(gate(), [metric("test/rate", 0.05, 0.01, 0.09), UNCHANGED]).markdown()
    assert "The gate is passed" in text
    assert "| test/rate (higher is better) | 0.5000 | 0.5500 | +0.0500 (+0.0100 to +0.0900) | 0.010 | 30 | better |" in text


def test_gate_of_this_project_is_valid_and_its_metrics_exist() -> None:
    found = read_gate(ProjectPaths(PROJECT))
    params = YAML(typ="safe").load((PROJECT / "params.yaml").read_text())["evaluate"]
    judge = params["image_judges"][0]
    metrics = {f"{group}/{name}" for group in ("test", "gold") for name in (
        f"win_rate_{judge}", f"ais_win_rate_{params['audio_judge']}_{judge}", f"kid_{judge}")}  # fmt: skip
    assert {rule.metric for rule in (*found.improve, *found.must_not_worsen)} <= metrics


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("promotion: {improve: []}", "improve"),
        ("promotion: {improve: [{metric: test/x, leest: 1}]}", "leest is unknown"),
        ("promotion: {improve: [{metric: no-set}]}", "metric"),
        ("other: 1", "gate.yaml has no section 'promotion'"),
    ],
)
def test_invalid_files_are_refused_with_the_key(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "infra").mkdir()
    (tmp_path / "infra/gate.yaml").write_text(text)
    with pytest.raises(ConfigError, match=why):
        read_gate(ProjectPaths(tmp_path))


def test_a_project_without_the_file_has_the_gate_of_the_package(tmp_path: Path) -> None:
    assert read_gate(ProjectPaths(tmp_path)) == read_gate(ProjectPaths(PROJECT))
