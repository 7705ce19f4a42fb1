"""MLflow dataset source for data tracked by DVC; loaded through the entry point `mlflow.dataset_source`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlflow.data.dataset_source import DatasetSource

from pipeline_steps.tracking.lineage.dvc_digests import hash_path


class DvcDatasetSource(DatasetSource):
    """Output of a stage or target of a `.dvc` file: `path` relative to the repository and DVC's `md5`."""

    def __init__(self, path: str, md5: str) -> None:
        self.path = path
        self.md5 = md5

    @staticmethod
    def _get_source_type() -> str:
        return "dvc"

    def load(self, root: str = ".") -> str:
        """Return the path of the data below `root` after checking its md5.

        Raises:
            ValueError: the data has another md5 than the run logged.
        """
        path = Path(root) / self.path
        found = hash_path(path)
        if found != self.md5:
            raise ValueError(f"{path} has DVC md5 {found}, the run used {self.md5}; git checkout its commit, then dvc checkout")
        return str(path)

    @staticmethod
    def _can_resolve(raw_source: Any) -> bool:
        return isinstance(raw_source, DvcDatasetSource)

    @classmethod
    def _resolve(cls, raw_source: Any) -> DvcDatasetSource:
        if not isinstance(raw_source, DvcDatasetSource):
            raise TypeError(f"expected a DvcDatasetSource, got {type(raw_source).__name__}")
        return raw_source

    def to_dict(self) -> dict[Any, Any]:
        """Fields that MLflow stores as JSON."""
        return {"path": self.path, "md5": self.md5}

    @classmethod
    def from_dict(cls, source_dict: dict[Any, Any]) -> DvcDatasetSource:
        """Inverse of `to_dict`."""
        return cls(str(source_dict["path"]), str(source_dict["md5"]))
