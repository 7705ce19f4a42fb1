"""Reader of weights in TensorFlow files (variable bundles of a SavedModel, frozen graphs), without TensorFlow.

Sources: tensorflow/core/util/tensor_bundle (LevelDB table of BundleEntryProto), tensorflow/core/framework/graph.proto,
tensor.proto. Only float32 tensors are returned; nothing of the graph is executed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf import descriptor_pb2, message_factory, text_format
from google.protobuf.message import DecodeError

from pipeline_steps.assets.readers import AssetFormatError

Tensors = dict[str, npt.NDArray[np.float32]]
DT_FLOAT = 1
TABLE_MAGIC = 0xDB4775248B80FB57
FOOTER_BYTES = 48

MESSAGES = """
name: "weights.proto" package: "weights" syntax: "proto3"
message_type { name: "Dim" field { name: "size" number: 1 type: TYPE_INT64 } }
message_type { name: "Shape"
  field { name: "dim" number: 2 type: TYPE_MESSAGE type_name: ".weights.Dim" label: LABEL_REPEATED } }
message_type { name: "BundleEntry"
  field { name: "dtype" number: 1 type: TYPE_INT32 }
  field { name: "shape" number: 2 type: TYPE_MESSAGE type_name: ".weights.Shape" }
  field { name: "shard_id" number: 3 type: TYPE_INT32 }
  field { name: "offset" number: 4 type: TYPE_UINT64 }
  field { name: "size" number: 5 type: TYPE_UINT64 } }
message_type { name: "Tensor"
  field { name: "dtype" number: 1 type: TYPE_INT32 }
  field { name: "shape" number: 2 type: TYPE_MESSAGE type_name: ".weights.Shape" }
  field { name: "content" number: 4 type: TYPE_BYTES } }
message_type { name: "Value" field { name: "tensor" number: 8 type: TYPE_MESSAGE type_name: ".weights.Tensor" } }
message_type { name: "Attribute"
  field { name: "key" number: 1 type: TYPE_STRING }
  field { name: "value" number: 2 type: TYPE_MESSAGE type_name: ".weights.Value" } }
message_type { name: "Node"
  field { name: "name" number: 1 type: TYPE_STRING }
  field { name: "op" number: 2 type: TYPE_STRING }
  field { name: "attr" number: 5 type: TYPE_MESSAGE type_name: ".weights.Attribute" label: LABEL_REPEATED } }
message_type { name: "Graph"
  field { name: "node" number: 1 type: TYPE_MESSAGE type_name: ".weights.Node" label: LABEL_REPEATED } }
"""
"""The fields of TensorFlow's messages that hold weights, as a FileDescriptorProto."""

_CLASSES = message_factory.GetMessages([text_format.Parse(MESSAGES, descriptor_pb2.FileDescriptorProto())])


def _parse(message: str, payload: bytes) -> Any:
    try:
        return _CLASSES[f"weights.{message}"].FromString(payload)
    except DecodeError as error:
        raise AssetFormatError(f"not a TensorFlow message {message}: {error}") from error


def _float_tensor(name: str, payload: bytes, shape: Any) -> npt.NDArray[np.float32]:
    sizes = [max(dim.size, 0) for dim in shape.dim]
    try:
        return np.frombuffer(payload, "<f4").reshape(sizes)
    except ValueError as error:
        raise AssetFormatError(f"tensor {name!r}: {len(payload)} bytes do not fill shape {sizes[:8]}") from error


def varint(payload: bytes, start: int) -> tuple[int, int]:
    """Base-128 integer at `start` -> (value below 2**64, position behind it)."""
    value = 0
    for count, byte in enumerate(payload[start : start + 10]):
        value |= (byte & 0x7F) << (7 * count)
        if not byte & 0x80:
            return value & (2**64 - 1), start + count + 1
    raise AssetFormatError("an integer is truncated or longer than 10 bytes")


def _table_block(table: bytes, offset: int, size: int) -> list[tuple[bytes, bytes]]:
    """Entries of one uncompressed block of a LevelDB table: keys share prefixes with their predecessor."""
    if offset + size + 1 > len(table):
        raise AssetFormatError("a table block reaches beyond the file")
    if table[offset + size] != 0:
        raise AssetFormatError("a table block is compressed, which is not supported")
    block = table[offset : offset + size]
    end = len(block) - 4 - 4 * int.from_bytes(block[-4:], "little")
    if end < 0:
        raise AssetFormatError("a table block is shorter than its restart list")
    entries: list[tuple[bytes, bytes]] = []
    key, position = b"", 0
    while position < end:
        shared, position = varint(block, position)
        unshared, position = varint(block, position)
        length, position = varint(block, position)
        if shared > len(key) or position + unshared + length > end:
            raise AssetFormatError("a table entry reaches beyond its block")
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
        raise AssetFormatError("not a TensorFlow checkpoint index: wrong magic number")
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
            entry = _parse("BundleEntry", value if key else b"")
            if entry.dtype != DT_FLOAT:
                continue
            name = key.decode("utf-8", errors="replace")
            if entry.shard_id or entry.offset + entry.size > len(data):
                raise AssetFormatError(f"variable {name!r} lies outside the data file")
            tensors[name] = _float_tensor(name, data[entry.offset : entry.offset + entry.size], entry.shape)
    return tensors


def read_frozen_graph(graph: bytes) -> Tensors:
    """float32 constants with their bytes in place (`tensor_content`) of a serialised `GraphDef`, by node name.

    Raises:
        IntegrityError: the bytes are not a GraphDef.
    """
    tensors: Tensors = {}
    for node in _parse("Graph", graph).node:
        for attribute in node.attr if node.op == "Const" else ():
            tensor = attribute.value.tensor
            if attribute.key == "value" and tensor.dtype == DT_FLOAT and tensor.content:
                tensors[node.name] = _float_tensor(node.name, tensor.content, tensor.shape)
    return tensors
