"""Tests of the stage graph and of the reasons in a plan."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from flows.artifact_tables import plan_text
from flows.dvc_graph import make_plan, modified_dvc_sources, read_graph, stages_of_flow, with_upstream
from pipeline_steps.core.errors import ConfigError, DataError
from tests.flows import dvc_project

PROJECT = Path(__file__).resolve().parents[2]


def reasons(root: Path, *stages: str, force: bool = False) -> dict[str, str]:
    return {each.node.name: each.why for each in make_plan(root, stages, force=force)}


def test_graph_equals_dvc_yaml() -> None:
    stages = YAML(typ="safe").load((PROJECT / "dvc.yaml").read_text())["stages"]
    nodes = read_graph(PROJECT)
    assert [node.name for node in nodes] == list(stages)
    producer = {next(iter(out)) if isinstance(out, dict) else out: name for name in stages for out in stages[name]["outs"]}
    earlier: set[str] = set()
    for node in nodes:
        stage = stages[node.name]
        assert set(node.upstream) == {producer[dep] for dep in stage["deps"] if dep in producer}
        assert set(node.upstream) <= earlier, "a stage comes after the stages that it reads"
        earlier.add(node.name)
        assert node.cmd == stage["cmd"]
        assert dict(node.meta) == stage["meta"]
        assert node.params == tuple(stage["params"])
        assert f"reports/{node.name}.json" in node.uncached
        assert set(node.metrics) <= set(node.uncached)
    assert [path for node in nodes for path in node.metrics] == ["reports/metrics.json"]
    assert {*stages_of_flow(nodes, "data"), *stages_of_flow(nodes, "model")} == set(stages)
    first_of_model = next(node for node in nodes if node.name in stages_of_flow(nodes, "model"))
    data = {node.name for node in with_upstream(nodes, [first_of_model.name])} - {first_of_model.name}
    assert data == set(stages_of_flow(nodes, "data")), "the data flow runs exactly the stages before training"


def test_flows_contain_no_stage_name() -> None:
    names = {node.name for node in read_graph(PROJECT)}
    for path in sorted((PROJECT / "flows").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in names, f"{path.name}:{node.lineno} names the stage {node.value}"
                assert not any(f"reports/{name}." in node.value for name in names), f"{path.name}:{node.lineno}"


def test_reasons_before_the_first_run(tmp_path: Path) -> None:
    root = dvc_project.build(tmp_path / "p")
    assert reasons(root)["count"] == "never run"
    assert reasons(root)["model"].endswith("upstream runs: join")


def test_reasons_when_up_to_date_and_forced(project: Path) -> None:
    assert set(reasons(project).values()) == {"nothing to do"}
    assert reasons(project, "join", force=True) == {"count": "nothing to do", "join": "forced"}
    assert "nothing to do" in plan_text(make_plan(project))


def test_reasons_of_changes(project: Path) -> None:
    params = project / "params.yaml"
    params.write_text(params.read_text().replace("power: 2", "power: 5"))
    assert reasons(project) == {
        "count": "changed parameter count.power 2 -> 5",
        "join": "upstream runs: count",
        "model": "upstream runs: join",
    }
    assert list(reasons(project, "count")) == ["count"]
    dvc_project.git(project, "checkout", "-q", "params.yaml")
    (project / "out/join.txt").unlink()
    assert reasons(project)["join"] == "missing out out/join.txt"
    assert reasons(project)["model"] == "missing dep out/join.txt; upstream runs: join"
    dvc_project.dvc(project, "checkout", "-q")
    (project / "source.txt").write_text("1 2 3")
    assert reasons(project)["count"] == "changed dep source.txt"
    text = (project / "dvc.yaml").read_text()
    (project / "dvc.yaml").write_text(text.replace("work.py model", "work.py  model"))
    assert "changed command" in reasons(project)["model"]


def test_other_pipelines_in_subfolders_are_ignored(project: Path) -> None:
    (project / "other").mkdir()
    text = (
        "stages:\n  count:\n    cmd: echo\n    outs: [x]\n  extra:\n    cmd: echo\n    deps: [../out/join.txt]\n    outs: [y]\n"
    )
    (project / "other/dvc.yaml").write_text(text)
    nodes = {node.name: node for node in read_graph(project)}
    assert list(nodes) == ["count", "join", "model"]
    assert nodes["count"].cmd == "python work.py count"
    assert set(reasons(project).values()) == {"nothing to do"}


def test_meta_does_not_make_stages_stale(project: Path) -> None:
    text = (project / "dvc.yaml").read_text()
    (project / "dvc.yaml").write_text(text.replace("timeout_s: 60", "timeout_s: 61").replace("retries: 2", "retries: 9"))
    assert set(reasons(project).values()) == {"nothing to do"}
    assert {node.name: node.meta.get("retries", 0) for node in read_graph(project)} == {"count": 1, "join": 0, "model": 9}


def test_invalid_projects_are_refused(project: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no stage 'modle'"):
        make_plan(project, ["modle"])
    with pytest.raises(ConfigError, match=r"contains no dvc\.yaml"):
        read_graph(tmp_path)
    with pytest.raises(ConfigError, match="belongs to 'nobody'"):
        stages_of_flow(read_graph(project), "nobody")
    (project / "source.txt").unlink()
    with pytest.raises(DataError, match=r"reads source\.txt, which does not exist"):
        make_plan(project)
    (project / "dvc.yaml").write_text("stages: [not, a, mapping]")
    with pytest.raises(ConfigError, match="DVC cannot read"):
        read_graph(project)


def test_modified_dvc_sources_are_found(project: Path) -> None:
    raw = project / "raw.bin"
    raw.write_bytes(b"one")
    dvc_project.dvc(project, "add", "-q", "raw.bin")
    assert modified_dvc_sources(project) == {}
    raw.write_bytes(b"two!")
    assert modified_dvc_sources(project) == {"raw.bin": "modified"}
