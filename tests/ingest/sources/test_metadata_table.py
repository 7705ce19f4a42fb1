from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline_steps.core.errors import DataError
from pipeline_steps.ingest.sources.file_walk import unique_rows
from pipeline_steps.ingest.sources.metadata_table import (
    MetadataQuery,
    MetadataRow,
    MetadataTableJob,
    filter_rows,
    read_metadata_table,
)

QUERY = MetadataQuery(
    "file", "license", None, ("package", "source"), ("package", "source"), {"split": ("pool",)}, {"split": ("gold",)}
)
HEADER = "id,file,label,license,package,source,split\n"


def read(folder: Path, text: str | bytes, query: MetadataQuery = QUERY) -> dict:
    (folder / "table.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_metadata_table(MetadataTableJob(str(folder), "table.csv", query))


def test_pool_and_holdout_filters(tmp_path: Path) -> None:
    text = HEADER + "1,a.png,dog,MIT,p,s,pool\n2,b.wav,dog,,p,,gold\n3,c.wav,cat,MIT,,,other\n\n"
    assert read(tmp_path, text) == {
        "rows": [
            MetadataRow("a.png", "MIT", None, "p/s", "p\x1fs", False, 1),
            MetadataRow("b.wav", None, None, "p/", "p\x1f", True, 2),
        ],
        "filtered": 1,
    }


def test_words_of_several_columns_and_rows_are_joined(tmp_path: Path) -> None:
    query = QUERY._replace(text=("label", "id"))
    rows = read(tmp_path, HEADER + "1,a.png,a  dog,MIT,p,s,pool\n2,a.png,a  dog,MIT,p,s,pool\n", query)["rows"]
    assert [row.text for row in rows] == ["a dog; 1", "a dog; 2"]
    assert [row.text for row in unique_rows(rows)] == ["a dog; 1; a dog; 2"]


def test_rows_of_commas_are_empty_lines(tmp_path: Path) -> None:
    text = HEADER + ",,,,,,\n1,a.png,dog,MIT,p,s,pool\n , ,,,,,\n,,\n\n,,,,,,\n"
    assert [row.file for row in read(tmp_path, text)["rows"]] == ["a.png"]


def test_only_configured_columns_are_read() -> None:
    class Strict(dict):
        def __getitem__(self, key: str) -> str:
            assert key in QUERY.columns()
            return "pool"

    rows, _ = filter_rows([Strict()], QUERY)
    assert len(rows) == 1
    assert not {"label", "caption", "id"} & set(QUERY.columns())


def test_without_pool_filter_all_rows_are_read(tmp_path: Path) -> None:
    text = HEADER + "1,a.png,dog,MIT,p,s,pool\n2,b.wav,dog,,p,t,gold\n3,c.wav,cat,MIT,,,other\n"
    answer = read(tmp_path, text, QUERY._replace(pool=None))
    assert [(row.file, row.holdout, row.group) for row in answer["rows"]] == [
        ("a.png", False, "p\x1fs"), ("b.wav", True, "p\x1ft"), ("c.wav", False, None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,license,package,sourc,split\n", "no column 'source' (columns.source; did you mean 'sourc'?); it has"),
        ("", "no column 'file'"),
        (HEADER + "1,a.png,dog\n", "row 1 has 3 fields, the header has 7"),
        (HEADER.encode() + b"\xff\xfe,,,,,,\n", "UnicodeDecodeError"),
        (HEADER + '1,"a.png,dog', "Error"),
        (HEADER + "1," + "x" * 2_000_000 + ",,,,,\n", "field larger"),
    ],
)
def test_error_of_an_unusable_table(tmp_path: Path, text: str | bytes, message: str) -> None:
    assert message in read(tmp_path, text)["error"]


def test_parquet_tables(tmp_path: Path) -> None:
    table = pa.table(
        {name: ["x", None] for name in HEADER.strip().split(",")} | {"split": ["pool", "pool"], "file": ["a", "b"]}
    )
    pq.write_table(table, tmp_path / "table.parquet")
    answer = read_metadata_table(MetadataTableJob(str(tmp_path), "table.parquet", QUERY))
    assert [(row.file, row.license, row.source) for row in answer["rows"]] == [("a", "x", "x/x"), ("b", None, None)]
    (tmp_path / "table.parquet").write_bytes(b"PAR1 not really PAR1")
    assert "error" in read_metadata_table(MetadataTableJob(str(tmp_path), "table.parquet", QUERY))


@given(st.binary(max_size=300))
def test_any_bytes_are_a_table_or_an_error(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    answer = read(tmp_path_factory.getbasetemp(), b"file,license,package,source,split\n" + text)
    assert set(answer) in ({"rows", "filtered"}, {"error"})


def test_c6_rows_that_describe_one_file_twice() -> None:
    first = MetadataRow("a.png", "MIT", None, None, None, False, 1)
    assert unique_rows([first, first._replace(line=9)]) == [first]
    with pytest.raises(DataError, match=r"rows 1 and 4 .* a\.png and differ in license, holdout"):
        unique_rows([first, first._replace(license="CC0-1.0", holdout=True, line=4)])
