"""Judges that are added as one file each."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline_steps.evaluate.judges.base import AUDIO_JUDGES, IMAGE_JUDGES

TOYS = {name: (Path(__file__).parent / f"judges/{name}_judge.py").read_text(encoding="utf-8") for name in ("toy", "toy_audio")}
"""Complete judges. In the project they are files of pipeline_steps/evaluate/judges/."""

TOY = TOYS["toy"]


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The files of the judges in a folder that extends the package of judges."""
    import pipeline_steps.evaluate.judges as package

    folder = tmp_path / "judges"
    folder.mkdir()
    for name, code in TOYS.items():
        (folder / f"{name}.py").write_text(code)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    yield
    for registry, name in ((IMAGE_JUDGES, "toy"), (AUDIO_JUDGES, "toy_audio")):
        registry._implementations.pop(name, None)
        sys.modules.pop(f"pipeline_steps.evaluate.judges.{name}", None)
