"""CPU inference through OpenVINO: the same network in single precision, without the cost of eager execution."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch

from pipeline_steps.core.errors import ConfigError


def compiled(network: torch.nn.Module, example: torch.Tensor, threads: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function equal to `network` up to rounding, for inputs shaped like `example`; one core a call, callable from threads.

    Raises:
        ConfigError: OpenVINO is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise ConfigError("the backend openvino is not installed", "pip install 'seeing-sound[openvino]'") from error
    trace: Any = torch.jit.trace  # untyped in torch
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Converting a tensor to a Python")  # branches on the input's shape, which is fixed
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = trace(network.eval(), example, strict=False, check_trace=False)
        graph = openvino.convert_model(traced, example_input=example, input=list(example.shape))
    options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(graph, "CPU", options)
    requests = threading.local()

    def call(features: torch.Tensor) -> torch.Tensor:
        if not hasattr(requests, "mine"):
            requests.mine = model.create_infer_request()
        requests.mine.infer([features.numpy()])
        return torch.from_numpy(requests.mine.get_output_tensor(0).data.copy())

    return call
