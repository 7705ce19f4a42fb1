"""Code digests: a change of a file changes the digests of exactly the stages that use it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline_steps import __version__
from pipeline_steps.core.project_paths import PACKAGED, SOURCE, ProjectPaths
from pipeline_steps.project.code_digests import PACKAGE, is_code, packaged_stages, write_code_digests


def digests(project: Path, package: Path) -> dict[str, str]:
    layout = ProjectPaths(project)
    write_code_digests(layout, package)
    content = YAML(typ="safe").load(layout.code.read_text())
    assert content["version"] == __version__
    assert all(isinstance(digest, str) for digest in content["code"].values()), "never a number to YAML"
    return dict(content["code"])


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package that tests may change."""
    copy = tmp_path_factory.mktemp("environment") / PACKAGE.name
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.mark.parametrize("dep", sorted({dep for stage in packaged_stages().values() for dep in stage["deps"] if is_code(dep)}))
def test_a_change_of_code_changes_the_stages_that_list_it(package: Path, tmp_path: Path, dep: str) -> None:
    before = digests(tmp_path, package)
    path = package.parent / dep
    file = path if path.is_file() else path / "added.py"
    old = file.read_bytes() if file.exists() else None
    file.write_bytes((old or b"") + b"# another\n")
    after = digests(tmp_path, package)
    file.unlink() if old is None else file.write_bytes(old)
    changed = {name for name in before if before[name] != after[name]}
    covering = {
        name
        for name, stage in packaged_stages().items()
        if any(other == dep or dep.startswith(f"{other}/") for other in stage["deps"])
    }
    above = {name for name, stage in packaged_stages().items() if dep in stage["deps"]}
    assert above <= changed <= covering | above
    assert digests(tmp_path, package) == before


def test_compiled_files_and_code_outside_the_stages_change_nothing(package: Path, tmp_path: Path) -> None:
    before = digests(tmp_path, package)
    cache = package / "core/__pycache__"
    cache.mkdir()
    (cache / "errors.cpython-311.pyc").write_bytes(b"x")
    (package / "commands/run.py").write_text("# another\n")
    assert digests(tmp_path, package) == before


def test_a_manifest_of_the_project_counts_for_assets_alone(package: Path, tmp_path: Path) -> None:
    before = digests(tmp_path, package)
    (tmp_path / "assets.toml").write_text((PACKAGED / "assets.toml").read_text() + "\n# another\n")
    after = digests(tmp_path, package)
    assert [name for name in before if before[name] != after[name]] == ["assets"]


def test_the_package_carries_the_files_of_the_repository() -> None:
    for name, source in {
        "stages.yaml": "dvc.yaml",
        "assets.toml": "assets.toml",
        "gate.yaml": "infra/gate.yaml",
        "presets/trial.yaml": "presets/trial.yaml",
    }.items():
        assert (PACKAGED / name).read_bytes() == (SOURCE / source).read_bytes(), name
