"""The memo: nothing is computed twice, damage costs a recomputation and never a wrong answer."""

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


def memo(folder: Path, fingerprint: str = "f") -> ResultCache:
    return ResultCache(str(folder), "caption", fingerprint, SCHEMA)


@given(st.lists(st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(0, 99), max_size=6), max_size=6))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_gives_back_what_was_put(tmp_path_factory: pytest.TempPathFactory, batches: list[dict[str, int]]) -> None:
    folder = tmp_path_factory.mktemp("memo")
    known: dict[str, int] = {}
    for batch in batches:
        new = {key: value for key, value in batch.items() if key not in known}
        memo(folder).append({key: {"value": value, "payload": b"x"} for key, value in new.items()})
        known.update(new)
    loaded = memo(folder).load([*known, "absent"])
    assert {key: row["value"] for key, row in loaded.items()} == known


def test_other_fingerprint_sees_nothing(tmp_path: Path) -> None:
    memo(tmp_path).append({"a": {"value": 1, "payload": b""}})
    assert memo(tmp_path, "other").load(["a"]) == {}


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_part_is_set_aside(tmp_path: Path, damage: bytes | None) -> None:
    memo(tmp_path).append({"a": {"value": 1, "payload": b"p"}})
    memo(tmp_path).append({"b": {"value": 2, "payload": b"q"}})
    parts = sorted(tmp_path.rglob("*.parquet"))
    parts[0].write_bytes(parts[0].read_bytes()[:-7] if damage is None else damage)
    left = memo(tmp_path).load(["a", "b"])
    assert len(left) == 1
    assert len(list(tmp_path.rglob("*.damaged"))) == 1
    assert memo(tmp_path).load(["a", "b"]) == left


@pytest.mark.fault
def test_a_part_that_cannot_be_read_now_is_not_damaged(tmp_path: Path) -> None:
    part_of: dict[str, Path] = {}
    for key in ("a", "b"):
        memo(tmp_path).append({key: {"value": 1, "payload": b"p"}})
        part_of[key] = (set(tmp_path.rglob("*.parquet")) - set(part_of.values())).pop()
    part, away = part_of["a"], tmp_path / "away"
    part.rename(away)
    part.mkdir()  # a real error of reading that root meets too
    with pytest.raises(ResourceError, match="Is a directory") as caught:
        memo(tmp_path).load(["a", "b"])
    assert caught.value.transient
    part.rmdir()
    away.rename(part)
    assert len(memo(tmp_path).load(["a", "b"])) == 2
    assert list(tmp_path.rglob("*.damaged")) == []


@pytest.mark.fault
def test_a_store_that_does_not_answer_is_a_service_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_a_part_that_another_reader_sets_aside_is_nobodys_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two readers meet a damaged part: one looks before the other moves it, one lists it before and opens it after."""
    for key in ("a", "b", "c"):
        memo(tmp_path).append({key: {"value": 1, "payload": b"p"}})
    first, second = sorted(tmp_path.rglob("*.parquet"))[:2]
    first.write_bytes(b"garbage")
    slow = memo(tmp_path)
    slow._fs = LocalFileSystem(skip_instance_cache=True)
    read = slow._fs.cat_file

    def late(path: str) -> bytes:
        if path == str(second):
            second.unlink(missing_ok=True)
            return read(path)
        payload = read(path)
        memo(tmp_path).load(["a", "b", "c"])  # the other reader, between look and move
        return payload

    monkeypatch.setattr(slow._fs, "cat_file", late)
    assert len(slow.load(["a", "b", "c"])) == 1
    assert [path.name for path in tmp_path.rglob("*.damaged")] == [f"{first.name}.damaged"]


def test_any_fsspec_url_serves_as_a_store() -> None:
    store = ResultCache("memory://team/items", "embed", "f", SCHEMA)
    store.append({"a": {"value": 7, "payload": b"z"}})
    assert ResultCache("memory://team/items", "embed", "f", SCHEMA).load(["a"]) == {"a": {"value": 7, "payload": b"z"}}


@given(st.lists(st.lists(st.floats(-9, 9, width=32), max_size=5), max_size=8), st.integers(1, 4))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_vectors_are_what_load_gives(tmp_path_factory: pytest.TempPathFactory, rows: list[list[float]], size: int) -> None:
    folder = tmp_path_factory.mktemp("memo")
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


def test_columns_of_another_shape_are_damage_and_not_a_crash(tmp_path: Path) -> None:
    ResultCache(str(tmp_path), "caption", "f", pa.schema([pa.field("value", pa.string())])).append({"a": {"value": "words"}})
    assert memo(tmp_path).load(["a"]) == {}
    assert len(list(tmp_path.rglob("*.damaged"))) == 1
