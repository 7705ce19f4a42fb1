"""From tags to sound events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline_steps.caption.captioners.base import CaptionOptions, EventSelection
from pipeline_steps.caption.captioners.tagger import (
    LabelScore,
    TaggerCaptioner,
    TaggerConfig,
    discount_label_prior,
    select_events,
    tags_to_events,
)
from pipeline_steps.caption.lexicon import COCO, IMAGENET, Lexicon, LexiconEntry
from pipeline_steps.core.hashing import fingerprint
from tests.models.golden_outputs import picture

BARK = LexiconEntry("dog barking", "dog", True, 1.0, 0.8)
PANT = LexiconEntry("dog panting", "dog", True, 0.4, 0.4)
WAVES = LexiconEntry("ocean waves", "sea", False, 1.0, 0.6)
LEXICON = {
    (IMAGENET, 0): (BARK, PANT),
    (IMAGENET, 1): (BARK,),
    (IMAGENET, 2): (),
    (IMAGENET, 3): (WAVES,),
    (COCO, 18): (LexiconEntry("dog barking", "dog", True, 0.5, 0.5),),
}


def captioner(assets: Path, lexicon: Lexicon = LEXICON, **values: Any) -> TaggerCaptioner:
    return TaggerCaptioner(TaggerConfig(**values), CaptionOptions(assets=assets), lexicon)


def tag(index: int, probability: float, vocabulary: str = IMAGENET) -> LabelScore:
    return LabelScore(vocabulary, index, f"label {index}", probability)


def test_labels_that_share_a_phrase_add_up() -> None:
    event = tags_to_events([tag(0, 0.3), tag(1, 0.4)], LEXICON)[0]
    assert event.phrase == "dog barking"
    assert event.confidence == pytest.approx(0.7 * 0.8)
    assert event.salience == pytest.approx(1.0)


def test_vocabularies_combine_by_noisy_or_and_salience_by_mass() -> None:
    event = tags_to_events([tag(1, 0.5), tag(18, 0.6, COCO)], LEXICON)[0]
    assert event.confidence == pytest.approx(1 - (1 - 0.5 * 0.8) * (1 - 0.6 * 0.5))
    assert event.salience == pytest.approx((0.5 * 1.0 + 0.6 * 0.5) / 1.1)


def test_several_objects_give_several_events_most_prominent_first() -> None:
    caption = select_events([tag(0, 0.4), tag(3, 0.5)], LEXICON, EventSelection())
    assert [event.phrase for event in caption.events] == ["dog barking", "ocean waves", "dog panting"]
    assert [event.visible for event in caption.events] == [True, False, True]
    assert caption.code == ""


def test_silence_and_doubt_are_told_apart_and_name_what_is_seen() -> None:
    silent = select_events([tag(2, 0.9), tag(0, 0.02)], LEXICON, EventSelection())
    assert (silent.events, silent.code) == ((), "NO_SOUND")
    assert "label 2 0.90" in silent.reason
    doubtful = select_events([tag(0, 0.05), tag(3, 0.04), tag(2, 0.1)], LEXICON, EventSelection())
    assert (doubtful.events, doubtful.code) == ((), "LOW_CONFIDENCE")
    assert "best 0.04 of 0.15" in doubtful.reason
    assert doubtful.guesses[0].phrase == "dog barking", "a person who asks gets the guess"
    assert select_events([], LEXICON, EventSelection()).code == "LOW_CONFIDENCE"


tags = st.builds(tag, st.integers(0, 5), st.floats(0, 1, width=32), st.sampled_from([IMAGENET, COCO]))


@given(st.lists(tags, max_size=12), st.floats(0, 1), st.floats(0, 1), st.integers(1, 5))
def test_a_caption_keeps_its_promises(seen: list[LabelScore], least: float, share: float, most: int) -> None:
    caption = select_events(seen, LEXICON, EventSelection(most, least, share))
    weights = [event.salience * event.confidence for event in caption.events]
    assert weights == sorted(weights, reverse=True)
    assert len(caption.events) <= most
    assert len({event.phrase for event in caption.events}) == len(caption.events)
    assert all(0 <= event.salience <= 1 and 0 <= event.confidence <= 1 for event in (*caption.events, *caption.guesses))
    assert bool(caption.events) != bool(caption.code)
    if caption.events:
        assert max(event.confidence for event in caption.events) >= least or caption.score >= least
        assert min(weights) >= share * max(weights) - 1e-9


@given(st.lists(tags, max_size=8, unique_by=lambda one: (one.vocabulary, one.index)), st.floats(0, 1))
def test_the_prior_moves_mass_and_loses_none(seen: list[LabelScore], strength: float) -> None:
    moved = discount_label_prior(seen, {0: 0.5, 1: 0.01}, strength)
    assert [(one.vocabulary, one.index) for one in moved] == [(one.vocabulary, one.index) for one in seen]
    for vocabulary in (IMAGENET, COCO):
        before, after = (sum(one.probability for one in some if one.vocabulary == vocabulary) for some in (seen, moved))
        assert after == pytest.approx(before, abs=1e-6)


def test_a_favourite_label_is_discounted() -> None:
    seen = [tag(0, 0.3), tag(3, 0.3)]
    dog, sea = discount_label_prior(seen, {0: 0.1}, 0.5)
    assert dog.probability < 0.1 * sea.probability + 0.1
    assert discount_label_prior(seen, {0: 0.1}, 0.0) == seen


def test_real_pictures(assets: Path, demo: Path) -> None:
    tagger = captioner(assets).load()
    dog = picture(demo)
    found = tagger.predict([dog, np.full((64, 48, 3), 255, np.uint8)])
    assert len(found) == 2
    assert all(tag.probability >= 1e-3 for tag in found[0])
    assert sum(tag.probability for tag in found[0]) == pytest.approx(1.0, abs=0.2)
    assert max(found[0], key=lambda tag: tag.probability).index in range(151, 269), "a breed of dog"


def test_the_detector_is_an_option_that_costs_a_judge(assets: Path, demo: Path) -> None:
    alone, both = captioner(assets), captioner(assets, detectors=["ssd"]).load()
    assert alone.families == ("efficientnet",)
    assert both.families == ("efficientnet", "ssd-mobilenet")
    assert (COCO, 18) in {(tag.vocabulary, tag.index) for tag in both.predict([picture(demo)])[0]}
    assert fingerprint(alone.describe_prediction()) != fingerprint(both.describe_prediction())


def test_networks_are_averaged_in_any_order(assets: Path, demo: Path) -> None:
    small, large = "efficientnet_lite0", "efficientnet_lite3"
    both, turned, alone = (
        captioner(assets, min_probability=1e-6, models=models).load() for models in ([small, large], [large, small], [small])
    )
    dog = [picture(demo)]
    assert both.predict(dog) == turned.predict(dog)
    assert fingerprint(both.describe_prediction()) == fingerprint(turned.describe_prediction())
    assert fingerprint(both.describe_prediction()) != fingerprint(alone.describe_prediction())
    assert captioner(assets, min_probability=1e-6, models=[small, small]).describe() == alone.describe()
    assert both.families == ("efficientnet",)
    single = [captioner(assets, min_probability=1e-6, models=[one]).load().predict(dog)[0] for one in (small, large)]
    mass = [sum(tag.probability for tag in tags if tag.index in range(151, 269)) for tags in (both.predict(dog)[0], *single)]
    assert mass[0] == pytest.approx((mass[1] + mass[2]) / 2, abs=1e-3)


def test_labels_are_added_to_captions_and_to_no_abstention(assets: Path) -> None:
    plain, added = (
        TaggerCaptioner(TaggerConfig(label_events=count, prior_strength=0), CaptionOptions(assets=assets)) for count in (0, 2)
    )
    seen = [LabelScore(IMAGENET, 207, "golden retriever", 0.6), LabelScore(IMAGENET, 954, "banana", 0.3)]
    events = [(event.phrase, event.confidence) for event in added.caption(seen).events]
    assert events[:-2] == [(event.phrase, event.confidence) for event in plain.caption(seen).events]
    assert events[-2:] == [("golden retriever", 0.6), ("banana", 0.3)]
    silent = [LabelScore(IMAGENET, 954, "banana", 0.9)]
    assert added.caption(silent) == plain.caption(silent)
    assert added.describe_prediction() == plain.describe_prediction(), "no image is processed again"
    assert added.describe_selection() != plain.describe_selection()


def test_the_lexicon_shapes_captions_but_not_tags(assets: Path) -> None:
    one, other = captioner(assets), captioner(assets, {**LEXICON, (IMAGENET, 2): (WAVES,)})
    assert fingerprint(one.describe_prediction()) == fingerprint(other.describe_prediction())
    assert fingerprint(one.describe()) != fingerprint(other.describe())
