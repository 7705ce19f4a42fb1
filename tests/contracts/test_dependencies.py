"""Version floors that keep known holes and breakages out; each has its reason in docs/contributing/dependencies.md."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).resolve().parents[2]

FLOORS = {
    "lightning": ">=2.6.6,!=2.6.2,!=2.6.3",
    "mlflow": ">=3.17",
    "prefect": ">=3.8",
    "fastapi": "<0.151",
    "sqlalchemy": ">=2,<2.1",
    "pillow": ">=12.3",
    "diffusers": ">=0.38",
    "transformers": ">5.2",
    "gitpython": ">=3.1.59",
}


@pytest.mark.parametrize("package", sorted(FLOORS))
def test_installed_versions_are_above_the_floor(package: str) -> None:
    assert version(package) in SpecifierSet(FLOORS[package])


def test_constraints_pin_every_direct_dependency() -> None:
    import tomllib

    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    pins = {
        canonicalize_name(line.split("==")[0]): line.split("==")[1].strip()
        for line in (PROJECT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    }
    for text in wanted:
        requirement = Requirement(text)
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin, f"{requirement.name} is not pinned in constraints.txt"
        assert pin in requirement.specifier, f"{requirement.name}=={pin} is outside {requirement.specifier}"


def test_every_direct_dependency_has_a_reason() -> None:
    import tomllib

    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    text = (PROJECT / "docs/contributing/dependencies.md").read_text()
    names = {Requirement(line).name for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]}
    missing = [name for name in sorted(names) if f"`{name}`" not in text]
    assert not missing, missing


def test_the_runtime_table_of_the_page_equals_the_dependencies() -> None:
    import re
    import tomllib

    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    table = (PROJECT / "docs/contributing/dependencies.md").read_text().split("## Runtime")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([\w.-]+)` \|", table, re.MULTILINE)
    assert sorted(rows) == sorted(Requirement(line).name for line in project["dependencies"])


def test_every_runtime_dependency_is_imported_or_capped() -> None:
    import ast
    import re
    import tomllib

    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    imported = set()
    for path in [file for folder in ("pipeline_steps", "flows", "infra") for file in (PROJECT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    module_of = {"ruamel-yaml": "ruamel", "pillow": "PIL", "pyyaml": "yaml", "protobuf": "google"}
    names = [canonicalize_name(Requirement(line).name) for line in project["dependencies"]]
    unused = [name for name in names if module_of.get(name, name.replace("-", "_")) not in imported]
    reasons = (PROJECT / "docs/contributing/dependencies.md").read_text()
    assert set(unused) <= {"fastapi", "sqlalchemy"}, unused
    for name in unused:
        assert re.search(rf"\| `{name}` \| not (ours|imported)", reasons), f"{name}: its row says why it is there"


def test_prefect_server_imports_under_the_pinned_fastapi() -> None:
    import prefect.server.api.server  # noqa: F401
