"""Tests of the result cache: round trips, damaged and unreadable parts, concurrent readers."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline_steps.core.errors import ResourceError, ServiceError
from pipeline_steps.core.result_cache import ResultCache

SCHEMA = pa.schema([pa.field("value", pa.int64()), pa.field("payload", pa.binary())])


def cache(folder: Path, fingerprint: str = "f") -> ResultCache:
    return ResultCache(str(folder), "caption", fingerprint, SCHEMA)


@given(st.lists(st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(0, 99), max_size=6), max_size=6))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_loaded_rows_equal_appended_rows(tmp_path_factory: pytest.TempPathFactory, batches: list[dict[str, int]]) -> None:
    folder = tmp_path_factory.mktemp("cache")
    known: dict[str, int] = {}
    for batch in batches:
        new = {key: value for key, value in batch.items() if key not in known}
        cache(folder).append({key: {"value": value, "payload": b"x"} for key, value in new.items()})
        known.update(new)
    loaded = cache(folder).load([*known, "absent"])
    assert {key: row["value"] for key, row in loaded.items()} == known


def test_fingerprints_have_separate_rows(tmp_path: Path) -> None:
    cache(tmp_path).append({"a": {"value": 1, "payload": b""}})
    assert cache(tmp_path, "other").load(["a"]) == {}


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_damaged_part_is_renamed_and_ignored(tmp_path: Path, damage: bytes | None) -> None:
    cache(tmp_path).append({"a": {"value": 1, "payload": b"p"}})
    cache(tmp_path).append({"b": {"value": 2, "payload": b"q"}})
    parts = sorted(tmp_path.rglob("*.parquet"))
    parts[0].write_bytes(parts[0].read_bytes()[:-7] if damage is None else damage)
    left = cache(tmp_path).load(["a", "b"])
    assert len(left) == 1
    assert len(list(tmp_path.rglob("*.damaged"))) == 1
    assert cache(tmp_path).load(["a", "b"]) == left


@pytest.mark.fault
def test_unreadable_part_is_an_error_and_keeps_its_name(tmp_path: Path) -> None:
    part_of: dict[str, Path] = {}
    for key in ("a", "b"):
        cache(tmp_path).append({key: {"value": 1, "payload": b"p"}})
        part_of[key] = (set(tmp_path.rglob("*.parquet")) - set(part_of.values())).pop()
    part, away = part_of["a"], tmp_path / "away"
    part.rename(away)
    part.mkdir()  # a real error of reading that root meets too
    with pytest.raises(ResourceError, match="Is a directory") as caught:
        cache(tmp_path).load(["a", "b"])
    assert caught.value.transient
    part.rmdir()
    away.rename(part)
    assert len(cache(tmp_path).load(["a", "b"])) == 2
    assert list(tmp_path.rglob("*.damaged")) == []


@pytest.mark.fault
def test_unavailable_store_is_a_transient_service_error(monkeypatch: pytest.MonkeyPatch) -> None:
    store = ResultCache("memory://away/items", "embed", "f", SCHEMA)
    store.append({"a": {"value": 7, "payload": b"z"}})

    def broken(path: str) -> bytes:
        raise TimeoutError(f"no answer for {path}")

    with monkeypatch.context() as patch:
        patch.setattr(store._fs, "cat_file", broken)
        with pytest.raises(ServiceError, match="no answer") as caught:
            store.load(["a"])
    assert caught.value.transient
    assert store.load(["a"])["a"]["value"] == 7


@pytest.mark.fault
def test_part_renamed_by_another_reader_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One part is renamed between reading and renaming, another one between listing and reading."""
    for key in ("a", "b", "c"):
        cache(tmp_path).append({key: {"value": 1, "payload": b"p"}})
    first, second = sorted(tmp_path.rglob("*.parquet"))[:2]
    first.write_bytes(b"garbage")
    slow = cache(tmp_path)
    slow._fs = LocalFileSystem(skip_instance_cache=True)
    read = slow._fs.cat_file

    def late(path: str) -> bytes:
        if path == str(second):
            second.unlink(missing_ok=True)
            return read(path)
        payload = read(path)
        cache(tmp_path).load(["a", "b", "c"])  # the other reader, between look and move
        return payload

    monkeypatch.setattr(slow._fs, "cat_file", late)
    assert len(slow.load(["a", "b", "c"])) == 1
    assert [path.name for path in tmp_path.rglob("*.damaged")] == [f"{first.name}.damaged"]


def test_store_may_be_any_fsspec_url() -> None:
    store = ResultCache("memory://team/items", "embed", "f", SCHEMA)
    store.append({"a": {"value": 7, "payload": b"z"}})
    assert ResultCache("memory://team/items", "embed", "f", SCHEMA).load(["a"]) == {"a": {"value": 7, "payload": b"z"}}


@given(st.lists(st.lists(st.floats(-9, 9, width=32), max_size=5), max_size=8), st.integers(1, 4))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_vectors_equal_loaded_lists(tmp_path_factory: pytest.TempPathFactory, rows: list[list[float]], size: int) -> None:
    folder = tmp_path_factory.mktemp("cache")
    store = ResultCache(
        str(folder), "embed", "f", pa.schema([pa.field("vector", pa.list_(pa.float32())), pa.field("n", pa.int64())])
    )
    named = {f"k{number}": {"vector": row, "n": number} for number, row in enumerate(rows)}
    keys = list(named)
    for start in range(0, len(keys), size):
        store.append({key: named[key] for key in keys[start : start + size]})
    asked = [*keys[::2], "absent"]
    loaded, vectors = store.load(asked, ["vector"]), store.vectors(asked)
    assert sorted(loaded) == sorted(vectors) == sorted(keys[::2])
    assert all(vectors[key].dtype == np.float32 and vectors[key].tolist() == row["vector"] for key, row in loaded.items())


def test_part_with_another_schema_is_damaged(tmp_path: Path) -> None:
    ResultCache(str(tmp_path), "caption", "f", pa.schema([pa.field("value", pa.string())])).append({"a": {"value": "words"}})
    assert cache(tmp_path).load(["a"]) == {}
    assert len(list(tmp_path.rglob("*.damaged"))) == 1
