"""GPU memory: errors that mean that it is too small, as a ResourceError that names the parameters to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline_steps.core.errors import ResourceError

_MESSAGES = ("out of memory", "cublas_status_alloc_failed", "cudnn_status_alloc_failed", "cusolver_status_alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or one of its libraries could not allocate GPU memory; libraries report it as a plain RuntimeError."""
    if type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _MESSAGES)


@contextmanager
def gpu_memory_guard(keys: str, action: str) -> Iterator[None]:
    """Raise ResourceError in place of an error that means that GPU memory is too small.

    Args:
        keys: parameters that determine how much memory is needed, for the message.
        action: what the user can do.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ResourceError(f"{keys}: GPU memory is too small: {reason}", action) from error
