"""Audio prompt: sources of tags, their weights, and the weight of the level."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from pipeline_steps.diffusion.audio_prompt import AudioPrompt, share_tokens, source_groups, tag_sources
from pipeline_steps.diffusion.audio_tokens import AudioTokens

BARK, DOG, ANIMAL, MEOW, PIANO, ROOM = 70, 69, 67, 78, 148, 500


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
    assert sources == [("a dog", 1.0)], "a specific source replaces a general one"
    assert AudioPrompt().sources(tags(ANIMAL=0.9))[0] == ("an animal", 1.0)
    assert AudioPrompt().sources(tags(ROOM=0.9)) == []


def test_two_sources_are_weighted_by_their_probability() -> None:
    both = tags(BARK=0.8, PIANO=0.4)
    sources = AudioPrompt(min_weight=0.3).sources(both)
    assert sources == [("a dog", pytest.approx(2 / 3)), ("a piano", pytest.approx(1 / 3))]
    assert AudioPrompt(min_weight=0.6).sources(both) == [("a dog", 1.0)]
    assert AudioPrompt(max_sources=1, min_weight=0.3).sources(both) == [("a dog", 1.0)]
    assert len(AudioPrompt().sources(tags(BARK=0.8, PIANO=0.7))) == 2


def test_the_second_source_is_of_another_group() -> None:
    assert AudioPrompt().sources(tags(BARK=0.8, MEOW=0.7)) == [("a dog", 1.0)]
    behind = AudioPrompt(min_weight=0.3).sources(tags(BARK=0.8, MEOW=0.7, PIANO=0.4))
    assert [source for source, _ in behind] == ["a dog", "a piano"]
    assert source_groups()["a dog"] == "animals"
    assert set(source_groups()) == {source for source, _ in tag_sources()}


def test_weights_follow_the_loudness_and_the_strongest_source() -> None:
    prompt, one = AudioPrompt("a drawing of {}"), tags(BARK=0.8)
    weights = [dict(prompt.weighted_texts(one, loudness))["a drawing of a dog"] for loudness in (-70, -50, -40, -30, -25, -10)]
    assert weights == sorted(weights)
    assert weights[:2] == pytest.approx([0.2, 0.2])
    assert weights[-2:] == [1, 1]
    both = tags(BARK=0.4, PIANO=0.8)
    assert AudioPrompt(min_weight=0.3).weighted_texts(both, -10) == [("a piano", 1.0), ("a dog", pytest.approx(0.5))]
    assert dict(AudioPrompt(min_weight=0.3).weighted_texts(both, -50))["a dog"] == pytest.approx(0.1)
    assert prompt.weighted_texts(one, -10) == [("a drawing of a dog", 1.0)]
    assert prompt.weighted_texts(tags(), -10) == [("", 1.0)]


def test_one_source_fills_the_prompt_and_two_share_it() -> None:
    def clip(loudness: float, **probabilities: float) -> AudioTokens:
        return AudioTokens(torch.zeros(1, 1, 1), tags(**probabilities), loudness)

    clips = [clip(-10, BARK=0.8), clip(-10), clip(-50, BARK=0.8), clip(-10, BARK=0.8, PIANO=0.4)]
    embedded = AudioPrompt(min_weight=0.3).embed(clips, encode)
    assert embedded.shape == (4, 2, 3)
    assert embedded[:, 0, 0].tolist() == pytest.approx([len("a dog"), 0, 0.2 * len("a dog"), len("a dog")])
    assert embedded[:, 1, 0].tolist() == pytest.approx([len("a dog"), 0, 0.2 * len("a dog"), 0.5 * len("a piano")])


def test_texts_that_share_tokens_have_their_first_ones_in_order() -> None:
    one, other = torch.arange(14.0).reshape(1, 7, 2), -torch.arange(14.0).reshape(1, 7, 2)
    shared = share_tokens([one, other])
    assert shared.shape == one.shape
    assert torch.equal(shared, torch.cat([one[:, :3], other[:, :4]], 1))
    assert torch.equal(share_tokens([one]), one)


def test_a_template_without_a_placeholder_is_the_prompt_of_every_clip() -> None:
    for template in ("", "a photo"):
        prompt = AudioPrompt(template)
        assert not prompt.reads_audio
        assert prompt.weighted_texts(tags(BARK=0.8), -70) == [(template, 1.0)]
    assert AudioPrompt(**AudioPrompt("{} on grass").settings()) == AudioPrompt("{} on grass")
