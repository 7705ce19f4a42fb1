"""The tutorial of the Python interface: page and executed notebook show the same code; `tests/pipeline` runs it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

TUTORIALS = Path(__file__).resolve().parents[2] / "docs/tutorials"


def code_cells() -> list[dict[str, Any]]:
    notebook = json.loads((TUTORIALS / "python.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_executed_and_small() -> None:
    assert (TUTORIALS / "python.ipynb").stat().st_size < 300_000
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert not [output for output in outputs if output["output_type"] == "error"]


def test_the_page_has_the_code_and_the_printed_output_of_the_notebook() -> None:
    page = (TUTORIALS / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)\n```", page, re.DOTALL)
    assert blocks == ["".join(cell["source"]) for cell in code_cells()]
    shown = re.findall(r"```text\n(.*?)\n```", page, re.DOTALL)
    printed = ["".join(output["text"]).rstrip() for cell in code_cells() for output in cell["outputs"] if "text" in output]
    assert [text for text in shown if text in printed] == printed
