"""Names: one definition for each class name, no import circle, none of the words that the style guide excludes."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for name in ("pipeline_steps", "flows", "infra") for path in (PROJECT / name).rglob("*.py"))

EXCLUDED_WORDS = frozenset(
    {
        "admit",
        "admits",
        "admitted",
        "away",
        "cure",
        "ear",
        "ears",
        "eyes",
        "foretell",
        "foretold",
        "hear",
        "heard",
        "hears",
        "leash",
        "listen",
        "listens",
        "looked",
        "looks",
        "memo",
        "memos",
        "mend",
        "mended",
        "mends",
        "nobody",
        "orphan",
        "orphans",
        "remember",
        "remembered",
        "share",
        "shares",
        "somebody",
        "tell",
        "tells",
        "thinned",
        "told",
        "whoever",
    }
)
"""Words that name no concept of the field (docs/contributing): a cache, a fraction, a condition have names of their own."""


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Names that a module defines: modules' variables, functions, classes, parameters, attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno


def words(identifier: str) -> set[str]:
    """Lower-case words of a snake_case or CamelCase name."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", identifier)}


def test_no_identifier_has_an_excluded_word() -> None:
    found = []
    for path in SOURCES:
        for name, line in identifiers(ast.parse(path.read_text())):
            if excluded := words(name) & EXCLUDED_WORDS:
                found.append(f"{path.relative_to(PROJECT)}:{line}: {name} ({', '.join(sorted(excluded))})")
    assert not found, "\n".join([f"{len(found)} names", *found])


def test_every_class_name_is_defined_once() -> None:
    places = defaultdict(list)
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{path.relative_to(PROJECT)}:{node.lineno}")
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert not twice, twice


def module_name(path: Path) -> str:
    parts = path.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph() -> dict[str, set[str]]:
    """Module -> modules of the project that it imports, also inside functions."""
    modules = {module_name(path): path for path in SOURCES}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    imported.add(inner if inner in modules else node.module)
        graph[name] = imported & set(modules) - {name}
    return graph


def test_no_import_circle() -> None:
    graph = import_graph()
    state: dict[str, int] = {}
    circles = []

    def visit(name: str, path: list[str]) -> None:
        state[name] = 1
        for inner in sorted(graph[name]):
            if state.get(inner) == 1:
                circles.append(" -> ".join([*path[path.index(inner) :], inner]))
            elif inner not in state:
                visit(inner, [*path, inner])
        state[name] = 2

    for name in sorted(graph):
        if name not in state:
            visit(name, [name])
    assert not circles, circles
