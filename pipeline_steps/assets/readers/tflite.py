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

from pipeline_steps.assets.readers import AssetFormatError
from pipeline_steps.assets.readers.flatbuffers import FlatBufferTable, root

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
        raise AssetFormatError("the TensorFlow Lite model contains no graph")
    tensors = graphs[0].tables(0)
    layers: list[TFLiteLayer] = []
    for number, operator in enumerate(graphs[0].tables(3)):
        code = codes[_index(operator.integer(0, "I"), codes, f"code of operator {number}")]
        if code not in (CONV_2D, DEPTHWISE_CONV_2D, FULLY_CONNECTED):
            continue
        inputs = operator.numbers(1, "<i4")
        if len(inputs) != 3:
            raise AssetFormatError(f"operator {number} has {len(inputs)} inputs, not 3")
        weight, bias = (
            _constant(tensors[_index(int(one), tensors, f"input of operator {number}")], buffers) for one in inputs[1:]
        )
        layers.append(TFLiteLayer(code, weight, bias))
    return layers


def _index(value: int, items: list[FlatBufferTable] | list[int], what: str) -> int:
    if not 0 <= value < len(items):
        raise AssetFormatError(f"{what} is {value}; the model has {len(items)}")
    return value


def _constant(tensor: FlatBufferTable, buffers: list[FlatBufferTable]) -> npt.NDArray[np.float32]:
    """Constant tensor, dequantised in float64 and rounded to float32."""
    shape = tuple(int(size) for size in tensor.numbers(0, "<i4")[: MOST_RANK + 1])
    kind = tensor.integer(1, "b")
    if len(shape) > MOST_RANK or min(shape, default=1) < 0 or kind not in DTYPES:
        raise AssetFormatError(f"a constant has the unsupported shape {shape} or type {kind}")
    stored = buffers[_index(tensor.integer(2, "I"), buffers, "buffer of a constant")].numbers(0, "u1")
    dtype = np.dtype(DTYPES[kind])
    if len(stored) != math.prod(shape) * dtype.itemsize:
        raise AssetFormatError(f"{len(stored)} bytes do not fill {dtype} of shape {shape}")
    values = stored.view(dtype).reshape(shape)
    if kind == 0:
        return values.astype(np.float32)
    quantisation = tensor.table(4)
    scale = quantisation.numbers(2, "<f4") if quantisation else np.empty(0, np.float32)
    zero = quantisation.numbers(3, "<i8") if quantisation else np.empty(0, np.int64)
    axis = quantisation.integer(6, "i") if quantisation else 0
    per_slice = len(scale) > 1
    if not len(scale) or len(zero) not in (1, len(scale)) or (per_slice and not 0 <= axis < len(shape)):
        raise AssetFormatError(f"a constant of shape {shape} is without usable quantisation")
    if per_slice and len(scale) != shape[axis]:
        raise AssetFormatError(f"{len(scale)} scales for axis {axis} of shape {shape}")
    if not np.isfinite(scale).all():
        raise AssetFormatError("a scale is not a finite number")
    along = tuple(-1 if per_slice and position == axis else 1 for position in range(len(shape)))
    zeros, scales = (np.broadcast_to(each, scale.shape).astype(np.float64).reshape(along) for each in (zero, scale))
    with np.errstate(over="ignore"):
        return ((values.astype(np.float64) - zeros) * scales).astype(np.float32)
