"""Paths below a project root, as in `dvc.yaml`; no other module spells them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PACKAGED = Path(__file__).resolve().parents[1] / "project"
"""Files of the repository that the package carries, for projects without a copy of their own."""

SOURCE = Path(__file__).resolve().parents[2]
"""Root of the source checkout of an editable install; otherwise the folder of installed packages."""


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

    graph = _Below("dvc.yaml")
    params = _Below("params.yaml")
    lock = _Below("dvc.lock")
    code = _Below("code.yaml")
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
    tracking = _Below(".runs/tracking")

    def packaged(self, name: str) -> Path:
        """A file or folder of the project, else the one that the package carries."""
        own = self.root / name
        return own if own.exists() else PACKAGED / Path(name).name

    def report(self, stage: str) -> Path:
        return self.reports / f"{stage}.json"

    def runtime(self, stage: str) -> Path:
        """Duration and cache use of the last execution of a stage; no out of the stage, because they differ every time."""
        return self.reports / "runtime" / f"{stage}.json"


def find_root(start: Path) -> Path | None:
    """Nearest folder at or above `start` with a `dvc.yaml`, as an absolute path; None if there is none."""
    here = start.resolve()
    return next((folder for folder in (here, *here.parents) if (folder / "dvc.yaml").is_file()), None)
