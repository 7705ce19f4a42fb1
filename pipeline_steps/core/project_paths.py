"""Paths below a project root, as in `dvc.yaml`; no other module spells them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class _Below:
    """Attribute of a project: a fixed path below its root."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __get__(self, project: ProjectPaths, _owner: type[ProjectPaths]) -> Path:
        return project.root / self._path


@dataclass(frozen=True, slots=True)
class ProjectPaths:
    """Paths of the pipeline's inputs and outs, relative to `root` (the folder that holds `dvc.yaml`)."""

    root: Path = Path()

    params = _Below("params.yaml")
    lock = _Below("dvc.lock")
    assets_manifest = _Below("assets.toml")
    wheels = _Below(".cache/wheels")
    assets = _Below("data/assets")
    catalog = _Below("data/catalog")
    media = _Below("data/media")
    captions = _Below("data/captions")
    embeddings = _Below("data/embeddings")
    retrieval = _Below("data/retrieval")
    pairs = _Below("data/pairs")
    model = _Below("models/audio2image")
    reports = _Below("reports")
    result_cache = _Below(".cache/items")
    converted_checkpoints = _Below(".cache/checkpoints")
    runs = _Below(".runs")

    def report(self, stage: str) -> Path:
        return self.reports / f"{stage}.json"


def find_root(start: Path) -> Path | None:
    """Nearest folder at or above `start` with a `dvc.yaml`, as an absolute path; None if there is none."""
    here = start.resolve()
    return next((folder for folder in (here, *here.parents) if (folder / "dvc.yaml").is_file()), None)
