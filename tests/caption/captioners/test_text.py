"""Captioner `text`: words to events, without pixels."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline_steps.caption.captioners.base import CaptionOptions, CaptionResult
from pipeline_steps.caption.captioners.text import TextCaptioner, TextConfig, find_terms, normalize
from pipeline_steps.caption.config import CaptionConfig
from pipeline_steps.caption.lexicon import load_synonyms
from pipeline_steps.caption.stage import run
from pipeline_steps.core.errors import DataError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import ABSTAINED, EVENTS
from pipeline_steps.core.tables import read_table
from tests.factories.catalog import write_catalog


@pytest.fixture(scope="module")
def captioner(assets: Path) -> TextCaptioner:
    return TextCaptioner(TextConfig(), CaptionOptions(assets=assets)).load()


def caption(captioner: TextCaptioner, text: str) -> CaptionResult:
    (prediction,) = captioner.predict_with_text([], [text])
    assert captioner.from_row(captioner.to_row(prediction)) == prediction
    return captioner.caption(prediction)


def test_terms_are_the_longest_and_do_not_overlap() -> None:
    vocabulary = {"church": (), "church bell": (), "bell tower": (), "tower": ()}
    assert list(find_terms(normalize("The church bells' Towers"), vocabulary)) == ["church bell", "tower"]


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("IMG_0042: my dogs!", {"dog barking", "dog panting"}),
        ("puppy", {"dog barking", "dog panting"}),
        ("a church bell, a train", {"church bells ringing", "train horn blowing"}),
        ("dog barking", {"a dog barking"}),
        ("heavy rain", {"rain falling"}),
        ("rocket", {"a rocket launching"}),  # by the text encoder
    ],
)
def test_words_name_sounds(captioner: TextCaptioner, text: str, phrases: set[str]) -> None:
    found = caption(captioner, text)
    assert phrases <= {event.phrase for event in found.events}
    assert found.score >= 0.15


@pytest.mark.parametrize(
    ("text", "code"),
    [("", "NO_TEXT"), ("banana", "NO_SOUND"), ("zzz qqq", "LOW_CONFIDENCE"), ("\u202e <|x|> 1", "LOW_CONFIDENCE")],
)
def test_words_without_sounds(captioner: TextCaptioner, text: str, code: str) -> None:
    found = caption(captioner, text)
    assert (found.code, found.events) == (code, ())


def test_encoder_is_used_only_if_no_term_matches(captioner: TextCaptioner, assets: Path) -> None:
    without = TextCaptioner(TextConfig(min_similarity=1), CaptionOptions(assets=assets)).load()
    assert caption(without, "rocket").code == "LOW_CONFIDENCE"
    assert caption(without, "dogs") == caption(captioner, "dogs")
    assert without.describe() != captioner.describe()


def test_every_synonym_has_sounds(captioner: TextCaptioner) -> None:
    for term in load_synonyms():
        assert captioner.caption(captioner.predict_with_text([], [term])[0]).events, term


def test_stage_reads_words_and_no_pixels(tmp_path: Path, demo: Path, assets: Path) -> None:
    layout = ProjectPaths(tmp_path)
    names = ["bison-000", "banana-000", "hammer-000"]
    config = CaptionConfig.from_params({"captioner": "text"})
    write_catalog(layout, demo, names, [], assets=assets)
    with pytest.raises(DataError, match="no image has words, which captioner 'text' reads"):
        run(config, layout)
    ids = write_catalog(layout, demo, names, [], assets=assets, words={"bison-000": "a dog", "banana-000": "zzz"})
    for shard in layout.media.glob("*.tar"):
        shard.unlink()
    report = run(config, layout)
    report.check_balance()
    events = read_table(layout.captions / "events.parquet", EVENTS).to_pylist()
    assert {row["image_id"] for row in events} == {ids["i-bison-000"]}
    codes = {row["image_id"]: row["code"] for row in read_table(layout.captions / "abstained.parquet", ABSTAINED).to_pylist()}
    assert codes == {ids["i-banana-000"]: "LOW_CONFIDENCE", ids["i-hammer-000"]: "NO_TEXT"}
    assert run(config, layout).cache_misses == 0
