"""Bases of image judges whose weights are a checkpoint: a hub id and commit, or a folder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch

from pipeline_steps.core.array_types import ByteArray, FloatArray
from pipeline_steps.core.errors import ConfigError, IntegrityError, ResourceError
from pipeline_steps.evaluate.judges.base import ImageFeatureExtractor, JudgeSetup
from pipeline_steps.models.hub_checkpoint import HubModel, check_checkpoint, load_weights, resolve_device, resolve_dtype

KEY = "evaluate.judge_checkpoints"
GPU_BATCH_SIZE = 32
"""Images of a forward pass on a GPU. On a CPU the batch size is 1, so that a row does not depend on the other images."""


class HubImageFeatureExtractor(HubModel, ImageFeatureExtractor):
    """Image feature extractor by hub id or folder.

    Args:
        model: hub id or local folder.
        revision: commit of a hub id; sha256 of a folder, checked when given.
        device: auto, cpu or cuda.
        dtype: float32, bfloat16, or auto (bfloat16 on GPU, float32 on CPU). float32 keeps the features independent of the
            device.
        root: folder that a relative `model` may lie in.
    """

    requires_checkpoint = True

    def __init__(
        self, model: str, revision: str = "", device: str = "auto", dtype: str = "float32", root: Path = Path()
    ) -> None:
        super().__init__(model, revision, f"{KEY}.{self.name}", root)
        self.device = resolve_device(device, KEY)
        self.dtype = resolve_dtype(dtype, self.device)
        self._network: Any = None

    @classmethod
    def from_setup(cls, setup: JudgeSetup) -> Self:
        """Checkpoint of `evaluate.judge_checkpoints.<name>`."""
        return cls(setup.model, setup.revision, setup.device, setup.dtype, setup.root)

    @property
    def batch_size(self) -> int:
        """Images of a forward pass."""
        return GPU_BATCH_SIZE if self.device == "cuda" else 1

    def describe(self) -> dict[str, Any]:
        """Name, family, version, checkpoint and number format."""
        named = {"name": self.name, "family": self.family, "version": self.version}
        return {**named, **self.identity, "precision": self.dtype}

    def features(self, images: Sequence[ByteArray]) -> FloatArray:
        """Rows [N, D] of RGB images, not normalized.

        Raises:
            ResourceError: a batch does not fit into the memory of the GPU.
        """
        rows = []
        for start in range(0, len(images), self.batch_size):
            batch = list(images[start : start + self.batch_size])
            filled = batch + batch[-1:] * (self.batch_size - len(batch))  # kernels depend on the shape: it stays the same
            try:
                rows.append(self._forward(filled)[: len(batch)].float().cpu().numpy())
            except torch.OutOfMemoryError as error:
                reason = f"{self.key}: {self.batch_size} images of {self.model} do not fit into the memory of the GPU"
                raise ResourceError(reason, f"free GPU memory, or set {KEY}.device to cpu") from error
        return np.concatenate(rows).astype(np.float32) if rows else np.zeros((0, 0), np.float32)

    @abstractmethod
    def load(self) -> Self:
        """Load the weights; a second call does nothing."""

    def _accept(self, folder: Path) -> None:
        self._check(check_checkpoint(folder))

    @abstractmethod
    def _check(self, config: dict[str, Any]) -> None:
        """Raise ConfigError if `config.json` describes another kind of network."""

    @abstractmethod
    def _forward(self, images: list[ByteArray]) -> torch.Tensor:
        """Features [N, D] of a batch."""


class TransformersImageEncoder(HubImageFeatureExtractor):
    """Model of transformers with the image processor of its checkpoint (Pillow backend).

    Attributes:
        model_types: accepted values of `model_type` in `config.json`.
        output: field of the model output that holds the features.
    """

    model_types: ClassVar[tuple[str, ...]]
    output: ClassVar[str]

    _processor: Any = None

    @abstractmethod
    def network_class(self) -> Any:
        """Class of transformers that loads the weights."""

    def load(self) -> Self:
        """Load image processor and weights; a second call does nothing.

        Raises:
            IntegrityError: no usable image processor, or weights are missing or of another shape than the configuration.
        """
        if self._network is None:
            from transformers import AutoImageProcessor

            folder = self.fetch()
            try:
                self._processor = AutoImageProcessor.from_pretrained(
                    folder, backend="pil", local_files_only=True, trust_remote_code=False
                )
            except (ImportError, OSError, ValueError, TypeError, KeyError) as error:
                reason = f"{self.key}.model: no usable image processor: {' '.join(str(error).split())[:200]}"
                raise IntegrityError(reason, "fetch the checkpoint again, with its preprocessor_config.json") from error
            self._network = load_weights(self.network_class(), folder, self.key, torch.float32).to(self.device).eval()
        return self

    def _check(self, config: dict[str, Any]) -> None:
        kind = config.get("model_type")
        if kind not in self.model_types:
            raise ConfigError(
                f"{self.key}.model: {self.model} is of type {kind}, not {' or '.join(self.model_types)}",
                f"name a checkpoint of that kind, or another judge than {self.name}",
            )

    @torch.inference_mode()
    def _forward(self, images: list[ByteArray]) -> torch.Tensor:
        from PIL import Image

        self.load()
        pixels = self._processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
        with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            features: torch.Tensor = getattr(self._network(pixel_values=pixels.to(self.device)), self.output)
        return features
