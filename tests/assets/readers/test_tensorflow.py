"""Tests of the readers of TensorFlow's files; malformed input raises IntegrityError only."""

from __future__ import annotations

import contextlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline_steps.assets.readers import tensorflow
from pipeline_steps.assets.readers.tensorflow import TABLE_MAGIC, read_bundle, read_frozen_graph
from pipeline_steps.core.errors import IntegrityError

WEIGHTS = np.arange(6, dtype="<f4").reshape(2, 3)


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def shape(*sizes: int) -> bytes:
    return b"".join(field(2, field(1, size)) for size in sizes)


def graph() -> bytes:
    """A GraphDef with one float constant, one integer constant and one other node."""

    def constant(name: str, dtype: int, content: bytes) -> bytes:
        tensor = field(1, dtype) + field(2, shape(2, 3)) + field(4, content)
        attribute = field(1, b"value") + field(2, field(8, tensor))
        return field(1, field(1, name.encode()) + field(2, b"Const") + field(5, attribute))

    relu = field(1, field(1, b"relu") + field(2, b"Relu"))
    return constant("weights", 1, WEIGHTS.tobytes()) + relu + constant("steps", 3, b"\0" * 24)


def block(entries: list[tuple[bytes, bytes]]) -> bytes:
    """A LevelDB block whose keys share prefixes, without compression; 5 trailing bytes: type and checksum."""
    out, last = b"", b""
    for key, value in entries:
        shared = 0
        while shared < min(len(key), len(last)) and key[shared] == last[shared]:
            shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    return out + struct.pack("<II", 0, 1)


def bundle() -> tuple[bytes, bytes]:
    """A checkpoint with two float variables and one integer variable."""
    data = WEIGHTS.tobytes() + struct.pack("<q", 7) + struct.pack("<f", 2.5)

    def entry(dtype: int, sizes: tuple[int, ...], offset: int, size: int) -> bytes:
        return field(1, dtype) + field(2, shape(*sizes)) + field(4, offset) + field(5, size)

    entries = [
        (b"", b"\x08\x01"),
        (b"layer/kernel", entry(1, (2, 3), 0, 24)),
        (b"layer/kernel_step", entry(9, (), 24, 8)),
        (b"layer/scale", entry(1, (), 32, 4)),
    ]
    body = block(entries)
    meta = b"\0" * 5
    index_offset = len(body) + 5
    index = block([(b"zzz", varint(0) + varint(len(body)))])
    handles = varint(0) + varint(0) + varint(index_offset) + varint(len(index))
    footer = handles.ljust(40, b"\0") + struct.pack("<Q", TABLE_MAGIC)
    return body + meta + index + meta + footer, data


def test_a_frozen_graph_gives_its_float_constants() -> None:
    tensors = read_frozen_graph(graph())
    assert list(tensors) == ["weights"]
    np.testing.assert_array_equal(tensors["weights"], WEIGHTS)


def test_a_bundle_gives_its_float_variables() -> None:
    tensors = read_bundle(*bundle())
    assert sorted(tensors) == ["layer/kernel", "layer/scale"]
    np.testing.assert_array_equal(tensors["layer/kernel"], WEIGHTS)
    assert tensors["layer/scale"].shape == ()
    assert float(tensors["layer/scale"]) == 2.5


def test_truncated_data_is_refused() -> None:
    index, data = bundle()
    with pytest.raises(IntegrityError, match="outside the data file"):
        read_bundle(index, data[:-1])


def test_tensor_that_does_not_fill_its_shape_is_an_error() -> None:
    tensor = field(1, 1) + field(2, shape(2, 4)) + field(4, WEIGHTS.tobytes())
    node = field(1, b"w") + field(2, b"Const") + field(5, field(1, b"value") + field(2, field(8, tensor)))
    with pytest.raises(IntegrityError, match="do not fill shape"):
        read_frozen_graph(field(1, node))


def test_a_compressed_table_is_refused() -> None:
    index, data = bundle()
    body = index.index(b"layer/kernel")
    end = index.index(b"\0" * 5, body)
    with pytest.raises(IntegrityError):
        read_bundle(index[:end] + b"\x01" + index[end + 1 :], data)


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_never_raise_anything_else(payload: bytes) -> None:
    for read in (lambda: read_frozen_graph(payload), lambda: tensorflow.varint(payload, 0)):
        with contextlib.suppress(IntegrityError):
            read()
    footer = payload[:40].ljust(40, b"\0") + struct.pack("<Q", TABLE_MAGIC)
    with contextlib.suppress(IntegrityError):
        read_bundle(payload + footer, payload)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_files_give_a_result_or_an_integrity_error(data: st.DataObject) -> None:
    index, values = bundle()
    for original, read in ((index, lambda raw: read_bundle(raw, values)), (graph(), read_frozen_graph)):
        raw = bytearray(original)
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        cut = data.draw(st.integers(0, len(raw)))
        for candidate in (bytes(raw), bytes(raw[:cut])):
            try:
                tensors = read(candidate)
            except IntegrityError:
                continue
            assert all(tensor.dtype == np.float32 for tensor in tensors.values())


@given(st.integers(0, 2**64 - 1))
def test_varints_round_trip(value: int) -> None:
    assert tensorflow.varint(varint(value), 0) == (value, len(varint(value)))


def test_endless_varint_is_refused() -> None:
    with pytest.raises(IntegrityError, match="longer than 10"):
        tensorflow.varint(b"\xff" * 50, 0)
