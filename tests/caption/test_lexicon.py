"""The lexicon is whole, in range and says sensible things."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from pipeline_steps.caption.lexicon import COCO, COLUMNS, IMAGENET, Lexicon, parse_label_prior, parse_lexicon
from pipeline_steps.core.errors import DataError
from pipeline_steps.core.escape import clean_text
from pipeline_steps.models.vision.coco_labels import COCO_LABELS

HEADER = ",".join(COLUMNS) + "\n"


@pytest.fixture(scope="module")
def text(project: Path) -> str:
    return (project / "pipeline_steps/caption/lexicon.csv").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def lexicon(text: str) -> Lexicon:
    return parse_lexicon(text)


def test_every_label_is_there_once_and_no_other(lexicon: Lexicon) -> None:
    assert {index for vocabulary, index in lexicon if vocabulary == IMAGENET} == set(range(1000))
    assert {index for vocabulary, index in lexicon if vocabulary == COCO} == set(COCO_LABELS)
    assert len(lexicon) == 1080


def test_labels_are_named_as_the_models_name_them(text: str, assets: Path) -> None:
    names = (assets / "imagenet_labels.txt").read_text(encoding="utf-8").splitlines()
    for row in csv.DictReader(text.splitlines()):
        index = int(row["index"])
        wanted = names[index].split(", ")[0].strip() if row["vocabulary"] == IMAGENET else COCO_LABELS[index]
        assert row["label"] == wanted


def test_phrases_are_short_clean_and_told_once(lexicon: Lexicon) -> None:
    for key, sounds in lexicon.items():
        assert len(sounds) <= 5, key
        for entry in sounds:
            assert entry.phrase == clean_text(entry.phrase, 60).lower(), (key, entry.phrase)
            assert 1 <= len(entry.phrase.split()) <= 6, (key, entry.phrase)
            assert entry.sound_source, key


def test_many_things_make_no_sound(lexicon: Lexicon) -> None:
    silent = sum(not sounds for sounds in lexicon.values())
    assert 250 <= silent <= 450


@pytest.mark.parametrize(
    ("index", "sound"),
    [
        (7, "rooster crowing"),
        (207, "dog barking"),
        (285, "cat meowing"),
        (345, "cow mooing"),
        (402, "acoustic guitar strumming"),
        (420, "banjo playing"),
        (491, "chainsaw revving"),
        (497, "church bell ringing"),
        (820, "steam train chuffing"),
        (978, "ocean waves"),
    ],
)
def test_what_one_would_hear(lexicon: Lexicon, index: int, sound: str) -> None:
    best = max(lexicon[IMAGENET, index], key=lambda entry: entry.salience * entry.audibility)
    assert best.phrase == sound


@pytest.mark.parametrize("index", [949, 953, 954, 614, 788])  # strawberry, pineapple, banana, kimono, shoe shop
def test_what_one_would_not_hear(lexicon: Lexicon, index: int) -> None:
    assert all(entry.audibility <= 0.4 for entry in lexicon[IMAGENET, index])


@pytest.mark.parametrize(
    "row",
    [
        "imagenet,0,tench,splash,fish,true,1.2,0.5",
        "imagenet,0,tench,splash,fish,true,0,0.5",
        "imagenet,0,tench,splash,fish,yes,1,0.5",
        "imagenet,x,tench,splash,fish,true,1,0.5",
        "openimages,0,tench,splash,fish,true,1,0.5",
        "imagenet,0,tench,splash,fish,true,1,0.5\nimagenet,0,tench,splash,fish,true,1,0.5",
        "imagenet,0,tench,splash,fish,true,1,0.5\nimagenet,0,tench,,,,,",
        "imagenet,0,tench,,,,,\nimagenet,0,tench,splash,fish,true,1,0.5",
        "imagenet,0,tench,splash",
    ],
)
def test_a_bad_line_is_named(row: str) -> None:
    with pytest.raises(DataError, match=r"line \d"):
        parse_lexicon(HEADER + row + "\n")


def test_columns_are_checked() -> None:
    with pytest.raises(DataError, match="columns"):
        parse_lexicon("vocabulary,index\nimagenet,0\n")


def test_the_label_prior_is_a_distribution_over_imagenet(project: Path) -> None:
    prior = parse_label_prior((project / "pipeline_steps/caption/label_prior.csv").read_text(encoding="utf-8"))
    assert set(prior) <= set(range(1000))
    assert 0.8 < sum(prior.values()) <= 1.001
    assert max(prior.values()) < 0.05, "no label is said of every twentieth picture"


@pytest.mark.parametrize("row", ["0,tench,2", "0,tench,", "x,tench,0.1", "0,tench,nan", "0,a,0.9\n1,b,0.9"])
def test_a_bad_prior_is_refused(row: str) -> None:
    with pytest.raises(DataError, match=r"label_prior\.csv"):
        parse_label_prior("index,label,prior\n" + row + "\n")
