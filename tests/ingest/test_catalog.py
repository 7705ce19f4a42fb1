from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline_steps.core.errors import DataError
from pipeline_steps.core.schemas import IMAGES, QUARANTINE
from pipeline_steps.core.stage_report import StageReport
from pipeline_steps.core.tables import to_table
from pipeline_steps.ingest.candidates import CandidateFile, RejectedFile
from pipeline_steps.ingest.catalog import (
    catalog_rows,
    check_id_collisions,
    check_pools,
    count_pool_items_near_holdout,
    group_by_content,
)
from pipeline_steps.ingest.config import IngestConfig
from pipeline_steps.ingest.reason_codes import CODES
from pipeline_steps.pair.release.license_terms import terms


def file(name: str, content: int, **metadata: object) -> CandidateFile:
    sha = hashlib.sha256(str(content).encode()).hexdigest()
    return CandidateFile("/pool", name, name, sha, 10, "image", "PNG", **metadata)


def measured(content: int) -> dict:
    return {"code": None, "reason": None, "format": "PNG", "normalizations": [], "width": 9, "height": 9, "num_frames": 1,
            "phash": f"{content * 0x9E3779B97F4A7C15 % 2**64:016x}"}  # fmt: skip


CONTENTS = st.lists(st.tuples(st.integers(0, 8), st.booleans(), st.sampled_from([None, "g", "h"])), max_size=20)


@given(CONTENTS)
def test_every_file_is_in_exactly_one_row(contents: list[tuple[int, bool, str | None]]) -> None:
    files = [file(f"{n}.png", c, holdout=h, group=g) for n, (c, h, g) in enumerate(contents)]
    items = group_by_content(files)
    rows = catalog_rows("image", items, {f.item_id: measured(c) for f, (c, _, _) in zip(files, contents, strict=True)}, 4)
    table = to_table(IMAGES, rows)
    assert sorted(source for sources in table["sources"].to_pylist() for source in sources) == sorted(f.path for f in files)
    by_id = {row["image_id"]: row for row in rows}
    for one in files:
        row = by_id[one.item_id]
        assert row["holdout"] or not one.holdout, "content that is held out anywhere is held out everywhere"
        assert row["group_id"] <= row["image_id"]
        same = [other for other in files if one.group and other.group == one.group]
        assert all(by_id[other.item_id]["group_id"] == row["group_id"] for other in same)


def test_metadata_of_one_content_under_several_names() -> None:
    files = [
        file("b.jpg", 1, license="MIT", author="B", holdout=True, text="a dog"),
        file("a.png", 1, license="CC0-1.0", author="A", source="s"),
        file("c.png", 1, license="MIT", text="barking"),
    ]
    (row,) = catalog_rows("image", group_by_content(files), {files[0].item_id: measured(1)}, 4)
    assert row["path"] == "a.png"
    assert row["sources"] == ["a.png", "b.jpg", "c.png"]
    assert (row["license"], row["author"], row["source"]) == ("CC0-1.0 AND MIT", "A; B", "s")
    assert row["text"] == "a dog; barking"
    assert row["holdout"]
    assert row["normalizations"] == ["WRONG_EXTENSION"]


@pytest.mark.parametrize("closed", ["LicenseRef-Proprietary", "CC-BY-NC-ND-4.0", "some words"])
@pytest.mark.parametrize("choice", ["CC-BY-4.0 OR MIT", "AFL-3.0 OR CC0-1.0", "zlib  OR  MIT"])
def test_license_choice_does_not_override_another_license(closed: str, choice: str) -> None:
    files = [file("a.png", 1, license=closed), file("b.png", 1, license=choice)]
    (row,) = catalog_rows("image", group_by_content(files), {files[0].item_id: measured(1)}, 4)
    assert f"({choice})" in row["license"]
    assert not terms(row["license"]).publishable
    (alone,) = catalog_rows("image", group_by_content(files[1:]), {files[1].item_id: measured(1)}, 4)
    assert alone["license"] == choice


def test_id_collision_is_an_error() -> None:
    first = file("a.png", 1)
    other = CandidateFile("/pool", "b.png", "b.png", first.sha256[:32] + "0" * 32, 10, "image", "PNG")
    check_id_collisions([first, first])
    with pytest.raises(DataError, match=r"a\.png and b\.png: both have the id"):
        check_id_collisions([first, other])


ABSTAINING = {"AUD_SILENT", "FORGOTTEN", "IMG_TRANSPARENT", "NOT_DOWNLOADED"}


def check(rows: dict[str, list[dict]], rejected: list[RejectedFile], config: IngestConfig | None = None) -> None:
    """`check_pools` with the counts that the stage has then."""
    report = StageReport("ingest", sum(map(len, rows.values())) + len(rejected), sum(map(len, rows.values())))
    report.n_abstained = sum(item.abstained for item in rejected)
    report.n_quarantined = len(rejected) - report.n_abstained
    check_pools(rows, rejected, config or IngestConfig(root="pool"), report)


@given(st.lists(st.sampled_from(sorted(CODES)), max_size=12), st.integers(0, 20), st.floats(0, 1))
def test_failed_fraction(codes: list[str], accepted: int, max_failed_fraction: float) -> None:
    rejected = [RejectedFile(f"{n}", "image", code, "") for n, code in enumerate(codes)]
    to_table(QUARANTINE, [item.row() for item in rejected])
    rows = {"image": [{"holdout": False}] * accepted, "audio": [{"holdout": False}]}
    dropped = sum(code not in ABSTAINING for code in codes)
    n_in = accepted + 1 + len(codes)
    config = IngestConfig(root="pool", max_failed_fraction=max_failed_fraction)
    if not accepted:
        with pytest.raises(DataError, match="image pool is empty"):
            check(rows, rejected, config)
    elif dropped > max(max_failed_fraction * n_in, min(5, n_in // 2) if max_failed_fraction else 0):
        with pytest.raises(DataError, match=f"ingest.max_failed_fraction: {dropped} of {n_in} files failed"):
            check(rows, rejected, config)
    else:
        check(rows, rejected, config)


POOLS = {"image": {"root": "a", "kind": "images"}, "audio": {"root": "b", "kind": "audio", "metadata": "b.csv"}}


@pytest.mark.parametrize(
    ("pools", "held_out", "reason", "action"),
    [
        ({}, False, "no such file was found", "correct ingest.root"),
        (POOLS, False, "no such file was found", "correct ingest.pools.audio.root or ingest.pools.audio.metadata"),
        ({"all": {"root": "a"}}, False, "no such file was found", "correct ingest.pools.all.root"),
        ({"image": POOLS["image"]}, False, "no pool has kind audio or mixed", "correct the kinds of ingest.pools"),
        ({}, True, "all 2 items are held out", "correct ingest.holdout"),
        ({"audio": {"root": "b", "role": "holdout"}}, True, "all 2 items are held out", "correct ingest.pools.audio.role"),
    ],
)
def test_an_empty_pool_names_the_keys_of_its_sources(pools: dict, held_out: bool, reason: str, action: str) -> None:
    form = {"pools": pools} if pools else {"root": "pool", "holdout": {"split": "gold"}}
    rows = {"image": [{"holdout": False}], "audio": [{"holdout": True}] * 2 * held_out}
    with pytest.raises(DataError) as caught:
        check(rows, [], IngestConfig.model_validate(form))
    assert caught.value.reason == f"the audio pool is empty after ingest: {reason}"
    assert caught.value.action == action


def test_count_pool_items_near_holdout() -> None:
    rows = [{"group_id": "g", "holdout": True}, {"group_id": "g", "holdout": False}, {"group_id": "h", "holdout": False}]
    assert count_pool_items_near_holdout(rows) == 1
