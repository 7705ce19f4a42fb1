"""The benchmark at true size, with tiny models: every stage of preset `full` runs and prints its row."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.full_size import STAGES


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.usefixtures("assets")
def test_every_stage_runs_with_tiny_models(project: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.full_size", "--scratch", str(tmp_path), "--tiny"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in done.stdout.splitlines() if line.startswith("| ")}
    assert [name for name in rows if name != "stage"] == list(STAGES)
    assert "3 of 3 images" in rows["caption"]
    assert "64 px" in rows["stock diffusers"]
