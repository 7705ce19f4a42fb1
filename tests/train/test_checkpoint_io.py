"""Training checkpoints: only tensors and plain types are loaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from pipeline_steps.core.errors import DataError, IntegrityError
from pipeline_steps.train.checkpoint_io import AtomicCheckpointIO, read_checkpoint


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_pickles_are_not_loaded(tmp_path: Path) -> None:
    marker, checkpoint = tmp_path / "executed", tmp_path / "last.ckpt"
    torch.save({"state_dict": {}, "payload": _Payload(marker)}, checkpoint)
    with pytest.raises(IntegrityError, match="not a plain checkpoint"):
        AtomicCheckpointIO().load_checkpoint(checkpoint, weights_only=False)
    assert not marker.exists()


def test_a_checkpoint_that_requests_code_or_is_damaged_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    with pytest.raises(DataError, match="is missing"):
        read_checkpoint(path)
    torch.save({"state_dict": {}, "hyper_parameters": {"_instantiator": "os.system"}}, path)
    with pytest.raises(IntegrityError, match="_instantiator"):
        read_checkpoint(path)
    torch.save({"state_dict": {}, "digest": "x"}, path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(IntegrityError, match="not a plain checkpoint"):
        read_checkpoint(path)
