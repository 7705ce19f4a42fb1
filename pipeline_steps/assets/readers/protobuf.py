"""Bounded reader of the protobuf wire format, without generated code.

Every malformed input raises IntegrityError; the time is linear in the bytes given.
"""

from __future__ import annotations

import struct

from pipeline_steps.core.errors import IntegrityError

Fields = dict[int, list[int | bytes]]


def varint(payload: bytes, start: int) -> tuple[int, int]:
    """Base-128 integer at `start` -> (value below 2**64, position behind it)."""
    value = 0
    for count in range(10):
        if start + count >= len(payload):
            raise IntegrityError("truncated varint", "fetch the asset again")
        byte = payload[start + count]
        value |= (byte & 0x7F) << (7 * count)
        if not byte & 0x80:
            return value & (2**64 - 1), start + count + 1
    raise IntegrityError("varint longer than 10 bytes", "fetch the asset again")


def fields(payload: bytes) -> Fields:
    """Fields of one message: number -> values in order; nested messages stay bytes, fixed-width values are raw bytes."""
    found: Fields = {}
    position = 0
    while position < len(payload):
        tag, position = varint(payload, position)
        number, wire_type = tag >> 3, tag & 7
        value: int | bytes
        if wire_type == 0:
            value, position = varint(payload, position)
        else:
            if wire_type == 2:
                size, position = varint(payload, position)
            elif wire_type in (1, 5):
                size = 8 if wire_type == 1 else 4
            else:
                raise IntegrityError(f"unknown wire type {wire_type}", "fetch the asset again")
            if size > len(payload) - position:
                raise IntegrityError("field reaches beyond its message", "fetch the asset again")
            value = payload[position : position + size]
            position += size
        if number == 0:
            raise IntegrityError("field number 0", "fetch the asset again")
        found.setdefault(number, []).append(value)
    return found


def varint_field(message: Fields, number: int, default: int = 0) -> int:
    """Last value of an integer field; `default` when absent."""
    value = message.get(number, [default])[-1]
    if isinstance(value, bytes):
        raise IntegrityError(f"field {number} is not an integer", "fetch the asset again")
    return value


def submessages(message: Fields, number: int) -> list[bytes]:
    """All values of a length-delimited field."""
    values = message.get(number, [])
    for value in values:
        if not isinstance(value, bytes):
            raise IntegrityError(f"field {number} is not length-delimited", "fetch the asset again")
    return [value for value in values if isinstance(value, bytes)]


def bytes_field(message: Fields, number: int) -> bytes:
    """Last value of a length-delimited field; empty when absent."""
    values = submessages(message, number)
    return values[-1] if values else b""


def string_field(message: Fields, number: int) -> str:
    """Last value of a string field; empty when absent."""
    try:
        return bytes_field(message, number).decode("utf-8")
    except UnicodeDecodeError as error:
        raise IntegrityError(f"field {number} is not UTF-8", "fetch the asset again") from error


def tensor_shape(payload: bytes) -> tuple[int, ...]:
    """`tensorflow.TensorShapeProto` -> sizes, each known and bounded."""
    shape = tuple(varint_field(fields(dimension), 1) for dimension in submessages(fields(payload), 2))
    if len(shape) > 8 or any(size > 2**31 for size in shape):
        raise IntegrityError(f"unlikely tensor shape {shape[:8]}", "fetch the asset again")
    return shape


def little_endian_uint32(payload: bytes, start: int) -> int:
    """Unsigned 32-bit integer at `start`."""
    if start < 0 or start + 4 > len(payload):
        raise IntegrityError("truncated integer", "fetch the asset again")
    return int(struct.unpack_from("<I", payload, start)[0])
