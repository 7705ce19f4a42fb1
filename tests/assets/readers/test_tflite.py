"""Tests of the TensorFlow Lite reader; malformed input raises IntegrityError only."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline_steps.assets.convert import convert
from pipeline_steps.assets.readers.flatbuffers import MOST_TABLES, FlatBufferTable, root
from pipeline_steps.assets.readers.tflite import CONV_2D, FULLY_CONNECTED, read_tflite
from pipeline_steps.core.errors import IntegrityError

Node = Callable[[bytearray], int]
"""Appends itself to the buffer and returns where it starts."""


def vector(dtype: str, *values: float) -> Node:
    def write(out: bytearray) -> int:
        out.extend(b"\0" * (-len(out) % 4))
        start = len(out)
        out.extend(struct.pack("<I", len(values)) + np.array(values, dtype).tobytes())
        return start

    return write


def nodes(*items: Node) -> Node:
    def write(out: bytearray) -> int:
        start = len(out)
        out.extend(struct.pack("<I", len(items)) + bytes(4 * len(items)))
        for number, item in enumerate(items):
            entry = start + 4 + 4 * number
            struct.pack_into("<I", out, entry, item(out) - entry)
        return start

    return write


def table(fields: dict[int, int | Node]) -> Node:
    """Slot -> integer (4 bytes) or what its offset points to."""

    def write(out: bytearray) -> int:
        slots = max(fields, default=-1) + 1
        vtable = len(out)
        offsets = {slot: 4 + 4 * order for order, slot in enumerate(sorted(fields))}
        entries = [offsets.get(slot, 0) for slot in range(slots)]
        out.extend(struct.pack(f"<HH{slots}H", 4 + 2 * slots, 4 + 4 * len(fields), *entries))
        start = len(out)
        out.extend(struct.pack("<i", start - vtable) + bytes(4 * len(fields)))
        for slot, value in fields.items():
            field = start + offsets[slot]
            struct.pack_into("<I", out, field, value if isinstance(value, int) else value(out) - field)
        return start

    return write


def tensor(shape: tuple[int, ...], kind: int, buffer: int, scales: tuple[float, ...] = (), zeros: tuple[int, ...] = ()) -> Node:
    quantisation = table({2: vector("<f4", *scales), 3: vector("<i8", *zeros), 6: 0})
    return table({0: vector("<i4", *shape), 1: kind, 2: buffer, 4: quantisation})


def model(
    bias_length: int = 2, scales: tuple[float, ...] = (0.5, 2.0), zeros: tuple[int, ...] = (0, 1), inputs: int = 3
) -> bytes:
    """A convolution with a scale for each channel, a dense layer of plain floats, and an addition."""
    tensors = [
        table({}),
        tensor((2, 1, 1, 2), 9, 0, scales, zeros),
        tensor((bias_length,), 2, 1, (0.25,), (0,)),
        tensor((1, 2), 0, 2),
        tensor((1,), 0, 3),
    ]
    operators = [
        table({0: 0, 1: vector("<i4", *[0, 1, 2][:inputs])}),
        table({0: 1, 1: vector("<i4", 0, 0)}),
        table({0: 2, 1: vector("<i4", 0, 3, 4)}),
    ]
    stored = [np.array([2, -2, 3, 5], "i1"), np.array([4, -8], "<i4"), np.array([0.5, -1.5], "<f4"), np.array([7.0], "<f4")]
    buffers = [table({0: vector("u1", *values.tobytes())}) for values in stored]
    codes = [table({0: CONV_2D, 3: CONV_2D}), table({}), table({0: FULLY_CONNECTED})]
    graph = table({0: nodes(*tensors), 3: nodes(*operators)})
    out = bytearray(b"\0\0\0\0TFL3")
    start = table({1: nodes(*codes), 2: nodes(graph), 4: nodes(*buffers)})(out)
    struct.pack_into("<I", out, 0, start)
    return bytes(out)


def test_constants_are_dequantized() -> None:
    convolution, dense = read_tflite(model())
    assert (convolution.operator, dense.operator) == (CONV_2D, FULLY_CONNECTED)
    np.testing.assert_array_equal(convolution.weight.reshape(2, 2), [[1.0, -1.0], [4.0, 8.0]])
    np.testing.assert_array_equal(convolution.bias, [1.0, -2.0])
    np.testing.assert_array_equal(dense.weight, [[0.5, -1.5]])
    np.testing.assert_array_equal(dense.bias, [7.0])
    assert {array.dtype for layer in (convolution, dense) for array in (layer.weight, layer.bias)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (model(bias_length=3), "do not fill"),
        (model(scales=(0.5, 1.0, 2.0), zeros=(0,)), "3 scales for axis 0"),
        (model(scales=(), zeros=()), "without usable quantisation"),
        (model(scales=(0.5, float("inf"))), "finite"),
        (model(inputs=2), "has 2 inputs"),
        (model().replace(b"TFL3", b"TFL2"), "not a FlatBuffers file"),
        (b"", "not a FlatBuffers file"),
    ],
)
def test_unreadable_models_are_errors(payload: bytes, reason: str) -> None:
    with pytest.raises(IntegrityError, match=reason):
        read_tflite(payload)


def test_vector_with_too_many_tables_is_an_error() -> None:
    out = bytearray(b"\0\0\0\0TEST")
    struct.pack_into("<I", out, 0, table({0: vector("<i4", *range(MOST_TABLES + 1))})(out))
    with pytest.raises(IntegrityError, match="at most"):
        root(bytes(out), b"TEST").tables(0)


def test_another_network_is_an_error() -> None:
    with pytest.raises(IntegrityError, match="expected"):
        convert("efficientnet_lite3", {"graph": model()})
    with pytest.raises(IntegrityError):
        convert("efficientnet_lite3", {})


@given(st.binary(max_size=400))
def test_random_bytes_never_raise_anything_else(payload: bytes) -> None:
    with contextlib.suppress(IntegrityError):
        read_tflite(payload[:4] + b"TFL3" + payload[4:])
    nested = FlatBufferTable(payload, len(payload) // 2)
    for read in (nested.table, nested.tables, lambda slot: nested.integer(slot, "i"), lambda slot: nested.numbers(slot, "<i8")):
        with contextlib.suppress(IntegrityError):
            read(1)


@settings(max_examples=500)
@given(st.data())
def test_damaged_models_give_a_result_or_an_integrity_error(data: st.DataObject) -> None:
    raw = bytearray(model())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    for candidate in (bytes(raw), bytes(raw[:cut])):
        try:
            layers = read_tflite(candidate)
        except IntegrityError:
            continue
        assert all(layer.weight.dtype == layer.bias.dtype == np.float32 for layer in layers)
