"""Loader of exported models of any recipe."""

from __future__ import annotations

from pathlib import Path

from pipeline_steps.core.errors import IntegrityError
from pipeline_steps.diffusion.pipelines.base import PIPELINES, AudioConditionedPipeline
from pipeline_steps.diffusion.pipelines.safetensors_io import INDEX, RETRAIN, read_json


class AutoAudio2ImagePipeline:
    """Factory of pipelines: reads `_class_name` of the folder's index and loads that class."""

    @staticmethod
    def from_pretrained(folder: Path, device: str | None = None) -> AudioConditionedPipeline:
        """Load a folder that stage `train` exported. Hashes and shapes are checked, nothing is unpickled.

        Args:
            folder: folder with `model_index.json`.
            device: None selects the default of the pipeline.

        Raises:
            DataError: a file is missing.
            IntegrityError: a file differs from what was exported, or the class is not registered.
        """
        folder = Path(folder)
        name = str(read_json(folder / INDEX).get("_class_name"))
        if name not in PIPELINES:
            raise IntegrityError(f"{folder / INDEX}: unknown _class_name {name!r}", RETRAIN)
        return PIPELINES.get(name).from_pretrained(folder, device)
