"""Tests of digests: equal to those that DVC records."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline_steps.core.errors import ConfigError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.lineage import dvc_digests


@pytest.fixture(scope="module")
def dvc_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DVC repository with one stage that writes a file and a folder with unusual names."""
    root = tmp_path_factory.mktemp("dvc")
    code = (
        "import os; os.makedirs('out/sub'); os.makedirs('out/a b')\n"
        "for name in ('sub/x', 'sub.txt', 'sub-2', 'a b/\\u00e9', 'Z'): open('out/' + name, 'w').write(name)\n"
        "open('one.txt', 'w').write('one')\n"
        "open('stage.txt', 'w').write(os.environ.get('DVC_STAGE', ''))\n"
    )
    (root / "make.py").write_text(code)
    (root / "dvc.yaml").write_text(
        "stages:\n  make:\n    cmd: python make.py\n    deps: [make.py]\n    outs: [out, one.txt, stage.txt]\n"
    )
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in (["init", "--no-scm", "-q"], ["repro", "-q"]):
        subprocess.run([sys.executable, "-m", "dvc", *command], cwd=root, env=environment, check=True)
    return root


def test_digests_equal_those_of_dvc(dvc_project: Path) -> None:
    recorded = dvc_digests.lock_outs(dvc_digests.read_lock(dvc_project / "dvc.lock"))
    assert set(recorded) == {"out", "one.txt", "stage.txt"}
    for path, md5 in recorded.items():
        assert dvc_digests.hash_path(dvc_project / path) == md5
    assert len(recorded["out"]) == 36, "MLflow's limit for a digest"


def test_dvc_sets_the_stage_variable(dvc_project: Path) -> None:
    """`dvc_digest` reads the lock only if the variable is set."""
    assert (dvc_project / "stage.txt").read_text() == "make"


def test_lock_is_only_read_under_dvc(dvc_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = ProjectPaths(dvc_project)
    monkeypatch.setenv("DVC_STAGE", "next")
    assert dvc_digests.dvc_digest(layout, dvc_project / "out")[1] == "dvc.lock"
    monkeypatch.delenv("DVC_STAGE")
    digest, source = dvc_digests.dvc_digest(layout, dvc_project / "out")
    assert source == "hashed"
    assert digest == dvc_digests.hash_path(dvc_project / "out")


@pytest.mark.parametrize("keep", [0.3, 0.7])
def test_truncated_lock_is_refused_with_an_action(dvc_project: Path, tmp_path: Path, keep: float) -> None:
    text = (dvc_project / "dvc.lock").read_text()
    broken = tmp_path / "dvc.lock"
    broken.write_text(text[: int(len(text) * keep)] + "\n  - {")
    with pytest.raises(ConfigError, match=r"git checkout dvc\.lock"):
        dvc_digests.read_lock(broken)


def test_lock_without_stages_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dvc.lock").write_text("schema: '2.0'\n")
    with pytest.raises(ConfigError, match="schema and stages"):
        dvc_digests.read_lock(tmp_path / "dvc.lock")


def test_inputs_digest_ignores_the_order() -> None:
    one = dvc_digests.inputs_digest({"a": "1", "b": "2"}, {"x": 1, "y": 2})
    assert one == dvc_digests.inputs_digest({"b": "2", "a": "1"}, {"y": 2, "x": 1})
    assert one != dvc_digests.inputs_digest({"a": "1", "b": "3"}, {"x": 1, "y": 2})
    assert one != dvc_digests.inputs_digest({"a": "1", "b": "2"}, {"x": 1, "y": 3})


def test_dataset_source_checks_the_md5(tmp_path: Path) -> None:
    import mlflow.data

    from pipeline_steps.tracking.client.dataset_source import DvcDatasetSource

    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs/a").write_text("a")
    source = DvcDatasetSource("pairs", dvc_digests.hash_path(tmp_path / "pairs"))
    mlflow.data.dataset_source_registry.register_dataset_source(DvcDatasetSource)
    again = mlflow.data.dataset_source_registry.get_dataset_source_from_json(source.to_json(), "dvc")
    assert again.load(str(tmp_path)) == str(tmp_path / "pairs")
    (tmp_path / "pairs/a").write_text("b")
    with pytest.raises(ValueError, match="dvc checkout"):
        again.load(str(tmp_path))


def test_ruamel_reads_the_lock_format() -> None:
    yaml = YAML(typ="safe", pure=True)
    assert yaml.load("schema: '2.0'\nstages: {}\n")["schema"] == "2.0"
