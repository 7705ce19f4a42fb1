"""Tests of `sonify compare`, `promote` and `rollback`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline_steps.commands.compare_page import bar
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.registry.evaluation_results import MetricComparison
from pipeline_steps.tracking.registry.paired_bootstrap import PairedDifference
from tests.factories.cli_project import Sonify, json_output
from tests.factories.registered_models import client_of, register, write_gate

WEAK, STRONG = [0.50 + 0.01 * (i % 3) for i in range(12)], [0.60 + 0.01 * (i % 4) for i in range(12)]


@pytest.fixture
def runs(pool: ProjectPaths) -> list[str]:
    """Evaluation runs of two versions; the second logged all samples, the first all but one."""
    write_gate(pool)
    found = [
        register(pool, WEAK, version=1, run_params={"seed": "0", "steps": "20"}),
        register(pool, STRONG, kid=0.08, version=2, run_params={"seed": "0", "steps": "60"}),
    ]
    folder = pool.root / "compare"
    folder.mkdir()
    for name in ("drawn-s0.png", "drawn-s1.png", "picture-i0.jpg", "picture-i1.jpg", "sound-s0.mp3", "sound-s1.mp3"):
        (folder / name).write_bytes(name.encode())
    client_of(pool).log_artifacts(found[1], str(folder), "report/compare")
    (folder / "drawn-s1.png").unlink()
    client_of(pool).log_artifacts(found[0], str(folder), "report/compare")
    return found


def test_comparison_has_metrics_intervals_and_differences(sonify: Sonify, runs: list[str], pool: ProjectPaths) -> None:
    found = json_output(sonify("compare", "1", "2", "--json"))
    by_name = {row["metric"]: row for row in found["metrics"]}
    rate, kid, fd = (by_name[f"test/{name}_toy"] for name in ("win_rate", "kid", "fd"))
    assert rate["difference"] == pytest.approx(sum(STRONG) / 12 - sum(WEAK) / 12)
    assert rate["low"] < rate["difference"] < rate["high"]
    assert (rate["items_better"], rate["verdict"], rate["clusters"]) == (12, "better", 12)
    # The two models' draws share their noise: their difference has none.
    assert kid["low"] == pytest.approx(kid["high"]) == pytest.approx(-0.02)
    assert (kid["higher_is_better"], kid["verdict"]) == (False, "better")
    assert (fd["p"], fd["verdict"]) == (None, "not tested")
    assert "biased" in fd["note"]
    assert found["parameters"] == [{"name": "steps", "a": "20", "b": "60"}]
    assert found["evaluations"] == runs
    kept = {item.path for item in client_of(pool).list_artifacts(runs[1], "compare/2-with-1")}
    assert kept == {"compare/2-with-1/compare.html", "compare/2-with-1/compare.json"}


def test_page_embeds_all_files(sonify: Sonify, runs: list[str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = sonify("compare", "1", "2", "--html", str(page), "--no-log")
    assert result.exit_code == 0
    assert "better" in result.output
    text = page.read_text()
    assert "Version 2 against version 1" in text
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text
    assert "http://" not in text
    assert "https://" not in text
    assert "<script" not in text
    assert text.count('class="sample"') == 2
    assert text.count("not kept") == 1
    assert text.count("data:image/png") == 3


def test_untrusted_names_are_escaped(pool: ProjectPaths, sonify: Sonify, tmp_path: Path) -> None:
    write_gate(pool)
    register(pool, WEAK, version=1, run_params={"note": "<img src=x onerror=alert(1)>"})
    register(pool, STRONG, version=2)
    page = tmp_path / "page.html"
    assert sonify("compare", "1", "2", "--html", str(page)).exit_code == 0
    assert "<img src=x" not in page.read_text()
    assert "&lt;img src=x" in page.read_text()


def test_other_data_is_an_error_with_both_hashes(pool: ProjectPaths, sonify: Sonify) -> None:
    register(pool, WEAK, version=1)
    register(pool, STRONG, version=2, pairs="e" * 32 + ".dir")
    result = sonify("compare", "1", "2", "--json")
    assert result.exit_code == 6
    reason = json.loads(result.stdout)["error"]["reason"]
    assert "0001.dir" in reason
    assert "eeee.dir" in reason
    assert "--evaluate" in json.loads(result.stdout)["error"]["action"]


def test_versions_are_found_by_alias_run_and_md5(pool: ProjectPaths, sonify: Sonify, runs: list[str]) -> None:
    from tests.factories.registered_models import md5_of

    for name in ("challenger", "@challenger", "2", runs[1], md5_of(2), "models:/audio2image/2"):
        assert json_output(sonify("compare", "1", name, "--no-log", "--json"))["b"]["version"] == "2", name
    assert sonify("compare", "1", "9").exit_code == 3


@pytest.mark.parametrize(("higher", "side"), [(True, "right"), (False, "left")])
def test_bars_are_on_the_right_if_b_is_better(higher: bool, side: str) -> None:
    metric = MetricComparison("test/x", higher, 0.1, 0.2, PairedDifference(0.1, 0.05, 0.15, 0.01, 9, 9))
    drawn = bar(metric)
    assert drawn is not None
    assert (drawn["low"] > 75) == (side == "right")
    assert drawn["low"] <= drawn["at"] <= drawn["high"]
    assert bar(MetricComparison("test/x", True, 0.1, 0.2, PairedDifference(0.1, None, None, None, 9, 1))) is None


def test_promote_and_rollback(pool: ProjectPaths, sonify: Sonify, runs: list[str]) -> None:
    assert sonify("promote", "1", "--yes").exit_code == 0
    plan = json_output(sonify("promote", "--dry-run", "--json"))
    assert (plan["champion"], plan["challenger"], plan["gate"]["passed"], plan["record"]) == ("1", "2", True, None)
    done = json_output(sonify("promote", "--auto", "--actor", "nightly", "--json"))
    assert (done["record"]["version"], done["record"]["former"], done["record"]["actor"]) == ("2", "1", "nightly")
    assert json_output(sonify("rollback", "--yes", "--reason", "no cats", "--json"))["record"]["version"] == "1"
    kept = json_output(sonify("promote", "--auto", "--json"))
    assert kept["record"] is None
    assert "no cats" in kept["gate"]["reasons"][-1]
    assert sonify("promote", "--yes").exit_code == 3
    assert sonify("promote", "--yes", "--override").exit_code == 2
    assert sonify("promote", "--yes", "--override", "--reason", "cats are rare").exit_code == 0
    assert sonify("rollback", "--yes").exit_code == 0
    assert sonify("promote", "--reject").exit_code == 2
    assert sonify("promote", "--reject", "--reason", "no").exit_code == 0
    lines = json_output(sonify("promote", "--history", "--json"))["decisions"]
    assert [line["kind"] for line in lines] == ["promote", "promote", "rollback", "promote", "rollback", "reject"]
    assert "token" not in lines[0]


def test_promote_asks_for_confirmation(pool: ProjectPaths, runs: list[str]) -> None:
    from typer.testing import CliRunner

    from pipeline_steps.cli import app
    from pipeline_steps.tracking.registry.promotion import history

    assert CliRunner().invoke(app, ["--project", str(pool.root), "promote"], input="n\n").exit_code == 1
    assert history(pool) == []
    assert CliRunner().invoke(app, ["--project", str(pool.root), "promote"], input="y\n").exit_code == 0
    assert len(history(pool)) == 1
