"""Digests of the code that each stage uses, for projects that do not contain the source.

The repository's own `dvc.yaml` names the code of a stage by paths. In another folder these paths do not exist, and absolute
ones would tie the project to one environment. So the first stage of such a project, `code`, always runs; it writes a digest
per stage to `code.yaml`, and each stage depends on its own digest as on a parameter. After an upgrade DVC runs exactly the
stages whose code differs, and those after them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline_steps import __version__
from pipeline_steps.core.atomic import write_text
from pipeline_steps.core.hashing import fingerprint, sha256_bytes, sha256_file
from pipeline_steps.core.project_paths import PACKAGED, ProjectPaths

PACKAGE = Path(__file__).resolve().parents[1]
STAGES_FILE = PACKAGED / "stages.yaml"
"""`dvc.yaml` of the repository."""

HEADER = "# Version of the installed package and a digest of the code of each stage. Written by stage code; do not edit.\n"


def packaged_graph() -> dict[str, Any]:
    """Content of the repository's `dvc.yaml`."""
    from ruamel.yaml import YAML

    graph: dict[str, Any] = YAML(typ="safe", pure=True).load(STAGES_FILE.read_text(encoding="utf-8"))
    return graph


def packaged_stages() -> dict[str, dict[str, Any]]:
    """Stages of the repository's `dvc.yaml` by name, in their order."""
    stages: dict[str, dict[str, Any]] = packaged_graph()["stages"]
    return stages


def is_code(dep: str) -> bool:
    """Whether a dependency of the repository's `dvc.yaml` is a part of this package."""
    return dep.split("/")[0] == PACKAGE.name


def code_digest(deps: list[str], package: Path = PACKAGE) -> str:
    """Digest of the names and contents of all files of `deps`; compiled files are left out.

    Args:
        deps: paths such as `pipeline_steps/core`.
        package: folder of the package.
    """
    files: dict[str, str] = {}
    for dep in filter(is_code, deps):
        top = package.parent / dep
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and path.suffix != ".pyc":
                files[path.relative_to(package.parent).as_posix()] = sha256_file(path)
    return fingerprint(files)


def write_code_digests(layout: ProjectPaths, package: Path = PACKAGE) -> None:
    """Write `code.yaml` of a project. The digest of stage assets covers `assets.toml`, which pins the weights by hash."""
    digests = {name: code_digest(stage["deps"], package) for name, stage in packaged_stages().items()}
    pinned = sha256_bytes(layout.packaged("assets.toml").read_bytes())
    digests["assets"] = fingerprint({"code": digests["assets"], "assets.toml": pinned})
    lines = [f"version: {__version__}", "code:", *(f'  {name}: "{digest}"' for name, digest in digests.items())]
    write_text(layout.code, HEADER + "\n".join(lines) + "\n")
