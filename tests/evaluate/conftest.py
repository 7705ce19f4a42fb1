"""A judge that is added as one file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline_steps.evaluate.judges.base import IMAGE_JUDGES

TOY = (Path(__file__).parent / "judges/toy_judge.py").read_text(encoding="utf-8")
"""A complete judge. In the project it is the file pipeline_steps/evaluate/judges/toy.py."""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The file of the judge in a folder that extends the package of judges."""
    import pipeline_steps.evaluate.judges as package

    folder = tmp_path / "judges"
    folder.mkdir()
    (folder / "toy.py").write_text(TOY)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    yield
    IMAGE_JUDGES._implementations.pop("toy", None)
    sys.modules.pop("pipeline_steps.evaluate.judges.toy", None)
