"""Tests of both executors: cache parts, settings, errors of actors."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline_steps.caption.config import CaptionConfig
from pipeline_steps.core.errors import ConfigError, DataError, IntegrityError, StageError
from pipeline_steps.core.executors.base import RayConfig, Result
from pipeline_steps.core.executors.local import process_and_cache
from pipeline_steps.core.executors.ray import OUTCOME, RayWorker, _deserialize_error, _serialize_error
from pipeline_steps.core.executors.run import run_items
from pipeline_steps.core.hashing import fingerprint, text_id
from pipeline_steps.core.result_cache import ResultCache

SCHEMA = pa.schema([pa.field("value", pa.string())])


class Upper:
    """Upper case of the id; `bad...` has none, `stop` stops the stage."""

    def __init__(self, folder: Path) -> None:
        self.cache = ResultCache(str(folder), "upper", fingerprint(self.describe()), SCHEMA)

    def describe(self) -> Any:
        return "upper"

    def load(self) -> None:
        pass

    def results(self, ids: Sequence[str]) -> Iterator[tuple[str, Result]]:
        for key in ids:
            if key == "stop":
                raise IntegrityError("weights changed")
            yield key, ("BAD", "it is bad") if key.startswith("bad") else {"value": key.upper()}


@given(st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f", "g", "bad1", "bad2"]), unique=True), st.integers(1, 9))
def test_rows_are_cached_for_every_part_size(tmp_path_factory: pytest.TempPathFactory, ids: list[str], part: int) -> None:
    work = Upper(tmp_path_factory.mktemp("cache"))
    done = run_items(work, ids, part)
    good = [key for key in ids if not key.startswith("bad")]
    assert done.rows == {key: {"value": key.upper()} for key in good}
    assert done.failed == {key: ("BAD", "it is bad") for key in ids if key not in good}
    assert work.cache.load(ids) == done.rows


@pytest.mark.fault
def test_items_finished_before_an_error_are_cached(tmp_path: Path) -> None:
    work = Upper(tmp_path)
    with pytest.raises(IntegrityError):
        run_items(work, ["a", "b", "stop", "c"], batch_size=100)
    assert set(work.cache.load(["a", "b", "c"])) == {"a", "b"}
    results = process_and_cache(work, ["x", "y", "z"], 100)
    next(results)
    results.close()  # as when the process is asked to end
    assert set(work.cache.load(["x", "y", "z"])) == {"x"}


@pytest.mark.fault
def test_items_that_all_fail_stop_the_stage_with_the_most_frequent_reason(tmp_path: Path) -> None:
    class Failing(Upper):
        def results(self, ids: Sequence[str]) -> Iterator[tuple[str, Result]]:
            for at, key in enumerate(ids):
                asked.append(key)
                yield key, ("A", "odd one") if at % 3 == 1 else ("B", f"Invalid buffer size: {at}")

    asked: list[str] = []
    ids = [f"item{number}" for number in range(1000)]
    with pytest.raises(DataError, match=r"first 33 of 1000 .* \(22 of 33\): B: Invalid buffer size: 0") as caught:
        run_items(Failing(tmp_path), ids, 8, failure_limit=32)
    assert caught.value.exit_code == 3
    assert len(asked) == 33
    assert len(run_items(Failing(tmp_path), ids, 8).failed) == 1000
    assert len(run_items(Failing(tmp_path), ids[:32], 8, failure_limit=32).failed) == 32


@pytest.mark.fault
def test_one_success_lets_a_stage_continue(tmp_path: Path) -> None:
    ids = ["bad", "good", *(f"bad{number}" for number in range(100))]
    assert len(run_items(Upper(tmp_path), ids, 8, failure_limit=32).failed) == 101


def test_the_accepted_fraction_counts_where_results_are_cached() -> None:
    config = CaptionConfig(max_failed_fraction=0.05)
    assert (config.failure_limit(10_000, 0), config.failure_limit(10_000, 9_000), config.failure_limit(100, 90)) == (
        32,
        500,
        32,
    )
    assert CaptionConfig(max_failed_fraction=1.0).failure_limit(10_000, 0) == 10_000


class Elsewhere(Upper):
    """Processor with another fingerprint, as on a machine with other weights."""

    def load(self) -> None:
        self.describe = lambda: "lower"  # type: ignore[method-assign]


@pytest.mark.fault
def test_actor_returns_the_error_that_stops_the_stage(tmp_path: Path) -> None:
    from ray import cloudpickle

    def answer(work: Upper, folder: Path, ids: Sequence[str]) -> list[dict[str, str]]:
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        actor = RayWorker(cloudpickle.dumps(work), 10, str(folder))
        return list(actor(pa.table({"id": list(ids)})).to_pylist())

    rows = answer(Upper(tmp_path), tmp_path, ["a", "bad1"])
    assert rows == [dict(zip(OUTCOME.names, row, strict=True)) for row in (("a", "", "", ""), ("bad1", "BAD", "it is bad", ""))]
    stopped = _deserialize_error(answer(Upper(tmp_path), tmp_path, ["stop"])[0]["error"])
    assert (type(stopped), str(stopped)) == (IntegrityError, "weights changed")
    for work, folder, words in (
        (Upper(tmp_path), tmp_path / "nowhere", "has no folder"),
        (Elsewhere(tmp_path), tmp_path, "has another fingerprint than the driver"),
    ):
        error = _deserialize_error(answer(work, folder, ["a"])[0]["error"])
        assert isinstance(error, ConfigError)
        assert words in error.reason


def test_errors_are_serialized_completely() -> None:
    error = DataError("a table is broken", "mend it", transient=True, details={"rows": 3})
    assert _deserialize_error(_serialize_error(error)) == error
    odd = _deserialize_error(_serialize_error(ValueError("nobody foresaw this")))
    assert not isinstance(odd, StageError)
    assert "nobody foresaw this" in str(odd)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"min_actors": 3, "max_actors": 2}, "above ray.max_actors"),
        ({"gpus_per_actor": 1.5}, "must be a whole number"),
        ({"cpus_per_actor": 0.0}, "needs processors or GPUs"),
        ({"address": "ray://head:10001"}, "address"),
        ({"gpu_per_actor": 1}, "gpu_per_actor"),
    ],
)
def test_invalid_settings_are_errors(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        RayConfig(**settings)


def test_openai_server_requires_executor_local() -> None:
    with pytest.raises(ValidationError, match="requires 'local'"):
        CaptionConfig.from_params({"captioner": "openai_server", "openai_server": {"model": "x"}, "executor": "ray"})


@pytest.mark.fault
def test_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"seeing-sound\[ray\]"):
        run_items(Upper(tmp_path), ["a"], 1, "ray")


class Remembering(LocalFileSystem):  # type: ignore[misc]
    """File system that caches listings until they are invalidated, as those of object stores do."""

    protocol = ("remembering",)

    def ls(self, path: str, detail: bool = False, **more: Any) -> Any:
        if (path, detail) not in self.dircache_:
            self.dircache_[path, detail] = super().ls(path, detail=detail, **more)
        return self.dircache_[path, detail]

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.dircache_: dict[tuple[str, bool], Any] = {}

    def invalidate_cache(self, path: str | None = None) -> None:
        self.dircache_.clear()


def test_parts_of_other_processes_are_loaded(tmp_path: Path) -> None:
    import fsspec

    fsspec.register_implementation("remembering", Remembering, clobber=True)
    mine = ResultCache(f"remembering://{tmp_path}", "stage", "print", SCHEMA)
    other = ResultCache(str(tmp_path), "stage", "print", SCHEMA)
    other.append({"a": {"value": text_id("a")}})
    assert set(mine.load(["a", "b"])) == {"a"}
    other.append({"b": {"value": text_id("b")}})
    assert set(mine.load(["a", "b"])) == {"a", "b"}
