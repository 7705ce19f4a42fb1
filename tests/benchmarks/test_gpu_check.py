"""The GPU check, reduced on a CPU: every part, one table, and rows that are kept when a part is stopped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PARTS = ("card", "correct", "memory", "resume", "training", "pipeline")


@pytest.mark.slow
def test_every_part_runs_reduced_and_prints_one_table(project: Path, tmp_path: Path) -> None:
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    done = subprocess.run(
        [project / "benchmarks/gpu_check.sh", "--smoke"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.startswith("REDUCED")
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows if row[1] == "time"] == [f"| {part}" for part in PARTS]
    assert not [row for row in rows if "no" in row[-1]], "results of a CPU equal themselves"
    assert (tmp_path / "gpu-check/table.md").read_text().strip() in done.stdout


def test_a_part_beyond_its_limit_is_stopped_and_named(project: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--smoke", "--parts", "card", "--limit-scale", "0.005"]
    done = subprocess.run([*command, "--out", tmp_path], cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "| card | failed | ran past its limit of 0 s after" in done.stdout
