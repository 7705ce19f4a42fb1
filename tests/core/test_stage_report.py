"""Tests of the stage report."""

import json
from pathlib import Path

import pytest

from pipeline_steps.core.errors import DataError
from pipeline_steps.core.stage_report import StageReport, accepted_failures


def test_unbalanced_counts_are_an_error(tmp_path: Path) -> None:
    report = StageReport("caption", n_in=5, n_ok=3, n_abstained=1)
    with pytest.raises(DataError, match="counts do not add up"):
        report.write(tmp_path / "caption.json", tmp_path / "runtime.json")
    assert not (tmp_path / "caption.json").exists()
    report.n_quarantined = 1
    report.write(tmp_path / "caption.json", tmp_path / "runtime.json")
    assert (tmp_path / "caption.json").is_file()


@pytest.mark.parametrize(
    ("total", "fraction", "accepted"),
    [(1, 0.05, 0), (2, 0.05, 1), (3, 0.05, 1), (10, 0.05, 5), (100, 0.05, 5), (1000, 0.05, 50), (1000, 0, 0), (8, 1, 8)],
)
def test_a_small_pool_keeps_a_few_bad_items(total: int, fraction: float, accepted: int) -> None:
    assert accepted_failures(total, fraction) == accepted
    report = StageReport("caption", n_in=total, n_quarantined=accepted)
    report.check_failures(fraction, "images", "first: a.png: no", "fix it")
    report.n_quarantined += 1
    with pytest.raises(DataError) as caught:
        report.check_failures(fraction, "images", "first: a.png: no", "fix it")
    assert str(caught.value) == (
        f"caption.max_failed_fraction: {accepted + 1} of {total} images failed, and {fraction:g} accepts {accepted} "
        "(first: a.png: no) -> fix it, or raise caption.max_failed_fraction"
    )


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
