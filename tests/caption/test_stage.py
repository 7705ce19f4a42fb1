"""The stage on real pictures and real weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline_steps.caption.captioners.base import CaptionFailure, predict_batch
from pipeline_steps.caption.captioners.tagger import LabelScore, TaggerCaptioner
from pipeline_steps.caption.config import CaptionConfig
from pipeline_steps.caption.stage import run
from pipeline_steps.core.array_types import ByteArray
from pipeline_steps.core.errors import DataError, IntegrityError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import ABSTAINED, EVENTS, QUARANTINE
from pipeline_steps.core.tables import read_table
from tests.factories.catalog import bytes_below, write_catalog

# Best event of some pool pictures; None where the picture makes no sound or nothing is recognised.
GOLDEN = {
    "bison-000": "bison grunting",
    "electric-guitar-000": "electric guitar playing",
    "hammer-000": "hammering",
    "apple-green-000": None,
    "banana-000": None,
    "binoculars-000": None,
}


def tagger(**values: Any) -> CaptionConfig:
    return CaptionConfig.from_params({"captioner": "tagger", "tagger": values})


def tables(layout: ProjectPaths) -> tuple[dict[str, list[str]], dict[str, str]]:
    events: dict[str, list[str]] = {}
    for row in read_table(layout.captions / "events.parquet", EVENTS).to_pylist():
        events.setdefault(row["image_id"], []).append(row["phrase"])
    abstained = read_table(layout.captions / "abstained.parquet", ABSTAINED).to_pylist()
    return events, {row["image_id"]: row["code"] for row in abstained}


def test_golden_captions_memo_and_bytes(tmp_path: Path, demo: Path, assets: Path) -> None:
    first = ProjectPaths(tmp_path / "first")
    names = [name for name in GOLDEN if name != "hammer-000"]
    write_catalog(first, demo, names, [], assets=assets)
    report = run(CaptionConfig(), first)
    report.check_balance()
    assert (report.cache_misses, report.cache_hits) == (len(names), 0)

    ids = write_catalog(first, demo, list(GOLDEN), [], assets=assets)
    report = run(CaptionConfig(), first)
    report.check_balance()
    assert (report.cache_misses, report.cache_hits) == (1, len(names)), "one new picture costs one caption"
    assert report.n_abstained == 3
    events, abstained = tables(first)
    for name, sound in GOLDEN.items():
        image_id = ids[f"i-{name}"]
        if sound is None:
            assert abstained[image_id] == "NO_SOUND", name
        else:
            assert events[image_id][0] == sound, name

    second = ProjectPaths(tmp_path / "second")
    write_catalog(second, demo, list(GOLDEN), [], assets=assets)
    run(CaptionConfig(batch_size=4), second)
    assert bytes_below(second.captions) == bytes_below(first.captions), "memo and batches change nothing"


def test_an_abstention_names_what_was_seen(tmp_path: Path, demo: Path, assets: Path) -> None:
    layout = ProjectPaths(tmp_path)
    write_catalog(layout, demo, ["banana-000"], [], assets=assets)
    run(CaptionConfig(), layout)
    row = read_table(layout.captions / "abstained.parquet", ABSTAINED).to_pylist()[0]
    assert "banana" in row["reason"]
    assert row["score"] < 0.1


def test_other_networks_are_other_tags(tmp_path: Path, demo: Path, assets: Path) -> None:
    layout = ProjectPaths(tmp_path)
    write_catalog(layout, demo, ["bison-000"], [], assets=assets)
    run(CaptionConfig(), layout)
    assert run(tagger(models=["efficientnet_lite3", "efficientnet_lite0"]), layout).cache_hits == 1, "the order says nothing"
    assert run(tagger(models=["efficientnet_lite0"]), layout).cache_misses == 1, "tags of two networks are not those of one"
    with pytest.raises(ValidationError, match="models"):
        tagger(models=[])


def test_an_empty_pool_stops_the_stage(tmp_path: Path, demo: Path, assets: Path) -> None:
    layout = ProjectPaths(tmp_path)
    write_catalog(layout, demo, [], ["dog-003"], assets=assets)
    with pytest.raises(DataError, match="ingest accepted no image"):
        run(CaptionConfig(), layout)


PICTURES = {name: np.full((4, 4, 3), value, np.uint8) for value, name in enumerate("abc")}


def honest(images: list[ByteArray]) -> list[list[LabelScore]]:
    return [[LabelScore("imagenet", int(image[0, 0, 0]), "thing", 1.0)] for image in images]


@pytest.mark.fault
def test_fewer_results_than_pictures_never_shift_captions() -> None:
    def short(images: list[ByteArray]) -> list[list[LabelScore]]:
        return honest(images)[1:] if len(images) > 1 else honest(images)

    found = predict_batch(short, PICTURES)
    assert found == {name: honest([picture])[0] for name, picture in PICTURES.items()}


@pytest.mark.fault
def test_one_bad_picture_costs_itself_alone() -> None:
    def raising(images: list[ByteArray]) -> list[list[LabelScore]]:
        if any(image[0, 0, 0] == 1 for image in images):
            raise ValueError("the model choked")
        return honest(images)

    found = predict_batch(raising, PICTURES)
    right = {name: honest([picture])[0] for name, picture in PICTURES.items()}
    assert found == {**right, "b": CaptionFailure("CAPTION_FAILED", "ValueError: the model choked")}


@pytest.mark.fault
def test_more_results_than_pictures_are_no_result() -> None:
    found = predict_batch(lambda images: honest([*images, *images]), PICTURES)
    assert found == dict.fromkeys("abc", CaptionFailure("CAPTION_FAILED", "2 results for one image"))


@pytest.mark.fault
def test_integrity_errors_are_not_swallowed() -> None:
    def tampered(images: list[ByteArray]) -> list[list[LabelScore]]:
        raise IntegrityError("weights changed")

    with pytest.raises(IntegrityError):
        predict_batch(tampered, PICTURES)


@pytest.mark.fault
def test_a_captioner_that_fails_on_everything_stops_early(
    tmp_path: Path, demo: Path, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = ProjectPaths(tmp_path)
    names = ["bison-000", "banana-000", "hammer-000", "binoculars-000", "apple-green-000"]
    write_catalog(layout, demo, names, [], assets=assets)
    calls = []

    def failing(self: TaggerCaptioner, images: list[ByteArray]) -> list[list[LabelScore]]:
        calls.append(len(images))
        raise ValueError("Invalid buffer size")

    monkeypatch.setattr(TaggerCaptioner, "predict", failing)
    monkeypatch.setattr("pipeline_steps.core.executors.base.MAX_FAILURES_WITHOUT_SUCCESS", 2)
    with pytest.raises(DataError, match=r"\(3 of 3\): CAPTION_FAILED: ValueError: Invalid buffer size"):
        run(CaptionConfig(batch_size=1), layout)
    assert len(calls) == 6, "three images, each once in its batch and once alone"


@pytest.mark.fault
def test_failures_are_quarantined_up_to_a_share(
    tmp_path: Path, demo: Path, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = ProjectPaths(tmp_path)
    ids = write_catalog(layout, demo, ["bison-000", "banana-000"], [], assets=assets)
    real = TaggerCaptioner.predict
    banana = []

    def choking(self: TaggerCaptioner, images: list[ByteArray]) -> list[list[LabelScore]]:
        found = real(self, images)
        if any(max(tags, key=lambda tag: tag.probability).label == "banana" for tags in found):
            banana.append(1)
            raise ValueError("the model choked")
        return found

    monkeypatch.setattr(TaggerCaptioner, "predict", choking)
    with pytest.raises(DataError, match="max_failed_fraction"):
        run(CaptionConfig(max_failed_fraction=0), layout)
    report = run(CaptionConfig(), layout)
    report.check_balance()
    assert (report.n_ok, report.n_quarantined) == (1, 1)
    row = read_table(layout.captions / "quarantine.parquet", QUARANTINE).to_pylist()[0]
    assert (row["item_id"], row["code"], row["retryable"]) == (ids["i-banana-000"], "CAPTION_FAILED", True)
    assert "choked" in row["reason"]
