"""Errors as dictionaries and in `error.json`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline_steps.core.errors import ERROR_FILE, EXIT_CODES, DataError, StageError, error_from_dict, load_error_file


@pytest.mark.parametrize("kind", [*StageError.__subclasses__(), StageError])
def test_error_from_its_dictionary_is_equal(kind: type[StageError]) -> None:
    if not kind.__module__.endswith("core.errors"):
        pytest.skip("a subclass of another module")
    error = kind("reason", "action", transient=True, details={"a": 1})
    again = error_from_dict(json.loads(json.dumps(error.as_dict())))
    assert type(again) is kind
    assert again.as_dict() == error.as_dict()


def test_error_file_of_a_stage(tmp_path: Path) -> None:
    written = {"stage": "ingest", **DataError("trace\nlast line\n", "look").as_dict()}
    (tmp_path / ERROR_FILE).write_text(json.dumps(written))
    error = load_error_file(tmp_path)
    assert error is not None
    assert (type(error), error.stage, error.reason, error.action, error.exit_code) == (
        DataError,
        "ingest",
        "last line",
        "look",
        3,
    )


def test_an_interrupted_stage_keeps_its_exit_code(tmp_path: Path) -> None:
    (tmp_path / ERROR_FILE).write_text('{"stage": "train", "kind": "interrupted", "exit_code": 143, "transient": true}')
    error = load_error_file(tmp_path)
    assert error is not None
    assert (error.kind, error.reason, error.exit_code, error.transient) == ("interrupted", "interrupted", 143, True)


@pytest.mark.parametrize("text", [None, "", "[]", "{", "7", '{"exit_code": "x"}', '{"exit_code": null}', "\udcff"])
def test_invalid_error_file_is_none(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / ERROR_FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert load_error_file(tmp_path) is None


def test_every_exit_code_has_a_meaning() -> None:
    assert {kind.exit_code for kind in (StageError, *StageError.__subclasses__())} <= set(EXIT_CODES)
