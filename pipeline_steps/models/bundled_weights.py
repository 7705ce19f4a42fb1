"""Base class of the models whose weights stage `assets` fetched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from pipeline_steps.core.checksums import check_digest, damaged, read_verified
from pipeline_steps.core.errors import DataError, IntegrityError
from pipeline_steps.core.hashing import sha256_bytes

META = "meta.json"


class BundledModel:
    """Model with weights in the assets folder. The constructor loads no weights; `load` does.

    Args:
        assets: folder written by the `assets` stage.
        device: torch device that computes.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    version: ClassVar[int]
    files: ClassVar[tuple[str, ...]]
    """Files of the assets folder that the model reads; the first one contains its weights."""

    def __init__(self, assets: Path, device: str = "cpu") -> None:
        self.assets = Path(assets)
        self.device = torch.device(device)
        self._weights: dict[str, torch.Tensor] | None = None

    def describe(self) -> dict[str, Any]:
        """Name, family, version and sha256 of the files read. Reads the hashes that the `assets` stage recorded."""
        hashes = {file: self._recorded_hash(file) for file in self.files}
        return {"name": self.name, "family": self.family, "version": self.version, "sha256": hashes}

    def load(self) -> Self:
        """Read and check the weights; a second call does nothing.

        Raises:
            DataError: the assets folder or a file of it is missing.
            IntegrityError: a file's sha256 is not the one recorded when it was written.
        """
        if self._weights is None:
            payloads = {file: self._read(file) for file in self.files}
            try:
                tensors = load_safetensors(payloads[self.files[0]])
            except SafetensorError as error:
                raise damaged(self.assets / self.files[0], str(error)) from error
            self._weights = {name: tensor.to(self.device) for name, tensor in tensors.items()}
            self._prepare(payloads)
        return self

    def _prepare(self, payloads: dict[str, bytes]) -> None:
        """Hook: read what is not a tensor (labels, tokenizer) from the checked bytes."""

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """Tensors by name; requires `load`."""
        if self._weights is None:
            raise RuntimeError(f"{self.name}: call load() before use")
        return self._weights

    def _read(self, file: str) -> bytes:
        path = self.assets / file
        expected = self._recorded_hash(file)
        if not path.is_file():
            raise DataError(f"{path} is missing", "run: dvc repro assets")
        payload = path.read_bytes()
        got = sha256_bytes(payload)
        check_digest(path, got)
        if got != expected:
            raise IntegrityError(f"{path}: sha256 expected {expected}, got {got}", "run: dvc repro --force assets")
        return payload

    def _recorded_hash(self, file: str) -> str:
        path = self.assets / META
        if not path.is_file():
            raise DataError(f"{path} is missing", "run: dvc repro assets")
        try:
            return str(json.loads(read_verified(path))["files"][file]["sha256"])
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{path} does not list {file}", "run: dvc repro --force assets") from error
