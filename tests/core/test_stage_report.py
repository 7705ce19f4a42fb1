"""Tests of the stage report."""

import json
from pathlib import Path

import pytest

from pipeline_steps.core.errors import DataError
from pipeline_steps.core.stage_report import StageReport


def test_unbalanced_counts_are_an_error(tmp_path: Path) -> None:
    report = StageReport("caption", n_in=5, n_ok=3, n_abstained=1)
    with pytest.raises(DataError, match="counts do not add up"):
        report.write(tmp_path / "caption.json", tmp_path / "runtime.json")
    assert not (tmp_path / "caption.json").exists()
    report.n_quarantined = 1
    report.write(tmp_path / "caption.json", tmp_path / "runtime.json")
    assert (tmp_path / "caption.json").is_file()


def test_a_report_is_a_function_of_the_inputs(tmp_path: Path) -> None:
    """Durations and cache use are in a file of their own, so that a second run of the same inputs writes the same report."""
    written = []
    for misses, seconds in ((3, 0.0), (0, 5.0)):
        report = StageReport("embed", n_in=3, n_ok=3, cache_misses=misses, cache_hits=3 - misses, metrics={"dimension": 4})
        report.started -= seconds
        report.write(tmp_path / "embed.json", tmp_path / "runtime.json")
        written.append((tmp_path / "embed.json").read_bytes())
        assert json.loads((tmp_path / "runtime.json").read_text())["cache_misses"] == misses
    assert written[0] == written[1]
