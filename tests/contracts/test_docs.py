"""Documentation that can be checked without a build: links, tables, codes, keys, commands, the length of pages."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from pipeline_steps.cli import app
from pipeline_steps.core import schemas
from pipeline_steps.ingest.reason_codes import CODES, NORMALIZATIONS

PROJECT = Path(__file__).resolve().parents[2]
DOCS = PROJECT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [*PAGES, *(PROJECT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md"))]
CONTRACTS = [value for value in vars(schemas).values() if isinstance(value, schemas.TableSchema)]
MAX_LINES = 250

sys.path.append(str(DOCS / "_ext"))
import code_reference  # noqa: E402


def name_of(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.name)
def test_every_column_is_documented(contract: schemas.TableSchema) -> None:
    text = (DOCS / "reference/data-schemas.md").read_text()
    missing = [name for name in contract.schema.names if f"`{name}`" not in text]
    assert not missing, f"{contract.name}: {missing}"


def test_readme_names_the_two_commands() -> None:
    text = (PROJECT / "README.md").read_text()
    assert "make demo" in text
    assert "make test" in text
    assert 60 <= len(text.splitlines()) <= 90


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_links_lead_to_files(page: Path) -> None:
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", prose):
        assert (page.parent / target).exists(), f"{name_of(page)}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_page_is_too_long(page: Path) -> None:
    assert len(page.read_text().splitlines()) <= MAX_LINES


def generated(name: str, argument: str = "") -> str:
    return "\n".join(code_reference.GENERATORS[name](argument))


def test_every_configuration_key_is_generated_with_its_meaning() -> None:
    from pipeline_steps.core.config import load_params
    from pipeline_steps.core.presets import flatten

    page = (DOCS / "reference/configuration.md").read_text()
    documented: dict[str, str] = {}
    for stage in load_params(PROJECT / "params.yaml"):
        assert f"```{{generated}} configuration {stage}\n" in page
        for key, body in re.findall(
            r"^````\{confval\} (\S+)\n(.*?)^````$", generated("configuration", stage), re.MULTILINE | re.DOTALL
        ):
            documented[key] = body
    mappings = ("ingest.pool", "ingest.holdout", "caption.openai_server.extra_body")
    named = "evaluate.judge_checkpoints."
    for key, _ in flatten(load_params(PROJECT / "params.yaml")):
        entry = re.sub(rf"^({re.escape(named)})\w+\.", r"\1<name>.", key)
        assert entry in documented or key.startswith(mappings), key
    for key, body in documented.items():
        assert re.match(r":type: .+\n:default: (`.+`|required)\n\n.+", body), f"{key} has no description in its pydantic model"


def test_every_reason_code_is_documented() -> None:
    page = code_reference.expand((DOCS / "reference/reason-codes.md").read_text())
    documented = set(re.findall(r"^\| `([A-Z_0-9]+)` \|", page, re.MULTILINE))
    assert {*CODES, *NORMALIZATIONS} <= documented
    found = set()
    for stage in ("caption", "embed", "pair"):
        for path in (PROJECT / "pipeline_steps" / stage).rglob("*.py"):
            found |= set(
                re.findall(r"\"((?:CAPTION|EMB|NO|NOT|LOW|BELOW|HOLDOUT)_[A-Z_]+|CAPACITY|LICENSE)\"", path.read_text())
            )
    assert found - documented == set()
    assert documented - {*CODES, *NORMALIZATIONS} <= found, "a code that no stage uses"


def test_exit_codes_are_those_of_the_errors() -> None:
    assert re.findall(r"^\| (\d+) \|", generated("exit-codes"), re.MULTILINE) == list("01234567")


def sonify_commands() -> Iterator[tuple[str, list[str]]]:
    """Every `sonify ...` in code of a page: the name of the page and its words."""
    for page in TEXTS:
        for code in re.findall(r"`(sonify [^`\n]+)`|^(?:\$ +| {4,})(sonify .*)$", page.read_text(), re.MULTILINE):
            command = re.sub(r"  +#.*| \.\.\.$|\\\|.*", "", code[0] or code[1])
            yield name_of(page), shlex.split(command)


def test_commands_of_the_pages_exist_with_their_options() -> None:
    root: Any = typer.main.get_command(app)
    seen = 0
    for page, (_, *words) in sonify_commands():
        command = root
        for word in words:
            if word in getattr(command, "commands", {}):
                command = command.commands[word]
            elif word.startswith("-") and not word.lstrip("-").isdigit():
                options = {name for one in [*command.params, *root.params] for name in [*one.opts, *one.secondary_opts]} | {
                    "--help"
                }
                assert word.split("=")[0] in options, f"{page}: {command.name} {word}"
            elif command is root and re.fullmatch(r"[a-z]+", word):
                raise AssertionError(f"{page}: sonify {word}")
        seen += 1
    assert seen > 30


def test_make_targets_of_the_pages_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))
    for page in TEXTS:
        for target in re.findall(r"(?:`|^\$ |^    )make ([a-z][\w-]*)", page.read_text(), re.MULTILINE):
            assert target in targets, f"{name_of(page)}: make {target}"


@pytest.mark.parametrize("index", sorted(DOCS.glob("*/index.md")), ids=name_of)
def test_an_index_page_links_its_pages(index: Path) -> None:
    """A Git host shows nothing of a toctree."""
    text = index.read_text(encoding="utf-8")
    pages = [page.name for page in index.parent.glob("*.md") if page != index]
    pages += [f"{page.parent.name}/index.md" for page in index.parent.glob("*/index.md")]
    assert [page for page in pages if f"({page})" not in text] == []
