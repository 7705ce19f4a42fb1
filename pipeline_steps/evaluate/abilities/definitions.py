"""The abilities: semantic mixing, interpolation, loudness, acoustic space, words beside a sound."""

from __future__ import annotations

from pipeline_steps.audio.loudness import integrated_loudness
from pipeline_steps.core.array_types import ByteArray, DoubleArray, FloatArray
from pipeline_steps.evaluate.abilities.base import SWEEP, Ability, AbilityItem, AbilitySetup, Sweep, choose_pairs, choose_single
from pipeline_steps.evaluate.abilities.scores import ClassSpace, foreground_area, plain_ground
from pipeline_steps.evaluate.abilities.stimuli import (
    RATE,
    levels,
    mixtures,
    pad_tail,
    restore_level,
    reverberant,
    set_loudness,
)


class _BetweenClasses(Ability):
    """Sweep from the class of the first clip to that of the second; the score is the log-odds of the second class."""

    score_name = "log-odds of B against A"
    direction = 1

    def items(self, setup: AbilitySetup) -> list[AbilityItem]:
        return choose_pairs(setup, with_other=True)

    def scores(self, setup: AbilitySetup, item: AbilityItem, images: ByteArray, features: DoubleArray) -> DoubleArray:
        return _classes(setup).log_odds(features, setup.label(item.second), setup.label(item.first))

    def describe_item(self, setup: AbilitySetup, item: AbilityItem) -> str:
        return f"A {setup.label(item.first)}, B {setup.label(item.second)}"


class SemanticMixing(_BetweenClasses):
    """Two sounds at once, the second one louder and louder."""

    name = "semantic_mixing"
    title = "Semantic mixing"
    claim = "the image changes from A to B as B becomes louder than A in a mixture"
    axis = "gain of B against A, dB"
    points = (-24.0, -18.0, -12.0, -6.0, 0.0, 6.0, 12.0, 18.0, 24.0)
    flat_controls = ("another_clip_of_a",)

    def conditions(self, setup: AbilitySetup, item: AbilityItem) -> dict[str, Sweep]:
        first, second, other = _audio(setup, item)
        return {
            SWEEP: setup.from_audio(mixtures(first, second, self.points)),
            "another_clip_of_a": setup.from_audio(mixtures(first, other, self.points)),
        }

    def extras(self, setup: AbilitySetup, item: AbilityItem, images: ByteArray, features: DoubleArray) -> dict[str, float]:
        equal = features[self.points.index(0.0)]
        found = [_classes(setup).found(equal, setup.label(clip)) for clip in (item.first, item.second)]
        both = found[0] & found[1]
        return {f"{name}_found_at_0_db": float(values.mean()) for name, values in zip("ab", found, strict=True)} | {
            "both_found_at_0_db": float(both.mean())
        }


class Interpolation(_BetweenClasses):
    """Audio embeddings between those of two sounds."""

    name = "interpolation"
    title = "Interpolation"
    claim = "the image changes from A to B along the interpolation between their audio embeddings"
    axis = "position between A (0) and B (1)"
    points = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
    flat_controls = ("two_clips_of_a",)

    def conditions(self, setup: AbilitySetup, item: AbilityItem) -> dict[str, Sweep]:
        first, second, other = (set_loudness(clip) for clip in _audio(setup, item))

        def between(end: FloatArray) -> Sweep:
            def generate() -> ByteArray:
                return setup.generator.generate_interpolated(first, end, self.points, setup.num_samples, setup.seed)

            return Sweep([first, end], generate)

        return {SWEEP: between(second), "two_clips_of_a": between(other)}


class _AreaAbility(Ability):
    """Sweep of a property that every clip has; the score is the area of the foreground."""

    score_name = "foreground, fraction of the image"
    pixel_score = True

    def items(self, setup: AbilitySetup) -> list[AbilityItem]:
        return choose_single(setup)

    def scores(self, setup: AbilitySetup, item: AbilityItem, images: ByteArray, features: DoubleArray) -> DoubleArray:
        return foreground_area(images)

    def extras(self, setup: AbilitySetup, item: AbilityItem, images: ByteArray, features: DoubleArray) -> dict[str, float]:
        return {"plain_ground": float(plain_ground(images).mean())}

    def describe_item(self, setup: AbilitySetup, item: AbilityItem) -> str:
        return setup.clips[item.first].label or "class not known"


class LoudnessAbility(_AreaAbility):
    """The same clip softer and louder."""

    name = "loudness"
    title = "Loudness"
    claim = "the foreground becomes larger as the clip becomes louder"
    axis = "gain, dB"
    points = (-24.0, -18.0, -12.0, -6.0, 0.0, 6.0, 12.0)
    direction = 1
    flat_controls = ("constant_level",)

    def conditions(self, setup: AbilitySetup, item: AbilityItem) -> dict[str, Sweep]:
        clips = levels(setup.audio[item.first], self.points)
        reference = clips[self.points.index(0.0)]
        return {
            SWEEP: setup.from_audio(clips),
            "constant_level": setup.from_audio([restore_level(clip, reference) for clip in clips]),
        }


class AcousticSpace(_AreaAbility):
    """The same clip in rooms with longer and longer reverberation, at equal loudness."""

    name = "acoustic_space"
    title = "Acoustic space"
    claim = "the foreground area changes with the reverberation time of the room"
    axis = "reverberation time T60, s"
    points = (0.3, 0.6, 1.0, 1.4, 1.9, 2.4)
    direction = 0
    flat_controls = ("dry", "matched_gain")

    def conditions(self, setup: AbilitySetup, item: AbilityItem) -> dict[str, Sweep]:
        samples = setup.audio[item.first]
        dry = pad_tail(samples, max(self.points))
        wet = reverberant(samples, self.points, setup.seed)
        gains = [integrated_loudness(clip, RATE) - integrated_loudness(dry, RATE) for clip in wet]
        return {
            SWEEP: setup.from_audio([set_loudness(clip) for clip in wet]),
            "dry": setup.from_audio([dry.copy() for _ in self.points]),
            "matched_gain": setup.from_audio(levels(dry, gains)),
        }


class WordsAndSound(Ability):
    """A word beside a sound of another class, with more and more weight of the sound."""

    name = "words_and_sound"
    title = "Words and sound"
    claim = "the image changes from the word to the audio as the weight of the audio increases"
    axis = "weight of the sound"
    score_name = "log-odds of the sound's class against the word's"
    points = (0.0, 0.25, 0.5, 0.75, 1.0)
    direction = 1
    flat_controls = ()
    requires_text = True

    def items(self, setup: AbilitySetup) -> list[AbilityItem]:
        return choose_pairs(setup, with_other=False)

    def conditions(self, setup: AbilitySetup, item: AbilityItem) -> dict[str, Sweep]:
        clip = set_loudness(setup.audio[item.first])

        def beside(text: str) -> Sweep:
            def generate() -> ByteArray:
                return setup.generator.generate_with_text(clip, text, self.points, setup.num_samples, setup.seed)

            return Sweep([clip], generate)

        return {SWEEP: beside(setup.label(item.second).replace("_", " ")), "empty_prompt": beside("")}

    def scores(self, setup: AbilitySetup, item: AbilityItem, images: ByteArray, features: DoubleArray) -> DoubleArray:
        return _classes(setup).log_odds(features, setup.label(item.first), setup.label(item.second))

    def extras(self, setup: AbilitySetup, item: AbilityItem, images: ByteArray, features: DoubleArray) -> dict[str, float]:
        scores = self.scores(setup, item, images, features)
        return {"log_odds_at_half_weight": float(scores[self.points.index(0.5)].mean())}

    def describe_item(self, setup: AbilitySetup, item: AbilityItem) -> str:
        return f"sound {setup.label(item.first)}, word {setup.label(item.second)}"


ABILITIES: dict[str, Ability] = {
    ability.name: ability
    for ability in (SemanticMixing(), Interpolation(), LoudnessAbility(), AcousticSpace(), WordsAndSound())
}
"""Abilities by name, in the order of the report."""


def _classes(setup: AbilitySetup) -> ClassSpace:
    assert setup.classes is not None
    return setup.classes


def _audio(setup: AbilitySetup, item: AbilityItem) -> tuple[FloatArray, FloatArray, FloatArray]:
    assert item.second is not None
    assert item.other is not None
    return setup.audio[item.first], setup.audio[item.second], setup.audio[item.other]


def needs_classes(ability: Ability) -> bool:
    """Whether an ability is scored in the class space of the judge."""
    return not ability.pixel_score
