from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline_steps.core.errors import DataError
from pipeline_steps.core.schemas import IMAGES, QUARANTINE
from pipeline_steps.core.tables import to_table
from pipeline_steps.ingest.catalog import (
    CandidateFile,
    RejectedFile,
    catalog_rows,
    check_identity,
    check_pools,
    crossing_groups,
    group_by_content,
)
from pipeline_steps.ingest.reason_codes import CODES
from pipeline_steps.pair.release.license_terms import terms


def file(name: str, content: int, **about: object) -> CandidateFile:
    sha = hashlib.sha256(str(content).encode()).hexdigest()
    return CandidateFile(name, name, sha, 10, "image", "PNG", **about)


def measured(content: int) -> dict:
    return {"code": None, "reason": None, "format": "PNG", "normalizations": [], "width": 9, "height": 9, "num_frames": 1,
            "phash": f"{content * 0x9E3779B97F4A7C15 % 2**64:016x}"}  # fmt: skip


CONTENTS = st.lists(st.tuples(st.integers(0, 8), st.booleans(), st.sampled_from([None, "g", "h"])), max_size=20)


@given(CONTENTS)
def test_every_file_is_in_exactly_one_row(contents: list[tuple[int, bool, str | None]]) -> None:
    files = [file(f"{n}.png", c, holdout=h, group=g) for n, (c, h, g) in enumerate(contents)]
    items = group_by_content(files)
    rows = catalog_rows("image", items, {f.item: measured(c) for f, (c, _, _) in zip(files, contents, strict=True)}, 4)
    table = to_table(IMAGES, rows)
    assert sorted(source for sources in table["sources"].to_pylist() for source in sources) == sorted(f.shown for f in files)
    by_id = {row["image_id"]: row for row in rows}
    for one in files:
        row = by_id[one.item]
        assert row["holdout"] or not one.holdout, "content that is held out anywhere is held out everywhere"
        assert row["group_id"] <= row["image_id"]
        same = [other for other in files if one.group and other.group == one.group]
        assert all(by_id[other.item]["group_id"] == row["group_id"] for other in same)


def test_provenance_of_one_content_under_many_names() -> None:
    files = [
        file("b.jpg", 1, license="MIT", author="B", holdout=True),
        file("a.png", 1, license="CC0-1.0", author="A", source="s"),
        file("c.png", 1, license="MIT"),
    ]
    (row,) = catalog_rows("image", group_by_content(files), {files[0].item: measured(1)}, 4)
    assert row["path"] == "a.png"
    assert row["sources"] == ["a.png", "b.jpg", "c.png"]
    assert (row["license"], row["author"], row["source"]) == ("CC0-1.0 AND MIT", "A; B", "s")
    assert row["holdout"]
    assert row["normalizations"] == ["WRONG_EXTENSION"]


@pytest.mark.parametrize("closed", ["LicenseRef-Proprietary", "CC-BY-NC-ND-4.0", "some words"])
@pytest.mark.parametrize("choice", ["CC-BY-4.0 OR MIT", "AFL-3.0 OR CC0-1.0", "zlib  OR  MIT"])
def test_a_choice_of_licenses_does_not_undo_another_that_binds(closed: str, choice: str) -> None:
    files = [file("a.png", 1, license=closed), file("b.png", 1, license=choice)]
    (row,) = catalog_rows("image", group_by_content(files), {files[0].item: measured(1)}, 4)
    assert f"({choice})" in row["license"]
    assert not terms(row["license"]).publishable
    (alone,) = catalog_rows("image", group_by_content(files[1:]), {files[1].item: measured(1)}, 4)
    assert alone["license"] == choice


def test_ids_that_collide_stop_the_stage() -> None:
    first = file("a.png", 1)
    other = CandidateFile("b.png", "b.png", first.sha256[:32] + "0" * 32, 10, "image", "PNG")
    check_identity([first, first])
    with pytest.raises(DataError, match=r"a\.png and b\.png share the id"):
        check_identity([first, other])


@given(st.lists(st.sampled_from(sorted(CODES)), max_size=12), st.integers(0, 20), st.floats(0, 1))
def test_tolerance(codes: list[str], accepted: int, most: float) -> None:
    refused = [RejectedFile(f"{n}", "image", code, "") for n, code in enumerate(codes)]
    to_table(QUARANTINE, [item.row() for item in refused])
    rows = {"image": [{"holdout": False}] * accepted, "audio": [{"holdout": False}]}
    dropped = sum(code not in {"AUD_SILENT", "FORGOTTEN"} for code in codes)  # those abstain
    n_in = accepted + 1 + len(codes)
    if not accepted:
        with pytest.raises(DataError, match="picture pool is empty"):
            check_pools(rows, n_in, refused, most)
    elif dropped > most * n_in:
        with pytest.raises(DataError, match=f"{dropped} of {n_in} files are bad"):
            check_pools(rows, n_in, refused, most)
    else:
        check_pools(rows, n_in, refused, most)


def test_held_out_items_do_not_make_a_pool() -> None:
    with pytest.raises(DataError, match="sound pool is empty"):
        check_pools({"image": [{"holdout": False}], "audio": [{"holdout": True}]}, 2, [], 0.05)


def test_crossing_groups_counts_pool_items_beside_held_out_ones() -> None:
    rows = [{"group_id": "g", "holdout": True}, {"group_id": "g", "holdout": False}, {"group_id": "h", "holdout": False}]
    assert crossing_groups(rows) == 1
