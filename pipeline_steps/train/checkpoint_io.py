"""Training checkpoints: written atomically, read without unpickling anything but tensors and plain types."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from pipeline_steps.core.atomic import atomic_path
from pipeline_steps.core.errors import DataError, IntegrityError


class AtomicCheckpointIO(TorchCheckpointIO):  # type: ignore[misc, unused-ignore]
    """Lightning plugin that reads and writes checkpoints by this module."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; an interruption leaves the previous one."""
        with atomic_path(Path(path)) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Read a checkpoint, see `read_checkpoint`."""
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Training checkpoint on the CPU.

    Raises:
        DataError: the file is missing.
        IntegrityError: the file is damaged, contains anything but tensors and plain types, or requests code.
    """
    if not path.is_file():
        raise DataError(
            f"checkpoint {path} is missing", "set train.resume_from_checkpoint to null or to a checkpoint of this run"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise IntegrityError(f"checkpoint {path} is not a plain checkpoint: {first}", f"remove {path} and run again") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise IntegrityError(f"checkpoint {path} has no state_dict", f"remove {path} and run again")
    hyper = checkpoint.get("hyper_parameters", {})
    if "_instantiator" in checkpoint or (isinstance(hyper, dict) and "_instantiator" in hyper):
        raise IntegrityError(f"checkpoint {path} requests code (_instantiator)", f"remove {path} and run again")
    return checkpoint
