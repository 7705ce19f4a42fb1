"""Errors of torch and its libraries that mean that GPU memory is too small."""

from __future__ import annotations

import pytest
import torch

from pipeline_steps.core.errors import ResourceError
from pipeline_steps.core.gpu_memory import gpu_memory_guard

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 23.5 GiB"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(MESSAGE),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_too_little_memory_is_a_resource_error_that_names_the_keys(error: Exception) -> None:
    with (
        pytest.raises(ResourceError, match=r"a\.key, another\.key: GPU memory is too small") as caught,
        gpu_memory_guard("a.key, another.key", "lower a.key"),
    ):
        raise error
    assert (caught.value.exit_code, caught.value.action) == (4, "lower a.key")
    assert "\n" not in caught.value.reason


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: device-side assert"), ValueError("out of memory of the reader")])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, gpu_memory_guard("a.key", ""):
        raise error
    assert caught.value is error
