"""Load an exported model whatever recipe made it."""

from __future__ import annotations

from pathlib import Path

from pipeline_steps.diffusion.pipelines.base import Audio2ImagePipeline
from pipeline_steps.diffusion.pipelines.safetensors_io import ADAPTER_CLASS, read_class_name


class AutoAudio2ImagePipeline:
    """Factory of pipelines: reads `_class_name` of the folder's index and loads that class."""

    @staticmethod
    def from_pretrained(folder: Path, device: str | None = None) -> Audio2ImagePipeline:
        """Load an exported folder of any recipe; hashes and shapes are checked, nothing is unpickled.

        Args:
            folder: folder that the stage `train` wrote.
            device: None selects the CPU for recipe `scratch`, and a GPU if there is one for recipe `ip_adapter`.

        Raises:
            DataError: a file is missing.
            IntegrityError: a file is not what was exported.
        """
        folder = Path(folder)
        if read_class_name(folder) == ADAPTER_CLASS:
            from pipeline_steps.diffusion.pipelines.ip_adapter import AudioIPAdapterPipeline

            return AudioIPAdapterPipeline.read(folder, device)
        from pipeline_steps.diffusion.pipelines.scratch import Audio2ImageFlowPipeline

        return Audio2ImageFlowPipeline.read(folder, device or "cpu")
