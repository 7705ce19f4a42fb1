"""Audio prompt: sources of tags, their weights, and the weight of the level."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch

from pipeline_steps.diffusion.audio_prompt import AudioPrompt, blend, tag_sources
from pipeline_steps.diffusion.audio_tokens import AudioTokens

BARK, DOG, ANIMAL, MEOW, ROOM = 70, 69, 67, 78, 500


def tags(**probabilities: float) -> torch.Tensor:
    """Probabilities [521] that are zero except for the given tags."""
    values = torch.zeros(521)
    for name, probability in probabilities.items():
        values[globals()[name]] = probability
    return values


def encode(text: str) -> torch.Tensor:
    """Distinct embeddings of distinct texts."""
    return torch.full((1, 2, 3), float(len(text)))


def test_the_table_contains_the_tags_of_the_tagger(assets: Path, project: Path) -> None:
    with (assets / "audioset_classes.csv").open(encoding="utf-8") as stream:
        names = [row["display_name"] for row in csv.DictReader(stream)]
    with (project / "pipeline_steps/models/audio/tag_sources.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["tag"] for row in rows] == names
    assert len(tag_sources()) == 521
    for source, specificity in tag_sources():
        assert bool(source) == (specificity > 0), "a tag without a source has no weight"


def test_specific_tags_take_precedence_and_places_have_no_source() -> None:
    sources = AudioPrompt().sources(tags(ANIMAL=0.9, DOG=0.5, BARK=0.6, ROOM=0.99))
    assert sources[0][0] == "a dog"
    assert all("animal" not in source for source, _ in sources), "a specific source replaces a general one"
    assert AudioPrompt().sources(tags(ANIMAL=0.9))[0] == ("an animal", 1.0)
    assert AudioPrompt().sources(tags(ROOM=0.9)) == []


def test_two_sources_are_weighted_by_their_probability() -> None:
    both = tags(BARK=0.8, MEOW=0.4)
    sources = AudioPrompt(min_weight=0.3).sources(both)
    assert sources == [("a dog", pytest.approx(2 / 3)), ("a cat", pytest.approx(1 / 3))]
    assert AudioPrompt(min_weight=0.6).sources(both) == [("a dog", 1.0)]
    assert AudioPrompt(max_sources=1, min_weight=0.3).sources(both) == [("a dog", 1.0)]
    assert len(AudioPrompt().sources(tags(BARK=0.8, MEOW=0.7))) == 2


def test_every_text_is_known_in_advance() -> None:
    prompt, generator = AudioPrompt("a drawing of {}"), torch.Generator().manual_seed(0)
    texts = prompt.all_texts()
    assert len(texts) == len(set(texts)) == 1 + len({source for source, _ in tag_sources() if source})
    for probabilities in torch.rand(50, 521, generator=generator):
        assert {text for text, _ in prompt.weighted_texts(probabilities, -40.0)} <= set(texts)
    assert AudioPrompt("a photo").all_texts() == ["a photo"]


def test_a_quiet_sound_is_blended_with_the_empty_prompt() -> None:
    prompt, one = AudioPrompt("a drawing of {}"), tags(BARK=0.8)
    weights = [dict(prompt.weighted_texts(one, loudness)).get("", 0.0) for loudness in (-70, -50, -40, -30, -25, -10)]
    assert weights == sorted(weights, reverse=True)
    assert weights[0] == pytest.approx(0.8)
    assert weights[-1] == 0
    assert prompt.weighted_texts(one, -10) == [("a drawing of a dog", 1.0)]
    assert prompt.weighted_texts(tags(), -10) == [("", 1.0)]


def test_each_track_of_a_mixture_is_named_and_weighs_by_its_amplitude() -> None:
    prompt, dog, cat = AudioPrompt("a drawing of {}"), tags(BARK=0.8), tags(MEOW=0.1)
    drawn = {"a drawing of a dog": 0.5, "a drawing of a cat": 0.5}
    assert dict(prompt.mixture_texts([(dog, -20), (cat, -20)], -17)) == pytest.approx(drawn)
    softer = dict(prompt.mixture_texts([(dog, -20), (cat, -20 - 20 * math.log10(2))], -18))
    assert softer["a drawing of a cat"] == pytest.approx(softer["a drawing of a dog"] / 2), "6 dB halve the weight"
    assert prompt.mixture_texts([(dog, -20), (dog, -26)], -18) == [("a drawing of a dog", pytest.approx(1.0))]
    quiet = dict(prompt.mixture_texts([(dog, -60), (cat, -60)], -57))
    assert quiet[""] == pytest.approx(0.8), "a quiet mixture is blended as a quiet sound is"
    nameless = dict(prompt.mixture_texts([(dog, -20), (tags(ROOM=0.9), -20)], -17))
    assert nameless == pytest.approx({"a drawing of a dog": 0.5, "": 0.5})
    assert AudioPrompt("a photo").mixture_texts([(dog, -20), (cat, -20)], -17) == [("a photo", 1.0)]


def test_the_embedding_is_the_weighted_mean_over_the_texts() -> None:
    assert torch.allclose(blend([("ab", 0.25), ("abcdef", 0.75)], encode), torch.full((1, 2, 3), 5.0))
    clips = [AudioTokens(torch.zeros(1, 1, 1), tags(BARK=0.8), -10.0), AudioTokens(torch.zeros(1, 1, 1), tags(), -10.0)]
    embedded = AudioPrompt().embed(clips, encode)
    assert embedded.shape == (2, 2, 3)
    assert embedded[:, 0, 0].tolist() == [len("a dog"), 0]


def test_a_template_without_a_placeholder_is_the_prompt_of_every_clip() -> None:
    for template in ("", "a photo"):
        prompt = AudioPrompt(template)
        assert not prompt.reads_audio
        assert prompt.weighted_texts(tags(BARK=0.8), -70) == [(template, 1.0)]
    assert AudioPrompt(**AudioPrompt("{} on grass").settings()) == AudioPrompt("{} on grass")
