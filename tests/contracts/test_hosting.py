"""Files for the repository's host and its users: valid, and the same commands and versions as everywhere else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from ruamel.yaml import YAML

from pipeline_steps import __version__

PROJECT = Path(__file__).resolve().parents[2]
WORKFLOW = PROJECT / ".github/workflows/ci.yml"
TARGETS = set(re.findall(r"^([\w-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ("vendor.github-workflows", ".github/workflows/ci.yml"),
        ("vendor.citation-file-format", "CITATION.cff"),
    ],
)
def test_files_fit_their_schema(schema: str, path: str) -> None:
    program = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, "--default-filetype", "yaml"]
    done = subprocess.run([*program, str(PROJECT / path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hosted_ci_runs_every_target_of_the_local_one() -> None:
    hosted = set(re.findall(r"make ([\w-]+)", WORKFLOW.read_text()))
    local = set(re.findall(r"make ([\w-]+)", (PROJECT / ".ci/run").read_text()))
    assert local <= hosted <= TARGETS


def test_hosted_ci_covers_the_supported_versions_of_python() -> None:
    import tomllib

    supported = SpecifierSet(tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["requires-python"])
    versions = YAML(typ="safe").load(WORKFLOW)["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert versions == [minor for minor in (f"3.{number}" for number in range(9, 20)) if f"{minor}.0" in supported]


def test_pre_commit_runs_installed_programs() -> None:
    config = YAML(typ="safe").load(PROJECT / ".pre-commit-config.yaml")
    (repository,) = config["repos"]
    assert repository["repo"] == "local", "versions are those of constraints.txt"
    assert {hook["id"] for hook in repository["hooks"]} >= {"ruff", "ruff-format", "mypy", "codespell"}
    for hook in repository["hooks"]:
        program = hook["entry"].split()[0]
        assert shutil.which(program, path=str(Path(sys.executable).parent)), program


def test_versions_agree() -> None:
    assert str(YAML(typ="safe").load(PROJECT / "CITATION.cff")["version"]) == __version__
    assert f"\n## {__version__} - " in (PROJECT / "CHANGELOG.md").read_text()


def test_development_container_installs_with_the_makefile() -> None:
    container = json.loads((PROJECT / ".devcontainer/devcontainer.json").read_text())
    assert container["postCreateCommand"].split() == ["make", "install-dev"]
