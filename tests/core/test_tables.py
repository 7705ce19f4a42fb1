"""Tests of tables: errors name the column; bytes depend on the rows only."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline_steps.core import tables
from pipeline_steps.core.errors import DataError, IntegrityError
from pipeline_steps.core.schemas import ABSTAINED, EVENTS
from pipeline_steps.core.tables import read_table, to_table, write_table


def row(image: str, score: float | None = None) -> dict[str, object]:
    return {"image_id": image, "stage": "pair", "code": "X", "reason": "r", "score": score}


@given(st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=20), st.randoms())
@settings(max_examples=30, deadline=None)
def test_order_of_rows_does_not_change_the_table(names: list[str], shuffler: random.Random) -> None:
    rows = [row(name) for name in names]
    shuffled = list(rows)
    shuffler.shuffle(shuffled)
    assert to_table(ABSTAINED, rows).equals(to_table(ABSTAINED, shuffled))


def test_same_rows_same_bytes(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", ABSTAINED, [row("a"), row("b", 0.5)])
    write_table(tmp_path / "b.parquet", ABSTAINED, [row("b", 0.5), row("a")])
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_optional_column_without_a_value_is_absent_and_read_as_null(tmp_path: Path) -> None:
    event = {"image_id": "a", "rank": 0, "text_id": "t", "phrase": "p", "sound_source": "s", "visible": True, "salience": 1.0,
             "confidence": 1.0}  # fmt: skip
    required = [name for name in EVENTS.schema.names if name not in EVENTS.optional]
    for stated in (None, "far"):
        write_table(tmp_path / "t.parquet", EVENTS, [event | {"distance": stated}, event | {"rank": 1}])
        columns = pq.read_schema(tmp_path / "t.parquet").names
        assert columns == [*required, *(["distance"] if stated else [])]
        table = read_table(tmp_path / "t.parquet", EVENTS)
        assert table.schema == EVENTS.schema
        assert table["distance"].to_pylist() == [stated, None]


def test_duplicate_key_is_an_error() -> None:
    with pytest.raises(DataError, match="not unique"):
        to_table(ABSTAINED, [row("a"), row("a")])


def test_missing_column_wrong_type_and_null_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    good = to_table(ABSTAINED, [row("a")])
    pq.write_table(good.drop_columns(["reason"]), path)
    with pytest.raises(DataError, match="'reason' is missing"):
        read_table(path, ABSTAINED)
    pq.write_table(good.set_column(4, "score", pa.array(["x"])), path)
    with pytest.raises(DataError, match="'score' has type string"):
        read_table(path, ABSTAINED)
    pq.write_table(good.set_column(1, "stage", pa.array([None], pa.string())), path)
    with pytest.raises(DataError, match="'stage' has 1 empty"):
        read_table(path, ABSTAINED)


def test_unreadable_and_missing_files_have_an_action(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="dvc repro"):
        read_table(tmp_path / "none.parquet", ABSTAINED)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(IntegrityError, match="not a readable Parquet"):
        read_table(tmp_path / "bad.parquet", ABSTAINED)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3)), max_size=12))
@settings(max_examples=60, deadline=None)
def test_sorted_table_is_not_sorted_again(keys: list[tuple[str, int]]) -> None:
    """Large tables skip the sort; rows and errors are the same."""
    rows = {
        "image_id": [key[0] for key in keys], "rank": pa.array([key[1] for key in keys], pa.int16()),
        "text_id": [""] * len(keys), "phrase": [""] * len(keys),
        "sound_source": [""] * len(keys), "visible": [True] * len(keys),
        "salience": pa.array([1.0] * len(keys), pa.float32()), "confidence": pa.array([1.0] * len(keys), pa.float32()),
    }  # fmt: skip
    table = pa.table(rows | dict.fromkeys(EVENTS.optional, [None] * len(keys)), schema=EVENTS.schema)
    outcomes = []
    for limit in (0, 10**9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tables, "ORDERED_ROWS", limit)
            try:
                outcomes.append(tables.validate_table(EVENTS, table, "here").to_pylist())
            except DataError as error:
                outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
