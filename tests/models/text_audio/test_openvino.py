"""Backend openvino-int8 of `clap`: a quantized network of the real architecture, compared with float32."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline_steps.core.errors import ConfigError
from pipeline_steps.models.text_audio.int8_calibration import SIGNALS, calibration_signals
from tests.factories.checkpoints.clap import TEXTS, clap_checkpoint, clap_encoder

pytestmark = pytest.mark.full
pytest.importorskip("openvino")
pytest.importorskip("nncf")
RANDOM = np.random.default_rng(1)
LONG = (0.2 * RANDOM.standard_normal(1_000_000) * np.linspace(1, 0, 1_000_000)).astype(np.float32)
WINDOW = (0.1 * RANDOM.standard_normal(480_000)).astype(np.float32)
CLIPS = [(0.5 * np.sin(np.arange(30_000) / 9)).astype(np.float32), WINDOW, LONG]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clap_checkpoint(tmp_path_factory.mktemp("int8") / "clap")


@pytest.fixture(scope="module")
def network(folder: Path) -> bytes:
    return clap_encoder(folder, backend="openvino-int8").int8_network()


def test_vectors_are_near_float32_and_reproducible(folder: Path, network: bytes) -> None:
    exact = clap_encoder(folder).load()
    vectors = []
    for _ in range(2):
        encoder = clap_encoder(folder, backend="openvino-int8").load()
        encoder.adopt_int8_network(network)
        vectors.append(encoder.encode_audio(CLIPS))
        assert np.array_equal(encoder.encode_audio(CLIPS[1:2])[0], vectors[-1][1]), "in any batch"
    assert np.array_equal(*vectors)
    expected = exact.encode_audio(CLIPS)
    assert (expected * vectors[0]).sum(1).min() > 0.999
    assert np.abs(expected - vectors[0]).max() > 1e-5, "the network is quantized"
    assert np.array_equal(encoder.encode_texts(TEXTS), exact.encode_texts(TEXTS)), "texts do not change"


def test_weights_are_stored_in_a_byte_each(folder: Path, network: bytes) -> None:
    import openvino

    end = 8 + int.from_bytes(network[:8], "big")
    graph = openvino.Core().read_model(network[8:end], network[end:])
    counts: dict[str, int] = {}
    for node in graph.get_ops():
        if node.get_type_name() == "Constant" and len(node.get_output_shape(0)) == 2:
            kind = node.get_output_element_type(0).get_type_name()
            counts[kind] = counts.get(kind, 0) + int(np.prod(node.get_output_shape(0)))
    assert counts["i8"] > 4 * counts["f32"], "float32 are the last two layers and the biases of positions"


def test_fingerprints_differ_between_backends(folder: Path) -> None:
    sides = {backend: clap_encoder(folder, backend=backend) for backend in ("torch", "openvino", "openvino-int8")}
    marks = [side.describe_audio() for side in sides.values()]
    assert all(one != other for place, one in enumerate(marks) for other in marks[:place])
    assert sides["openvino-int8"].describe_texts() == sides["torch"].describe_texts()


def test_without_nncf_the_error_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    encoder = clap_encoder(folder, backend="openvino-int8").load()
    assert len(encoder.encode_texts(TEXTS)) == len(TEXTS), "texts need no quantized network"
    with pytest.raises(ConfigError, match=r"nncf.*not installed") as caught:
        encoder.encode_audio(CLIPS[:1])
    assert "seeing-sound[openvino]" in str(caught.value.action)


def test_calibration_signals_are_fixed_and_span_silence_to_full_scale() -> None:
    made, again = list(calibration_signals(48_000, 48_000)), list(calibration_signals(48_000, 48_000))
    assert len(made) == SIGNALS
    assert all(np.array_equal(one, other) for one, other in zip(made, again, strict=True))
    peaks = np.array([np.abs(one).max() for one in made])
    assert np.isfinite(np.stack(made)).all()
    assert peaks.max() <= 1.0
    assert peaks.max() > 0.5
    assert peaks.min() == 0.0
    assert len({one.tobytes() for one in made}) == SIGNALS


def test_quantization_is_reproducible_sends_no_telemetry_and_writes_no_standard_output(
    folder: Path, network: bytes, tmp_path: Path
) -> None:
    program = f"""
import logging, pathlib, sys
from tests.factories.checkpoints.clap import clap_encoder
kind = logging.getLoggerClass()
made = clap_encoder({str(folder)!r}, backend="openvino-int8").int8_network()
import nncf, openvino.tools.ovc as ovc
told = [type(nncf.telemetry.telemetry).__module__, type(ovc.telemetry).__module__]
assert told == ["unittest.mock", "openvino.tools.ovc.telemetry_stub"], told
assert "openvino_telemetry.main" not in sys.modules and logging.getLoggerClass() is kind
pathlib.Path({str(tmp_path / "network")!r}).write_bytes(made)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    encoder = clap_encoder(folder, backend="openvino-int8").load()
    vectors = []
    for block in (network, (tmp_path / "network").read_bytes()):
        encoder.adopt_int8_network(block)
        vectors.append(encoder.encode_audio(CLIPS[:2]))
    assert np.array_equal(*vectors)
