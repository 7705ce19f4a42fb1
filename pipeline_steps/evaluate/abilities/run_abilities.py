"""Measure abilities: generate images along every sweep and its controls, score them, and test the trends. Writes nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline_steps.core.array_types import ByteArray, DoubleArray, FloatArray
from pipeline_steps.evaluate.abilities.base import SWEEP, Ability, AbilityItem, AbilitySetup
from pipeline_steps.evaluate.abilities.definitions import ABILITIES, needs_classes
from pipeline_steps.evaluate.abilities.trends import holm, largest_step, page_p_value, shuffled_null, spearman_rows
from pipeline_steps.evaluate.metrics.bootstrap import Estimate, mean_estimate

log = logging.getLogger(__name__)

Row = dict[str, Any]
Entry = Callable[[Estimate, bool], Row]

MIN_ITEMS = 3
"""Items below which a trend is not tested."""
SHOWN_ITEMS = 2
"""Items of an ability that the report shows."""
ALPHA = 0.05


@dataclass(frozen=True, slots=True)
class ShownSweep:
    """One condition of one item in the report: images [P, H, W, 3] of the first noise seed, and clips."""

    ability: str
    condition: str
    caption: str
    images: ByteArray
    audio: Sequence[FloatArray]


@dataclass(frozen=True, slots=True)
class AbilityResults:
    """Block `abilities` of `evaluation.json`, and what the report shows."""

    block: Row
    shown: list[ShownSweep]


@dataclass(frozen=True, slots=True)
class _Measured:
    """Scores [N, P], largest step [N] and further numbers [N] of one condition."""

    scores: DoubleArray
    steps: DoubleArray
    extras: dict[str, DoubleArray]

    @property
    def spearman(self) -> DoubleArray:
        return spearman_rows(self.scores)


def run_abilities(
    names: Sequence[str],
    setup: AbilitySetup,
    features: Callable[[ByteArray], DoubleArray],
    entry: Entry,
    num_bootstrap: int,
) -> AbilityResults:
    """Measure the abilities in the order of `ABILITIES`.

    Args:
        names: of the abilities.
        setup: clips, generator, class space, counts.
        features: unit rows [..., K] in the space of the judge of images [..., H, W, 3].
        entry: makes an entry of `evaluation.json` from an estimate; the flag says that it is of pixels and not of the judge.
        num_bootstrap: bootstrap and permutation resamples.
    """
    block: Row = {}
    shown: list[ShownSweep] = []
    measured: dict[str, tuple[dict[str, _Measured], list[str]]] = {}
    for ability in (ABILITIES[name] for name in ABILITIES if name in names):
        reason = _not_applicable(ability, setup)
        items = [] if reason else ability.items(setup)
        if not reason and len(items) < MIN_ITEMS:
            reason = f"{len(items)} of the held-out sounds can be used, {MIN_ITEMS} are needed"
            if needs_classes(ability):
                reason += "; their class must have a real calibration image, and clips of it and of another class"
        if reason:
            block[ability.name] = {"applicable": False, "title": ability.title, "reason": reason}
            continue
        log.info("measuring ability %s on %d sounds", ability.name, len(items))
        conditions, views = _measure(ability, setup, items, features)
        shown += views
        measured[ability.name] = conditions, [setup.clips[item.first].group for item in items]
    p_values = {
        name: page_p_value(conditions[SWEEP].scores, ABILITIES[name].direction) for name, (conditions, _) in measured.items()
    }
    adjusted = holm(p_values)
    for name, (conditions, clusters) in measured.items():
        block[name] = _summarize(ABILITIES[name], conditions, clusters, adjusted[name], setup, entry, num_bootstrap)
    return AbilityResults(block, shown)


def _not_applicable(ability: Ability, setup: AbilitySetup) -> str:
    if ability.requires_text and not setup.generator.has_text_encoder:
        return "the model reads no text"
    if needs_classes(ability) and setup.classes is None:
        return "the ground truth has fewer than two classes with a real calibration image"
    return ""


def _measure(
    ability: Ability, setup: AbilitySetup, items: Sequence[AbilityItem], features: Callable[[ByteArray], DoubleArray]
) -> tuple[dict[str, _Measured], list[ShownSweep]]:
    scores: dict[str, list[DoubleArray]] = {}
    steps: dict[str, list[float]] = {}
    extras: dict[str, list[dict[str, float]]] = {}
    shown = []
    for number, item in enumerate(items):
        for condition, sweep in ability.conditions(setup, item).items():
            images = sweep.generate()
            rows = features(images)
            scores.setdefault(condition, []).append(ability.scores(setup, item, images, rows).mean(1))
            steps.setdefault(condition, []).append(largest_step(rows))
            extras.setdefault(condition, []).append(ability.extras(setup, item, images, rows))
            if number < SHOWN_ITEMS:
                caption = ability.describe_item(setup, item)
                shown.append(ShownSweep(ability.name, condition, caption, images[:, 0], sweep.audio))
    return {
        condition: _Measured(
            np.stack(scores[condition]),
            np.array(steps[condition]),
            {name: np.array([found[name] for found in extras[condition]]) for name in extras[condition][0]},
        )
        for condition in scores
    }, shown


def _summarize(
    ability: Ability,
    conditions: Mapping[str, _Measured],
    clusters: Sequence[str],
    holm_p: float,
    setup: AbilitySetup,
    entry: Entry,
    num_bootstrap: int,
) -> Row:
    def estimate(values: DoubleArray) -> Estimate | None:
        known = np.flatnonzero(np.isfinite(values)).tolist()
        return mean_estimate(values[known], [clusters[row] for row in known], num_bootstrap, setup.seed) if known else None

    def row(values: DoubleArray, pixels: bool = ability.pixel_score) -> Row:
        found = estimate(values)
        return {"value": None, "reason": "no image moves"} if found is None else entry(found, pixels)

    def summary(measured: _Measured) -> Row:
        null = shuffled_null(measured.scores, ability.direction, num_bootstrap, setup.seed)
        return {
            "spearman": row(measured.spearman),
            "change": row(measured.scores[:, -1] - measured.scores[:, 0]),
            "largest_step": row(measured.steps, False),
            "page_p": round(page_p_value(measured.scores, ability.direction), 6),
            "shuffled_null": {"low": round(null.low, 6), "high": round(null.high, 6), "p": round(null.p, 6)},
            "curve": [{"at": at, **row(measured.scores[:, place])} for place, at in enumerate(ability.points)],
            **{name: row(values) for name, values in measured.extras.items()},
        }

    sweep = conditions[SWEEP]
    controls = {name: measured for name, measured in conditions.items() if name != SWEEP}
    found: Row = {
        "applicable": True,
        "title": ability.title,
        "axis": ability.axis,
        "score": ability.score_name,
        "direction": ability.direction,
        "samples": setup.num_samples,
        "even_step": round(1 / (len(ability.points) - 1), 6),
        "sweep": {**summary(sweep), "holm_p": round(holm_p, 6)},
        "controls": {name: summary(measured) for name, measured in controls.items()},
        "minus_control": {
            name: {
                "spearman": row(sweep.spearman - measured.spearman),
                **{key: row(values - measured.extras[key]) for key, values in sweep.extras.items()},
            }
            for name, measured in controls.items()
        },
    }
    found["verdict"] = verdict(found, ability.direction, ability.flat_controls)
    found["sentence"] = sentence(found, ability.claim)
    return found


def verdict(found: Row, direction: int, flat_controls: Sequence[str]) -> str:
    """`follows`, `control_follows` or `flat`.

    `follows`: the trend is significant in the family, the interval of the rank correlation excludes zero on the predicted
    side, and so do the paired differences to the controls that must be flat. `control_follows`: only these differences fail.
    """
    spearman = found["sweep"]["spearman"]
    sign = direction or (1 if spearman["value"] >= 0 else -1)
    if found["sweep"]["holm_p"] >= ALPHA or not _beyond_zero(spearman, sign):
        return "flat"
    above = all(_beyond_zero(found["minus_control"][name]["spearman"], sign) for name in flat_controls)
    return "follows" if above else "control_follows"


def _beyond_zero(entry: Row, sign: int) -> bool:
    end = entry["low"] if sign > 0 else entry["high"]
    return end is not None and sign * float(end) > 0


def sentence(found: Row, claim: str) -> str:
    """One sentence that says what was found, also for a flat result."""
    sweep = found["sweep"]
    step, even = sweep["largest_step"]["value"], found["even_step"]
    if found["verdict"] == "follows":
        opening = f"Found: {claim}"
        if step is not None:
            manner = "in a jump" if step >= 0.5 else "in steps"
            opening += f", {manner} (the largest step is {100 * step:.0f} % of the way; even steps are {100 * even:.0f} %)"
    elif found["verdict"] == "control_follows":
        opening = f"Not shown that {claim}: the control changes in the same way"
    else:
        opening = f"Not found that {claim}"
    numbers = f"mean Spearman {_interval(sweep['spearman'])} over {sweep['spearman']['n']} sounds, p {sweep['holm_p']:.2g}"
    for name, control in found["controls"].items():
        numbers += f"; control {control_text(name)} {_interval(control['spearman'])}"
    return f"{opening}: {numbers}."


def control_text(name: str) -> str:
    """Name of a control for readers; it may end in the name of a clip, A or B."""
    text = name.replace("_", " ")
    return text[:-1] + text[-1].upper() if text.endswith((" a", " b")) else text


def _interval(entry: Row) -> str:
    if entry["low"] is None:
        return f"{entry['value']:.2f}"
    return f"{entry['value']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"


def ability_numbers(block: Mapping[str, Row]) -> dict[str, float]:
    """Metrics for tracking: "abilities/<condition>/<ability>.<metric>", the sweep under the condition `model`."""
    numbers: dict[str, float] = {}
    for name, found in block.items():
        if not found["applicable"]:
            continue
        for condition, metrics in {"model": found["sweep"], **found["controls"]}.items():
            for metric, entry in metrics.items():
                if isinstance(entry, Mapping) and entry.get("value") is not None:
                    numbers[f"abilities/{condition}/{name}.{metric}"] = float(entry["value"])
        numbers[f"abilities/model/{name}.holm_p"] = float(found["sweep"]["holm_p"])
    return numbers
