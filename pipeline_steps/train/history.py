"""How training went: tables by step, pictures as files, numbers of the end."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from PIL import Image

from pipeline_steps.core.array_types import ByteArray
from pipeline_steps.train.lightning_module import BUCKETS, DiffusionModule

TAIL = 100
"""Last steps over which the reported loss is the mean."""


def loss_csv(history: list[dict[str, float]]) -> str:
    """CSV: loss and its means by time slice, a row a step; empty where not finite."""
    names = ["loss", *(f"loss_t{index}" for index in range(BUCKETS))]
    lines = [",".join(["step", *names])]
    for number, row in enumerate(history, start=1):
        lines.append(",".join([str(number), *(_number(row[name]) for name in names)]))
    return "\n".join(lines) + "\n"


def validation_table(validation: dict[str, float]) -> str:
    """CSV: validation loss by step."""
    rows = [f"{step},{_number(value)}" for step, value in _by_step(validation)]
    return "\n".join(["step,validation_loss", *rows]) + "\n"


def png(picture: ByteArray) -> bytes:
    """A PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def final_metrics(module: DiffusionModule) -> dict[str, Any]:
    """Steps, mean loss of the last ones, last validation loss, trained parameters; what is not known is left out."""
    tail = [row["loss"] for row in module.history[-TAIL:] if math.isfinite(row["loss"])]
    validation = [value for _, value in _by_step(module.validation) if math.isfinite(value)]
    values = {
        "steps": len(module.history),
        "loss": round(float(np.mean(tail)), 6) if tail else None,
        "validation_loss": round(validation[-1], 6) if validation else None,
        "parameters": sum(parameter.numel() for parameter in module.denoiser.parameters()),
    }
    return {key: value for key, value in values.items() if value is not None} | module.speed


def _by_step(validation: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(validation.items(), key=lambda item: int(item[0]))


def _number(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else ""
