"""Imported source files: transitive closure, enclosing packages, skipped packages, errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline_steps.core import source_files
from pipeline_steps.core.source_files import imported_files, imported_names

TREE = {
    "__init__.py": "",
    "a.py": "import os\nfrom pipeline_steps.b import thing\n",
    "b/__init__.py": "",
    "b/thing.py": "def late():\n    import pipeline_steps.b.deep.leaf\n",
    "b/deep/__init__.py": "from pipeline_steps import watch\n",
    "b/deep/leaf.py": "import pipeline_steps.a\n",
    "b/unused.py": "",
    "watch.py": "import pipeline_steps.only_watch\n",
    "only_watch.py": "",
}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "pipeline_steps"
    for name, text in TREE.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    monkeypatch.setattr(source_files, "ROOT", tmp_path)
    return package


def relative(files: list[Path], package: Path) -> set[str]:
    assert files == sorted(files)
    return {path.relative_to(package).as_posix() for path in files}


def test_closure_with_packages_cycles_and_late_imports(tree: Path) -> None:
    assert relative(imported_files("pipeline_steps.a"), tree) == set(TREE) - {"b/unused.py"}
    assert relative(imported_files("pipeline_steps.b.unused"), tree) == {"__init__.py", "b/__init__.py", "b/unused.py"}


def test_skipped_modules_are_not_followed(tree: Path) -> None:
    found = relative(imported_files("pipeline_steps.a", skip=["pipeline_steps.watch"]), tree)
    assert found == set(TREE) - {"b/unused.py", "watch.py", "only_watch.py"}


@pytest.mark.parametrize("module", ["pipeline_steps.missing", "os", ""])
def test_a_module_outside_the_package_is_an_error(tree: Path, module: str) -> None:
    with pytest.raises(ValueError, match="not part of"):
        imported_files(module)


def test_relative_imports_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("from . import y\n")
    with pytest.raises(ValueError, match="relative import"):
        list(imported_names(tmp_path / "x.py"))


def test_every_module_that_python_loads_is_found() -> None:
    code = (
        "import sys, pipeline_steps.core.executors.run, pipeline_steps.core.executors.ray\n"
        "print(*(m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'pipeline_steps'), sep='\\n')"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    found = imported_files("pipeline_steps.core.executors.run", "pipeline_steps.core.executors.ray")
    assert {Path(path).resolve() for path in loaded} <= set(found)
