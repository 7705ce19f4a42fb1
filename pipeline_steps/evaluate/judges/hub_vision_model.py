"""Base of the picture judges that are vision networks of transformers, by hub id and commit or by folder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch

from pipeline_steps.core.array_types import ByteArray, FloatArray
from pipeline_steps.core.errors import ConfigError, IntegrityError, ResourceError
from pipeline_steps.models.hub_checkpoint import HubModel, check_checkpoint, load_weights, resolve_device, resolve_dtype

KEY = "evaluate.checkpoints"
TOGETHER = 32
"""Pictures of a forward pass on a GPU; on a CPU one at a time, so that a row's bytes never depend on its neighbours."""


class HubImageFeatureExtractor(HubModel):
    """What the networks share.

    Args:
        model: hub id or local folder.
        revision: commit of a hub id; sha256 of a folder, checked when given.
        device: auto, cpu or cuda.
        precision: float32, bfloat16, or auto (bfloat16 on GPU, float32 on CPU). A judge's numbers should not depend on the
            device, so float32 is the default.
        root: folder that a relative `model` may lie in.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    version: ClassVar[int]

    def __init__(
        self, model: str, revision: str = "", device: str = "auto", precision: str = "float32", root: Path = Path()
    ) -> None:
        super().__init__(model, revision, f"{KEY}.{self.name}", root)
        self.device = resolve_device(device, KEY)
        self.precision = resolve_dtype(precision, self.device)
        self._network: Any = None

    @property
    def together(self) -> int:
        """Pictures of a forward pass."""
        return TOGETHER if self.device == "cuda" else 1

    def describe(self) -> dict[str, Any]:
        """Name, family, checkpoint and precision: everything but the picture that shapes its features."""
        named = {"name": self.name, "family": self.family, "version": self.version}
        return {**named, **self.identity, "precision": self.precision}

    def features(self, images: Sequence[ByteArray]) -> FloatArray:
        """Rows [N, D] of RGB pictures, not normalised.

        Raises:
            ResourceError: the GPU's memory does not hold a batch.
        """
        rows = []
        for start in range(0, len(images), self.together):
            batch = list(images[start : start + self.together])
            filled = batch + batch[-1:] * (self.together - len(batch))  # a batch of one shape gives the same bits
            try:
                rows.append(self._forward(filled)[: len(batch)].float().cpu().numpy())
            except torch.OutOfMemoryError as error:
                reason = f"GPU memory does not hold {self.together} pictures of {self.model}"
                raise ResourceError(reason, f"free it, or set {KEY}.device to cpu") from error
        return np.concatenate(rows).astype(np.float32) if rows else np.zeros((0, 0), np.float32)

    @abstractmethod
    def load(self) -> Self:
        """Load the weights; calling it again does nothing."""

    def _accept(self, folder: Path) -> None:
        self._check(check_checkpoint(folder))

    @abstractmethod
    def _check(self, config: dict[str, Any]) -> None:
        """Refuse the `config.json` of another kind of network."""

    @abstractmethod
    def _forward(self, images: list[ByteArray]) -> torch.Tensor:
        """[N, D] of a batch."""


class TransformersImageEncoder(HubImageFeatureExtractor):
    """A network of transformers behind the image processor that its checkpoint describes (Pillow backend).

    A subclass says which model types it takes, which class loads them, and which output is the feature.
    """

    model_types: ClassVar[tuple[str, ...]]
    output: ClassVar[str]
    """Field of the network's output that is the feature."""

    _processor: Any = None

    @abstractmethod
    def network_class(self) -> Any:
        """Class of transformers that loads the weights."""

    def load(self) -> Self:
        """Load image processor and weights; calling it again does nothing.

        Raises:
            IntegrityError: no usable image processor, or weights are missing or have another shape than the configuration says.
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
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bfloat16"):
            made: torch.Tensor = getattr(self._network(pixel_values=pixels.to(self.device)), self.output)
        return made
