"""Training history: loss tables by step, PNG files, final metrics."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from pipeline_steps.core.array_types import ByteArray

TAIL = 100
"""Steps at the end over which the reported loss is averaged."""


def loss_csv(history: Sequence[Mapping[str, float]]) -> str:
    """CSV of the loss and its means by time interval, one row per step; empty where not finite."""
    names = list(history[0]) if history else ["loss"]
    rows = [",".join([str(step), *(_number(row[name]) for name in names)]) for step, row in enumerate(history, start=1)]
    return "\n".join([",".join(["step", *names]), *rows]) + "\n"


def validation_csv(validation: Mapping[str, float]) -> str:
    """CSV of the validation loss by step."""
    rows = [f"{step},{_number(value)}" for step, value in _by_step(validation)]
    return "\n".join(["step,validation_loss", *rows]) + "\n"


def encode_png(image: ByteArray) -> bytes:
    """PNG file of an image."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def final_metrics(history: Sequence[Mapping[str, float]], validation: Mapping[str, float]) -> dict[str, Any]:
    """Steps, mean loss of the last steps and last validation loss; undefined values are left out."""
    tail = [row["loss"] for row in history[-TAIL:] if math.isfinite(row["loss"])]
    losses = [value for _, value in _by_step(validation) if math.isfinite(value)]
    return {
        "steps": len(history),
        **({"loss": round(float(np.mean(tail)), 6)} if tail else {}),
        **({"validation_loss": round(losses[-1], 6)} if losses else {}),
    }


def _by_step(validation: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(validation.items(), key=lambda item: int(item[0]))


def _number(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else ""
