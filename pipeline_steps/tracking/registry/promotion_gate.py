"""Promotion gate: rules that a challenger must meet to become champion, read from `infra/gate.yaml`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from pipeline_steps.core.config import StageConfig, load_params, parse_section
from pipeline_steps.core.errors import ConfigError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.statistics import CHANCE, is_above_chance
from pipeline_steps.tracking.registry.evaluation_results import MetricComparison

Name = Annotated[str, Field(min_length=3, max_length=200, pattern=r"^[a-z_]+/[A-Za-z0-9_.\-]+$")]


class ImprovementRule(StageConfig):
    """Rule for a metric that must improve."""

    metric: Name
    least: float = Field(0.0, ge=0, description="smallest gain, in the metric's unit")
    beyond_noise: bool = Field(True, description="the 95 % interval of the paired difference must lie above zero")


class NonRegressionRule(StageConfig):
    """Rule for a metric that must not get worse."""

    metric: Name
    tolerance: float = Field(0.0, ge=0, description="largest accepted loss, in the metric's unit")


class PromotionGate(StageConfig):
    """Section `promotion` of `infra/gate.yaml`."""

    improve: Annotated[list[ImprovementRule], Field(min_length=1, max_length=50)]
    must_not_worsen: Annotated[list[NonRegressionRule], Field(max_length=50)] = Field(default=[])
    above_chance: Annotated[list[Name], Field(max_length=50)] = Field(
        default=[], description="win rates that must be above 0.5; default: the win rates of `improve`"
    )
    least_clusters: int = Field(20, ge=2, le=1_000_000, description="smallest number of independent test clips")


@dataclass(frozen=True, slots=True)
class GateResult:
    """Result of the promotion gate."""

    passed: bool  # whether the challenger meets every rule
    reasons: tuple[str, ...]  # one line per rule with the required and the measured value
    comparable: bool = True  # whether both models were evaluated on the same data; if not, the gate cannot be overridden
    at_chance: bool = False  # whether a win rate is not above chance; then the gate cannot be overridden
    # all compared metrics; empty without a champion or if the evaluations are not comparable
    metrics: tuple[MetricComparison, ...] = ()

    def markdown(self) -> str:
        """Verdict, reasons and table of metrics as Markdown."""
        lines = [f"**The gate is {'' if self.passed else 'not '}passed**", ""]
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
                name = f"{found.metric} ({'higher' if found.higher_is_better else 'lower'} is better)"
                row = (name, f"{found.a:.4f}", f"{found.b:.4f}", f"{gap.value:+.4f}{interval}", p, str(gap.n), found.verdict)
                lines.append(f"| {' | '.join(row)} |")
        return "\n".join(lines) + "\n"


def read_gate(layout: ProjectPaths) -> PromotionGate:
    """Read `infra/gate.yaml` of the project, else that of the package.

    Raises:
        ConfigError: the file is missing or not valid.
    """
    path = layout.packaged("infra/gate.yaml")
    params = load_params(path)
    try:
        return parse_section(PromotionGate, "promotion", params)
    except ConfigError as error:
        raise ConfigError(error.reason.replace("params.yaml", str(path)), f"correct {path}") from error


def check_floor(gate: PromotionGate, values: Mapping[str, Mapping[str, Any]]) -> GateResult:
    """Check that the challenger's win rates lie above chance, whether or not there is a champion. Pure.

    Args:
        gate: rules of the project.
        values: "set/metric" -> {value, low, high} of the challenger's evaluation.
    """
    names = gate.above_chance or [rule.metric for rule in gate.improve if rule.metric.partition("/")[2].startswith("win_rate")]
    reasons, at_chance = [], False
    for name in names:
        found = values.get(name)
        if found is None:
            reasons.append(f"NO: {name} is not in the evaluation, so nothing shows that the model uses the audio")
            continue
        low, high = found.get("low"), found.get("high")
        passed = is_above_chance(low)
        at_chance |= not passed
        interval = "without an interval" if low is None else f"({low:.4f} to {high:.4f})"
        rule = f"its interval must lie above chance ({CHANCE}), which nothing overrides"
        reasons.append(f"yes: {name} is above chance" if passed else f"NO: {name} is {found['value']:.4f} {interval}; {rule}")
    return GateResult(not any(text.startswith("NO") for text in reasons), tuple(reasons), at_chance=at_chance)


def evaluate_gate(gate: PromotionGate, metrics: Sequence[MetricComparison]) -> GateResult:
    """Evaluate the rules on metrics compared between the champion (A) and the challenger (B). Pure."""
    by_name = {found.metric: found for found in metrics}
    checks = [_check_improvement(rule, by_name, gate.least_clusters) for rule in gate.improve]
    checks += [_check_non_regression(rule, by_name) for rule in gate.must_not_worsen]
    reasons = tuple(f"{'yes' if passed else 'NO'}: {text}" for passed, text in checks)
    return GateResult(all(passed for passed, _ in checks), reasons, metrics=tuple(metrics))


def _check_improvement(rule: ImprovementRule, by_name: dict[str, MetricComparison], least_clusters: int) -> tuple[bool, str]:
    found = by_name.get(rule.metric)
    if found is None:
        return False, _missing_metric(rule.metric, by_name)
    interval = found.gain_interval
    text = f"{rule.metric} gains {found.gain:+.4f}" + (f" ({interval[0]:+.4f} to {interval[1]:+.4f})" if interval else "")
    if found.difference.clusters < least_clusters:
        return False, f"{text} on {found.difference.clusters} independent clips; at least {least_clusters} are required"
    if found.gain < rule.least or found.gain <= 0:
        return False, f"{text}; at least {rule.least:+.4f} is required"
    if rule.beyond_noise and (interval is None or interval[0] <= 0):
        return False, f"{text}; the interval must be above zero"
    return True, text


def _check_non_regression(rule: NonRegressionRule, by_name: dict[str, MetricComparison]) -> tuple[bool, str]:
    found = by_name.get(rule.metric)
    if found is None:
        return False, _missing_metric(rule.metric, by_name)
    text = f"{rule.metric} changes by {found.gain:+.4f} (above zero is better); a loss of {rule.tolerance:.4f} is accepted"
    return found.gain >= -rule.tolerance, text


def _missing_metric(metric: str, by_name: dict[str, MetricComparison]) -> str:
    return f"{metric} is not in both evaluations; common metrics: {', '.join(sorted(by_name)) or 'none'}"
