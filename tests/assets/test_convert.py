"""Tests of the converters: folded weights, invalid members, pickles that run code."""

from __future__ import annotations

import io
import pickle

import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn

from pipeline_steps.assets.convert import CONVERTERS, convert, fold_batch_norm
from pipeline_steps.core.errors import ConfigError, IntegrityError


@pytest.mark.parametrize("affine", [True, False])
def test_folding_equals_convolution_then_normalisation(affine: bool) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(4, 6, 3, bias=False, groups=2)
    norm = nn.BatchNorm2d(6, eps=1e-3).eval()
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 2.0)
        norm.bias.normal_()
        if affine:
            norm.weight.uniform_(0.5, 2.0)
        inputs = torch.randn(2, 4, 9, 9)
        weight, bias = fold_batch_norm(
            convolution.weight, norm.running_mean, norm.running_var, norm.bias, norm.weight if affine else None, 1e-3
        )
        folded = torch.nn.functional.conv2d(inputs, weight, bias, groups=2)
        torch.testing.assert_close(folded, norm(convolution(inputs)), atol=1e-5, rtol=1e-5)


def test_labels_are_counted_and_normalised() -> None:
    labels = "\r\n".join(f"thing {i}" for i in range(1000)).encode()
    (payload,) = convert("label_list", {"labels": labels})
    assert payload.count(b"\n") == 1000
    assert b"\r" not in payload
    with pytest.raises(IntegrityError, match="expected 1000 labels, found 3"):
        convert("label_list", {"labels": b"a\nb\nc"})


def test_unknown_converter_and_missing_member() -> None:
    with pytest.raises(ConfigError, match="unknown converter 'rune'"):
        convert("rune", {})
    with pytest.raises(IntegrityError, match="yamnet"):
        convert("yamnet", {})


@pytest.mark.parametrize("converter", ["efficientnet_lite0", "augnet", "aisfx"])
def test_a_pickle_that_would_run_code_is_refused(converter: str) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, ("raise SystemExit('ran')",))

    buffer = io.BytesIO()
    torch.save({"weights": Payload()}, buffer)
    for payload in (buffer.getvalue(), pickle.dumps(Payload(), protocol=2), b"not a checkpoint", b""):
        with pytest.raises(IntegrityError):
            convert(converter, {"weights": payload})


@pytest.mark.parametrize("converter", ["efficientnet_lite0", "augnet", "aisfx"])
def test_a_checkpoint_of_another_network_is_refused(converter: str) -> None:
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, buffer)
    with pytest.raises(IntegrityError, match=converter):
        convert(converter, {"weights": buffer.getvalue()})


def test_half_precision_keeps_names_and_integers() -> None:
    weights = {"b": torch.randn(3, 2), "a": torch.arange(4)}
    (payload,) = CONVERTERS["half_precision"]({"weights": save_safetensors(weights)})
    halved = load_safetensors(payload)
    assert torch.equal(halved["b"], weights["b"].half())
    assert torch.equal(halved["a"], weights["a"])


def test_copy_keeps_bytes_and_order() -> None:
    assert CONVERTERS["copy"]({"z": b"1", "a": b"2"}) == [b"1", b"2"]
