"""The gate: what a challenger must show before it may become champion. Its rules are a file, `infra/gate.yaml`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from pipeline_steps.core.config import StageConfig, load_params, parse_section
from pipeline_steps.core.errors import ConfigError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.registry.evaluation_results import MetricComparison

Name = Annotated[str, Field(min_length=3, max_length=200, pattern=r"^[a-z_]+/[A-Za-z0-9_.\-]+$")]


class ImprovementRule(StageConfig):
    """A metric that must improve."""

    metric: Name
    least: float = Field(0.0, ge=0, description="smallest gain, in the metric's unit")
    beyond_noise: bool = Field(True, description="the 95 % interval of the paired difference must lie above zero")


class NonRegressionRule(StageConfig):
    """A metric that must not get worse."""

    metric: Name
    tolerance: float = Field(0.0, ge=0, description="loss that is still accepted, in the metric's unit")


class PromotionGate(StageConfig):
    """Section `promotion` of `infra/gate.yaml`."""

    improve: Annotated[list[ImprovementRule], Field(min_length=1, max_length=50)]
    must_not_worsen: Annotated[list[NonRegressionRule], Field(max_length=50)] = Field(default=[])
    least_clusters: int = Field(20, ge=2, le=1_000_000, description="independent test sounds below which nothing is promoted")


@dataclass(frozen=True, slots=True)
class GateResult:
    """What the gate says.

    Attributes:
        passed: the challenger may become champion.
        reasons: one line a rule: what was asked, what was found.
        comparable: both were judged on the same data; if not, no one may promote.
        metrics: every metric compared; empty without a champion, or when nothing can be compared.
    """

    passed: bool
    reasons: tuple[str, ...]
    comparable: bool = True
    metrics: tuple[MetricComparison, ...] = ()

    def markdown(self) -> str:
        """The verdict, its reasons and the table of metrics."""
        lines = [f"**{'The gate is passed' if self.passed else 'The gate is not passed'}**", ""]
        lines += [f"- {reason}" for reason in self.reasons]
        if self.metrics:
            lines += [
                "",
                "| metric | champion | challenger | difference (95 % interval) | p | n | |",
                "|---|---|---|---|---|---|---|",
            ]
            for found in self.metrics:
                gap = found.difference
                interval = "" if gap.low is None or gap.high is None else f" ({gap.low:+.4f} to {gap.high:+.4f})"
                p = "" if gap.p is None else f"{gap.p:.3f}"
                arrow = "higher is better" if found.higher_is_better else "lower is better"
                lines.append(
                    f"| {found.metric} ({arrow}) | {found.a:.4f} | {found.b:.4f} | {gap.value:+.4f}{interval} | {p} | {gap.n} "
                    f"| {found.verdict} |"
                )
        return "\n".join(lines) + "\n"


def gate_file(layout: ProjectPaths) -> Path:
    """Where the rules are."""
    return layout.root / "infra/gate.yaml"


def read_gate(layout: ProjectPaths) -> PromotionGate:
    """The rules.

    Raises:
        ConfigError: the file is missing or wrong.
    """
    path = gate_file(layout)
    params = load_params(path)
    try:
        return parse_section(PromotionGate, "promotion", params)
    except ConfigError as error:
        raise ConfigError(error.reason.replace("params.yaml", str(path)), f"correct {path}") from error


def evaluate_gate(gate: PromotionGate, metrics: Sequence[MetricComparison]) -> GateResult:
    """Hold the comparison (A the champion, B the challenger) against the rules. Pure."""
    by_name = {found.metric: found for found in metrics}
    checks = [_improves(rule, by_name, gate.least_clusters) for rule in gate.improve]
    checks += [_keeps(rule, by_name) for rule in gate.must_not_worsen]
    reasons = tuple(f"{'yes' if passed else 'NO'}: {text}" for passed, text in checks)
    return GateResult(all(passed for passed, _ in checks), reasons, True, tuple(metrics))


def _improves(rule: ImprovementRule, by_name: dict[str, MetricComparison], least_clusters: int) -> tuple[bool, str]:
    found = by_name.get(rule.metric)
    if found is None:
        return False, _unknown(rule.metric, by_name)
    interval = found.gain_interval
    shown = f"{rule.metric} gains {found.gain:+.4f}" + (f" ({interval[0]:+.4f} to {interval[1]:+.4f})" if interval else "")
    if found.difference.clusters < least_clusters:
        return False, f"{shown}, but rests on {found.difference.clusters} independent sounds; {least_clusters} are asked for"
    if found.gain < rule.least or found.gain <= 0:
        return False, f"{shown}; at least {rule.least:+.4f} is asked for"
    if rule.beyond_noise and (interval is None or interval[0] <= 0):
        return False, f"{shown}, which may be chance: the interval must lie above zero"
    return True, shown


def _keeps(rule: NonRegressionRule, by_name: dict[str, MetricComparison]) -> tuple[bool, str]:
    found = by_name.get(rule.metric)
    if found is None:
        return False, _unknown(rule.metric, by_name)
    text = f"{rule.metric} changes by {found.gain:+.4f} (above zero is better); a loss of {rule.tolerance:.4f} is accepted"
    return found.gain >= -rule.tolerance, text


def _unknown(metric: str, by_name: dict[str, MetricComparison]) -> str:
    return f"{metric} is not in both evaluations; they share: {', '.join(sorted(by_name)) or 'nothing'}"
