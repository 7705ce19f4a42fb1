"""Documentation that can be checked is checked."""

from pathlib import Path

import pytest

from pipeline_steps.core import schemas

PROJECT = Path(__file__).resolve().parents[2]
CONTRACTS = [value for value in vars(schemas).values() if isinstance(value, schemas.TableSchema)]


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.name)
def test_every_column_is_documented(contract: schemas.TableSchema) -> None:
    text = (PROJECT / "docs/data-contracts.md").read_text()
    missing = [name for name in contract.schema.names if f"`{name}`" not in text]
    assert not missing, f"{contract.name}: {missing}"


def test_readme_names_the_two_commands_and_its_links_exist() -> None:
    import re

    text = (PROJECT / "README.md").read_text()
    assert "make demo" in text
    assert "make test" in text
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (PROJECT / target).exists(), target
