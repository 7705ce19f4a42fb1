"""Main memory of this process."""

from __future__ import annotations

import ctypes
import gc

import pyarrow as pa


def release_unused_memory() -> None:
    """Return memory that Python, Arrow and glibc hold for reuse to the system, after large tables were released."""
    gc.collect()
    pa.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries lack it
    if trim is not None:
        trim(0)
