"""Reader of weights in TensorFlow Lite models, without TensorFlow; dequantizes to float32.

Source: tensorflow/compiler/mlir/lite/schema/schema.fbs; quantisation: https://ai.google.dev/edge/litert/models/quantization_spec,
real = (stored - zero_point) * scale, with one scale for the tensor or one for each slice along an axis.
Nothing of the graph is executed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline_steps.assets.readers.flatbuffers import FlatBufferTable, root
from pipeline_steps.core.errors import IntegrityError

CONV_2D, DEPTHWISE_CONV_2D, FULLY_CONNECTED = 3, 4, 9
"""`BuiltinOperator` numbers of the operators that have weights."""

DTYPES = {0: "<f4", 2: "<i4", 3: "u1", 9: "i1"}
"""`TensorType` number -> numpy dtype of the constants understood."""

MOST_RANK = 8


@dataclass(frozen=True, slots=True)
class TFLiteLayer:
    """An operator with weights, in the graph's order and layout.

    Attributes:
        operator: CONV_2D (weight [out, k, k, in]), DEPTHWISE_CONV_2D ([1, k, k, channels]) or FULLY_CONNECTED ([out, in]).
        weight: float32.
        bias: float32 [out].
    """

    operator: int
    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]


def read_tflite(payload: bytes) -> list[TFLiteLayer]:
    """Weights and biases of the first graph of a TensorFlow Lite model, in the order of computation.

    Raises:
        IntegrityError: the bytes are not such a model, or a layer's constants are missing or of an unknown type.
    """
    model = root(payload, b"TFL3")
    # slot 0 is the older field, for codes below 127
    codes = [max(code.integer(0, "b"), code.integer(3, "i")) for code in model.tables(1)]
    graphs, buffers = model.tables(2), model.tables(4)
    if not graphs:
        raise IntegrityError("the TensorFlow Lite model holds no graph", "fetch the asset again")
    tensors = graphs[0].tables(0)
    layers: list[TFLiteLayer] = []
    for number, operator in enumerate(graphs[0].tables(3)):
        code = codes[_index(operator.integer(0, "I"), codes, f"code of operator {number}")]
        if code not in (CONV_2D, DEPTHWISE_CONV_2D, FULLY_CONNECTED):
            continue
        inputs = operator.numbers(1, "<i4")
        if len(inputs) != 3:
            raise IntegrityError(f"operator {number} has {len(inputs)} inputs, not 3", "fetch the asset again")
        weight, bias = (
            _constant(tensors[_index(int(one), tensors, f"input of operator {number}")], buffers) for one in inputs[1:]
        )
        layers.append(TFLiteLayer(code, weight, bias))
    return layers


def _index(value: int, items: list[FlatBufferTable] | list[int], what: str) -> int:
    if not 0 <= value < len(items):
        raise IntegrityError(f"{what}: {value} of {len(items)}", "fetch the asset again")
    return value


def _constant(tensor: FlatBufferTable, buffers: list[FlatBufferTable]) -> npt.NDArray[np.float32]:
    """A constant tensor, dequantised in float64 and rounded once."""
    shape = tuple(int(size) for size in tensor.numbers(0, "<i4")[: MOST_RANK + 1])
    kind = tensor.integer(1, "b")
    if len(shape) > MOST_RANK or min(shape, default=1) < 0 or kind not in DTYPES:
        raise IntegrityError(f"constant of shape {shape} and type {kind}", "fetch the asset again")
    stored = buffers[_index(tensor.integer(2, "I"), buffers, "buffer of a constant")].numbers(0, "u1")
    dtype = np.dtype(DTYPES[kind])
    if len(stored) != math.prod(shape) * dtype.itemsize:
        raise IntegrityError(f"{len(stored)} bytes do not fill {dtype} of shape {shape}", "fetch the asset again")
    values = stored.view(dtype).reshape(shape)
    if kind == 0:
        return values.astype(np.float32)
    quantisation = tensor.table(4)
    scale = quantisation.numbers(2, "<f4") if quantisation else np.empty(0, np.float32)
    zero = quantisation.numbers(3, "<i8") if quantisation else np.empty(0, np.int64)
    axis = quantisation.integer(6, "i") if quantisation else 0
    per_slice = len(scale) > 1
    if not len(scale) or len(zero) not in (1, len(scale)) or (per_slice and not 0 <= axis < len(shape)):
        raise IntegrityError(f"constant of shape {shape} without usable quantisation", "fetch the asset again")
    if per_slice and len(scale) != shape[axis]:
        raise IntegrityError(f"{len(scale)} scales for axis {axis} of shape {shape}", "fetch the asset again")
    if not np.isfinite(scale).all():
        raise IntegrityError("a scale that is not a finite number", "fetch the asset again")
    along = tuple(-1 if per_slice and position == axis else 1 for position in range(len(shape)))
    real = (values.astype(np.float64) - _spread(zero, along)) * _spread(scale, along)
    with np.errstate(over="ignore"):
        return real.astype(np.float32)


def _spread(values: npt.NDArray[np.float32] | npt.NDArray[np.int64], along: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """One value, or one for each slice, in a shape that broadcasts along the axis marked -1."""
    numbers: npt.NDArray[np.float64] = values.astype(np.float64)
    return numbers.reshape(along if len(numbers) > 1 else (1,) * len(along))
