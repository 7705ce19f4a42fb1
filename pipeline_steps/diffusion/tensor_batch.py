"""Dataclasses of tensors that are moved, pinned and sliced together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, Self

import torch


class TensorBatch:
    """Base of frozen dataclasses whose tensor fields [N, ...] belong to the same N samples."""

    __slots__ = ()

    def map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """Copy in which every tensor field is changed, also those of nested batches."""
        this: Any = self
        changed: dict[str, Any] = {}
        for field in fields(this):
            value = getattr(this, field.name)
            if isinstance(value, torch.Tensor):
                changed[field.name] = change(value)
            elif isinstance(value, TensorBatch):
                changed[field.name] = value.map_tensors(change)
        copy: Self = replace(this, **changed)
        return copy

    def to(self, device: torch.device | str) -> Self:
        """Copy on a device. A copy from pinned memory to a GPU does not block."""
        to_gpu = torch.device(device).type != "cpu"
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=to_gpu))

    def pin_memory(self) -> Self:
        """Copy in pinned memory; `DataLoader` calls it when `pin_memory` is set."""
        return self.map_tensors(torch.Tensor.pin_memory)

    def select(self, rows: list[int] | slice) -> Self:
        """Copy that holds some of the samples."""
        return self.map_tensors(lambda tensor: tensor[rows])

    def __len__(self) -> int:
        this: Any = self
        return len(getattr(this, fields(this)[0].name))
