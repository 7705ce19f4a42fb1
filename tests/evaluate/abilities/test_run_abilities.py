"""Abilities of generators that follow one known property of the audio, or none."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest

from pipeline_steps.core.l2_normalize import l2_normalize
from pipeline_steps.evaluate.abilities.base import AbilitySetup, choose_pairs, choose_single
from pipeline_steps.evaluate.abilities.definitions import ABILITIES
from pipeline_steps.evaluate.abilities.run_abilities import AbilityResults, ability_numbers, run_abilities
from pipeline_steps.evaluate.abilities.scores import ClassSpace
from pipeline_steps.evaluate.config import AbilitiesConfig, AbilityName
from pipeline_steps.evaluate.evaluation_plan import EvalAudio
from pipeline_steps.evaluate.metrics.bootstrap import Estimate
from pipeline_steps.evaluate.metrics.set_metrics import metric_entry
from tests.evaluate.abilities.property_generator import Property, PropertyGenerator
from tests.evaluate.synthetic_dataset import CLASSES, shape, tone


def color_features(images: np.ndarray) -> np.ndarray:
    """Unit rows of the mean color of the pixels that are not white, centered."""
    flat = images.reshape(*images.shape[:-3], -1, 3).astype(float)
    colored = (flat < 250).any(-1, keepdims=True)
    return l2_normalize((flat * colored).sum(-2) / np.maximum(colored.sum(-2), 1) - 90.0)


def setup_of(generator: PropertyGenerator, per_class: int = 4, labeled: bool = True) -> AbilitySetup:
    clips, audio = [], []
    for label, (hertz, _) in CLASSES.items():
        for number in range(per_class):
            clips.append(EvalAudio(f"{label}{number}", f"{label}{number}", label if labeled else None))
            audio.append(tone(hertz, number))
    real = np.stack([shape(color, number, 48) for _, color in CLASSES.values() for number in range(3)])
    classes = ClassSpace.fit(color_features(real), [label if labeled else None for label in CLASSES for _ in range(3)])
    return AbilitySetup(clips, audio, generator, classes, num_clips=6, num_samples=2, seed=0)


def entry(estimate: Estimate, of_pixels: bool) -> dict[str, Any]:
    return metric_entry(estimate, "pixels" if of_pixels else "colors", 0, 16_000)


def run(generator: PropertyGenerator, **changes: Any) -> AbilityResults:
    return run_abilities(list(ABILITIES), setup_of(generator, **changes), color_features, entry, 200)


@pytest.mark.parametrize(
    ("follows", "found"),
    [
        ("mixture", {"semantic_mixing", "interpolation"}),
        ("loudest", {"semantic_mixing", "interpolation"}),
        ("level", {"loudness"}),
        ("reverberation", {"acoustic_space"}),
        ("nothing", set()),
    ],
)
def test_only_the_ability_of_the_generator_is_found(follows: Property, found: set[str]) -> None:
    block = run(PropertyGenerator(follows)).block
    verdicts = {name: entry["verdict"] for name, entry in block.items() if entry["applicable"]}
    assert {name for name, verdict in verdicts.items() if verdict == "follows"} == found, verdicts
    assert block["words_and_sound"] | {"applicable": False, "reason": "the model reads no text"} == block["words_and_sound"]
    for name in found:
        sweep = block[name]["sweep"]
        assert abs(sweep["spearman"]["value"]) > 0.8
        assert sweep["shuffled_null"]["p"] < 0.01
        assert sweep["holm_p"] <= 4 * sweep["page_p"] + 1e-6
        assert block[name]["sentence"].startswith("Found: ")
        assert len(sweep["curve"]) == len(ABILITIES[name].points)
    for name in set(verdicts) - found:
        assert block[name]["sentence"].startswith("Not ")


def test_jumps_and_steps_are_distinguished() -> None:
    jump, steps = (run(PropertyGenerator(follows)).block["semantic_mixing"] for follows in ("loudest", "mixture"))
    assert jump["sweep"]["largest_step"]["value"] > 0.8
    assert "in a jump" in jump["sentence"]
    assert steps["sweep"]["largest_step"]["value"] < 0.5
    assert "in steps" in steps["sentence"]


def test_words_and_sound_needs_a_text_encoder_that_uses_the_words() -> None:
    reading = run(PropertyGenerator("loudest", has_text_encoder=True)).block["words_and_sound"]
    assert reading["verdict"] == "follows"
    assert reading["minus_control"]["empty_prompt"]["log_odds_at_half_weight"]["value"] < 0, "the word has an effect"
    ignoring = run(PropertyGenerator("loudest", has_text_encoder=True, reads_words=False)).block["words_and_sound"]
    assert ignoring["minus_control"]["empty_prompt"]["log_odds_at_half_weight"]["value"] == 0.0


def test_tracked_numbers_and_shown_sweeps() -> None:
    results = run(PropertyGenerator("level"))
    numbers = ability_numbers(results.block)
    assert numbers["abilities/model/loudness.spearman"] == 1.0
    assert numbers["abilities/constant_level/loudness.spearman"] == 0.0
    assert not any("words_and_sound" in name for name in numbers)
    shown = [sweep for sweep in results.shown if sweep.ability == "loudness"]
    assert [sweep.condition for sweep in shown] == ["sweep", "constant_level"] * 2
    assert shown[0].images.shape[0] == len(shown[0].audio) == 7


def test_abilities_that_cannot_be_measured_have_a_reason() -> None:
    unlabeled = run(PropertyGenerator("nothing"), labeled=False).block
    assert "fewer than two classes" in unlabeled["semantic_mixing"]["reason"]
    assert unlabeled["loudness"]["applicable"]
    single = run(PropertyGenerator("nothing"), per_class=1).block
    assert "0 of the held-out sounds can be used, 3 are needed" in single["interpolation"]["reason"]


def test_clips_are_used_once_and_pairs_have_different_classes() -> None:
    setup = setup_of(PropertyGenerator("nothing"), per_class=6)
    items = choose_pairs(setup, with_other=True)
    assert len(items) == 6
    used = [clip for item in items for clip in (item.first, item.second, item.other)]
    assert len(set(used)) == len(used)
    for item in items:
        assert setup.label(item.first) == setup.label(item.other) != setup.label(item.second)
    assert len({item.first for item in choose_single(setup)}) == 6


def test_configuration_lists_the_abilities() -> None:
    assert tuple(AbilitiesConfig().names) == get_args(AbilityName) == tuple(ABILITIES)
