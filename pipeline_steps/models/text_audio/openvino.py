"""CPU inference with OpenVINO, in float32 or in 8-bit integers.

OpenVINO and NNCF send usage events unless their telemetry package cannot be imported. This module blocks its import.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline_steps.core.errors import ConfigError

log = logging.getLogger(__name__)

INSTALL = "pip install 'seeing-sound[openvino]'"
Forward = Callable[[torch.Tensor], torch.Tensor]


class ClapAudioTower(torch.nn.Module):
    """Part of a ClapModel that maps log-mel windows [N, 1, frames, bands] to unit vectors, as one function to compile."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        longer = torch.zeros(features.shape[0], 1, dtype=torch.bool)
        pooled: torch.Tensor = self.network.get_audio_features(input_features=features, is_longer=longer).pooler_output
        return pooled


def compile_model(network: torch.nn.Module, example: torch.Tensor, threads: int) -> Forward:
    """Function equal to `network` up to rounding, for inputs shaped like `example`. Thread-safe; a call uses one core.

    Raises:
        ConfigError: OpenVINO is not installed.
    """
    return _runnable(_converted(network, example), threads)


def quantize_int8(network: torch.nn.Module, example: torch.Tensor, calibration: Sequence[torch.Tensor], exact: str) -> bytes:
    """`network` with 8-bit weights and activations (post-training quantization of NNCF), serialized for `load_compiled`.

    Swin and other transformers have activations with large outliers in single channels. NNCF's transformer scheme moves these
    into the weights (SmoothQuant, Xiao et al. 2022, arXiv 2211.10438) and keeps layer norms, softmax and embeddings in float.

    Args:
        network: in float32.
        example: an input; the shape is fixed to it.
        calibration: inputs of that shape, which set the ranges of the activations.
        exact: regular expression; layers whose name it matches stay in float32.

    Raises:
        ConfigError: OpenVINO or NNCF is not installed.
    """
    openvino = _openvino()
    kind = logging.getLoggerClass()
    start = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()):  # NNCF writes logs and progress bars to standard output
        try:
            import nncf
        except ImportError as error:
            raise ConfigError("nncf is not installed, which embed.clap.backend openvino-int8 needs", INSTALL) from error
        finally:
            logging.setLoggerClass(kind)  # NNCF replaces it
        quantized = nncf.quantize(
            _converted(network, example),
            nncf.Dataset([inputs.numpy() for inputs in calibration]),
            subset_size=len(calibration),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(patterns=[f".*{exact}.*"]),
        )
    log.info("quantized the network on %d signals in %.0f s", len(calibration), time.monotonic() - start)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "graph.xml"
        openvino.serialize(quantized, path)
        graph, weights = path.read_bytes(), path.with_suffix(".bin").read_bytes()
    return len(graph).to_bytes(8, "big") + graph + weights


def load_compiled(block: bytes, threads: int) -> Forward:
    """Function of a network that `quantize_int8` serialized. Thread-safe; a call uses one core.

    Raises:
        ConfigError: OpenVINO is not installed.
    """
    openvino = _openvino()
    end = 8 + int.from_bytes(block[:8], "big")
    return _runnable(openvino.Core().read_model(block[8:end], block[end:]), threads)


def _openvino() -> Any:
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # makes it not importable
    try:
        import openvino
    except ImportError as error:
        raise ConfigError("openvino is not installed, which embed.clap.backend needs", INSTALL) from error
    return openvino


def _converted(network: torch.nn.Module, example: torch.Tensor) -> Any:
    """OpenVINO graph of `network`, in float32."""
    openvino = _openvino()
    trace: Any = torch.jit.trace  # untyped in torch
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Converting a tensor to a Python")  # branches on the input shape, which is fixed
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = trace(network.eval(), example, strict=False, check_trace=False)
        return openvino.convert_model(traced, example_input=example, input=list(example.shape))


def _runnable(graph: Any, threads: int) -> Forward:
    options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    model = _openvino().Core().compile_model(graph, "CPU", options)
    requests = threading.local()

    def call(features: torch.Tensor) -> torch.Tensor:
        if not hasattr(requests, "mine"):
            requests.mine = model.create_infer_request()
        requests.mine.infer([features.numpy()])
        return torch.from_numpy(requests.mine.get_output_tensor(0).data.copy())

    return call
