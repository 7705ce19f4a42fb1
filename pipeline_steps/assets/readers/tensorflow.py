"""Reader of weights in TensorFlow files (variable bundles of a SavedModel, frozen graphs), without TensorFlow.

Sources: tensorflow/core/util/tensor_bundle (LevelDB table of BundleEntryProto), tensorflow/core/framework/graph.proto,
tensor.proto. Only float32 tensors are returned; nothing of the graph is executed.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from pipeline_steps.assets.readers.protobuf import (
    bytes_field,
    fields,
    little_endian_uint32,
    string_field,
    submessages,
    tensor_shape,
    varint,
    varint_field,
)
from pipeline_steps.core.errors import IntegrityError

Tensors = dict[str, npt.NDArray[np.float32]]
DT_FLOAT = 1
TABLE_MAGIC = 0xDB4775248B80FB57
FOOTER_BYTES = 48


def _float_tensor(name: str, payload: bytes, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    if len(payload) != 4 * math.prod(shape):
        raise IntegrityError(f"tensor {name!r}: {len(payload)} bytes do not fill shape {shape}", "fetch the asset again")
    return np.frombuffer(payload, "<f4").reshape(shape)


def _table_block(table: bytes, offset: int, size: int) -> list[tuple[bytes, bytes]]:
    """Entries of one uncompressed block of a LevelDB table: keys share prefixes with their predecessor."""
    if offset + size + 1 > len(table):
        raise IntegrityError("table block reaches beyond the file", "fetch the asset again")
    if table[offset + size] != 0:
        raise IntegrityError("table block is compressed, which is not supported", "fetch the asset again")
    block = table[offset : offset + size]
    restarts = little_endian_uint32(block, len(block) - 4)
    end = len(block) - 4 - 4 * restarts
    if end < 0:
        raise IntegrityError("table block is shorter than its restart list", "fetch the asset again")
    entries: list[tuple[bytes, bytes]] = []
    key, position = b"", 0
    while position < end:
        shared, position = varint(block, position)
        unshared, position = varint(block, position)
        length, position = varint(block, position)
        if shared > len(key) or position + unshared + length > end:
            raise IntegrityError("table entry reaches beyond its block", "fetch the asset again")
        key = key[:shared] + block[position : position + unshared]
        position += unshared
        entries.append((key, block[position : position + length]))
        position += length
    return entries


def read_bundle(index: bytes, data: bytes) -> Tensors:
    """float32 variables of a one-shard TensorFlow checkpoint (`variables.index`, `variables.data-00000-of-00001`).

    Raises:
        IntegrityError: the bytes are not such a checkpoint.
    """
    if len(index) < FOOTER_BYTES or int.from_bytes(index[-8:], "little") != TABLE_MAGIC:
        raise IntegrityError("not a TensorFlow checkpoint index: wrong magic number", "fetch the asset again")
    footer = index[-FOOTER_BYTES:]
    _, position = varint(footer, 0)
    _, position = varint(footer, position)
    offset, position = varint(footer, position)
    size, _ = varint(footer, position)
    tensors: Tensors = {}
    for _, handle in _table_block(index, offset, size):
        block_offset, position = varint(handle, 0)
        block_size, _ = varint(handle, position)
        for key, value in _table_block(index, block_offset, block_size):
            entry = fields(value) if key else {}
            if varint_field(entry, 1) != DT_FLOAT:
                continue
            name = key.decode("utf-8", errors="replace")
            start, length = varint_field(entry, 4), varint_field(entry, 5)
            if varint_field(entry, 3) != 0 or start + length > len(data):
                raise IntegrityError(f"variable {name!r} lies outside the data file", "fetch the asset again")
            tensors[name] = _float_tensor(name, data[start : start + length], tensor_shape(bytes_field(entry, 2)))
    return tensors


def read_frozen_graph(graph: bytes) -> Tensors:
    """float32 constants with their bytes in place (`tensor_content`) of a serialised `GraphDef`, by node name.

    Raises:
        IntegrityError: the bytes are not a GraphDef.
    """
    tensors: Tensors = {}
    for node_bytes in submessages(fields(graph), 1):
        node = fields(node_bytes)
        if string_field(node, 2) != "Const":
            continue
        name = string_field(node, 1)
        for attribute_bytes in submessages(node, 5):
            attribute = fields(attribute_bytes)
            if string_field(attribute, 1) != "value":
                continue
            tensor = fields(bytes_field(fields(bytes_field(attribute, 2)), 8))
            content = bytes_field(tensor, 4)
            if varint_field(tensor, 1) == DT_FLOAT and content:
                tensors[name] = _float_tensor(name, content, tensor_shape(bytes_field(tensor, 2)))
    return tensors
