"""Source files that a module of this package imports, found in the syntax trees without importing anything."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(__file__).resolve().parents[1].name


def imported_names(path: Path) -> Iterator[str]:
    """Absolute names imported anywhere in a file, also inside functions; `from a import b` gives `a` and `a.b`.

    Raises:
        ValueError: the file has a relative import.
    """
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path}:{node.lineno}: relative import; use an absolute import")
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_files(*modules: str, skip: Sequence[str] = ()) -> list[Path]:
    """Files of this package that `modules` import, directly or through others, with their own files; sorted.

    The `__init__.py` of every enclosing package is included, because Python executes it. A module that is imported by a
    computed name (a registry, an entry point) is not found: pass it as another module.

    Args:
        modules: dotted names, e.g. `pipeline_steps.train.stage`.
        skip: dotted names of packages or modules that are left out together with what only they import.

    Raises:
        ValueError: this package has no such module.
    """
    for module in modules:
        if not any(name == module for name, _ in _files(module)):
            raise ValueError(f"module {module!r} is not part of {PACKAGE}")
    pending, found = list(modules), set[Path]()
    while pending:
        for name, path in _files(pending.pop()):
            if path not in found and not any(name == left or name.startswith(f"{left}.") for left in skip):
                found.add(path)
                pending.extend(imported_names(path))
    return sorted(found)


def _files(name: str) -> Iterator[tuple[str, Path]]:
    """Dotted name and file of the module `name` and of its enclosing packages; nothing for names outside this package."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1) if parts[0] == PACKAGE else ():
        base = ROOT.joinpath(*parts[:count])
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                yield ".".join(parts[:count]), path
