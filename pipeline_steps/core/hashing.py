"""Hashes: item ids (sha256 of the bytes) and fingerprints of configurations."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

ID_LENGTH = 32
"""Hex digits of sha256 kept in an id: 128 bits."""


def sha256_bytes(payload: bytes) -> str:
    """sha256 of `payload` as 64 hex digits."""
    return hashlib.sha256(payload).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 of a file as 64 hex digits, read in blocks."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def item_id(payload: bytes) -> str:
    """Id of an item: the first 32 hex digits of the sha256 of its bytes. Never a path, an order, a time."""
    return sha256_bytes(payload)[:ID_LENGTH]


def text_id(text: str) -> str:
    """Id of a text: hash of its UTF-8 bytes."""
    return item_id(text.encode("utf-8"))


def fingerprint(parts: Any) -> str:
    """Hash of a JSON-able description (model, revision, version, prompt, decoder, parameters): 16 hex digits."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return sha256_bytes(canonical.encode("utf-8"))[:16]
