"""Paths below a project root, as in `dvc.yaml`; no other module spells them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ProjectPaths:
    """Paths of the pipeline's inputs and outs, relative to `root` (the folder that holds `dvc.yaml`)."""

    root: Path = Path()

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    @property
    def assets_manifest(self) -> Path:
        return self.root / "assets.toml"

    @property
    def wheels(self) -> Path:
        return self.root / ".cache/wheels"

    @property
    def assets(self) -> Path:
        return self.root / "data/assets"

    @property
    def catalog(self) -> Path:
        return self.root / "data/catalog"

    @property
    def media(self) -> Path:
        return self.root / "data/media"

    @property
    def captions(self) -> Path:
        return self.root / "data/captions"

    @property
    def embeddings(self) -> Path:
        return self.root / "data/embeddings"

    @property
    def retrieval(self) -> Path:
        return self.root / "data/retrieval"

    @property
    def pairs(self) -> Path:
        return self.root / "data/pairs"

    @property
    def model(self) -> Path:
        return self.root / "models/audio2image"

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    @property
    def result_cache(self) -> Path:
        return self.root / ".cache/items"

    @property
    def converted_checkpoints(self) -> Path:
        return self.root / ".cache/checkpoints"

    @property
    def runs(self) -> Path:
        return self.root / ".runs"

    def report(self, stage: str) -> Path:
        return self.reports / f"{stage}.json"
