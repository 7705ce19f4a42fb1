"""Tests of the stage report."""

from pathlib import Path

import pytest

from pipeline_steps.core.errors import DataError
from pipeline_steps.core.stage_report import StageReport


def test_unbalanced_counts_are_an_error(tmp_path: Path) -> None:
    report = StageReport("caption", n_in=5, n_ok=3, n_abstained=1)
    with pytest.raises(DataError, match="counts do not add up"):
        report.write(tmp_path / "caption.json")
    assert not (tmp_path / "caption.json").exists()
    report.n_quarantined = 1
    report.write(tmp_path / "caption.json")
    assert (tmp_path / "caption.json").is_file()
