"""Converters from checked wheel members to the files in `data/assets`. No code of a wheel is executed.

Batch normalisation is folded into the convolution before it, which is exact up to rounding (about 1e-6). The networks then
consist of convolutions with a bias and have half as many tensors.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from pipeline_steps.assets.readers.tensorflow import read_bundle, read_frozen_graph
from pipeline_steps.assets.readers.tflite import CONV_2D, DEPTHWISE_CONV_2D, FULLY_CONNECTED, read_tflite
from pipeline_steps.core.errors import ConfigError, IntegrityError

Tensor = torch.Tensor
Tensors = dict[str, Tensor]

SafeGlobals = list[Callable[..., Any] | tuple[Callable[..., Any], str]]

_NUMPY_SCALAR: Any = np.int64(0).__reduce__()[0]  # the constructor under which numpy pickles a number
NUMPY_SCALARS: SafeGlobals = [
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    (np.dtype, "numpy.dtype"),
    np.dtypes.Int64DType,
]
"""Types besides tensors that a checkpoint with numpy scalars may contain."""


def fold_batch_norm(
    weight: Tensor, mean: Tensor, variance: Tensor, beta: Tensor, gamma: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Weight [out, ...] and bias [out] of a convolution followed by batch normalisation, in float64, returned as float32."""
    scale = torch.rsqrt(variance.double() + epsilon)
    if gamma is not None:
        scale = scale * gamma.double()
    folded = weight.double() * scale.reshape(-1, *([1] * (weight.ndim - 1)))
    return folded.float().contiguous(), (beta.double() - mean.double() * scale).float()


def _folded(target: Tensors, name: str, source: Mapping[str, Tensor], weight: str, norm: str, epsilon: float) -> None:
    """Fold torch's `weight` and `norm.*` of `source` into `target[name.weight]` and `target[name.bias]`."""
    target[f"{name}.weight"], target[f"{name}.bias"] = fold_batch_norm(
        source[weight],
        source[f"{norm}.running_mean"],
        source[f"{norm}.running_var"],
        source[f"{norm}.bias"],
        source[f"{norm}.weight"],
        epsilon,
    )


def _serialise(tensors: Tensors) -> bytes:
    """safetensors bytes; names are sorted, so equal tensors give equal bytes."""
    payload: bytes = save_safetensors({name: tensors[name].contiguous() for name in sorted(tensors)})
    return payload


def _torch_weights(payload: bytes, safe_globals: SafeGlobals | None = None) -> object:
    """`torch.load` restricted to tensors and the named numpy scalars; other types raise IntegrityError."""
    try:
        with torch.serialization.safe_globals(safe_globals or []):
            return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, LookupError, AttributeError, TypeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise IntegrityError(f"not a plain torch weights file: {first}", "check assets.toml") from error


def _state_dict(loaded: object) -> dict[str, Tensor]:
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise IntegrityError("the weights file does not contain a dictionary of tensors", "check assets.toml")
    return loaded


def yamnet(members: Mapping[str, bytes]) -> list[bytes]:
    """TensorFlow variable bundle + class map -> weights, class names."""
    layers: dict[int, dict[str, Tensor]] = {}
    for name, values in read_bundle(members["index"], members["data"]).items():
        match = re.search(r"_yamnet/layer_with_weights-(\d+)/(\w+)/", name)
        if match:
            layers.setdefault(int(match[1]), {})[match[2]] = torch.from_numpy(values.copy())
    order = iter(layers[index] for index in sorted(layers))
    tensors: Tensors = {}
    names = ["stem", *(f"blocks.{i}.{part}" for i in range(13) for part in ("depthwise", "pointwise"))]
    for name in names:
        layer, norm = next(order), next(order)
        if name.endswith("depthwise"):
            weight = layer["depthwise_kernel"].permute(2, 3, 0, 1)
        else:
            weight = layer["kernel"].permute(3, 2, 0, 1)
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = fold_batch_norm(
            weight, norm["moving_mean"], norm["moving_variance"], norm["beta"], None, 1e-4
        )
    classifier = next(order)
    tensors["classifier.weight"] = classifier["kernel"].T.contiguous()
    tensors["classifier.bias"] = classifier["bias"]
    return [_serialise(tensors), members["classes"].replace(b"\r\n", b"\n")]


def minilm(members: Mapping[str, bytes]) -> list[bytes]:
    """Published safetensors (checked, re-serialised without the unused pooler) + tokenizer."""
    tensors = load_safetensors(members["weights"])
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.") and tensor.is_floating_point()}
    return [_serialise(kept), members["tokenizer"]]


def efficientnet_lite0(members: Mapping[str, bytes]) -> list[bytes]:
    """torch state dict -> folded weights."""
    source = _state_dict(_torch_weights(members["weights"]))
    tensors: Tensors = {}
    _folded(tensors, "stem", source, "_conv_stem.weight", "_bn0", 1e-3)
    for index in range(16):
        block = f"_blocks.{index}"
        parts = [("depthwise", "_depthwise_conv", "_bn1"), ("project", "_project_conv", "_bn2")]
        if f"{block}._expand_conv.weight" in source:
            parts.append(("expand", "_expand_conv", "_bn0"))
        for part, convolution, norm in parts:
            _folded(tensors, f"blocks.{index}.{part}", source, f"{block}.{convolution}.weight", f"{block}.{norm}", 1e-3)
    _folded(tensors, "head", source, "_conv_head.weight", "_bn1", 1e-3)
    tensors["classifier.weight"], tensors["classifier.bias"] = source["_fc.weight"], source["_fc.bias"]
    return [_serialise(tensors)]


def efficientnet_lite3(members: Mapping[str, bytes]) -> list[bytes]:
    """Quantised TensorFlow Lite graph -> float weights; normalisation was folded in before it was quantised."""
    layers = iter(read_tflite(members["graph"]))
    names = ["stem", *(f"blocks.{i}.{part}" for i in range(24) for part in ("expand", "depthwise", "project"))]
    names = [name for name in names if name != "blocks.0.expand"] + ["head", "classifier"]
    tensors: Tensors = {}
    for name in names:
        layer = next(layers)
        part = name.rsplit(".", 1)[-1]
        expected = {"depthwise": DEPTHWISE_CONV_2D, "classifier": FULLY_CONNECTED}.get(part, CONV_2D)
        if layer.operator != expected or layer.weight.ndim != (2 if part == "classifier" else 4):
            raise IntegrityError(f"{name}: operator {layer.operator}, expected {expected}", "check the members in assets.toml")
        weight = torch.from_numpy(layer.weight)
        if expected == DEPTHWISE_CONV_2D:
            weight = weight.permute(3, 0, 1, 2)
        elif expected == CONV_2D:
            weight = weight.permute(0, 3, 1, 2)
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = weight.contiguous(), torch.from_numpy(layer.bias)
    if next(layers, None) is not None:
        raise IntegrityError("more layers than EfficientNet-Lite3 has", "check the members in assets.toml")
    return [_serialise(tensors)]


def label_list(members: Mapping[str, bytes]) -> list[bytes]:
    """One label a line, in class order -> the same with a final newline."""
    labels = [line.strip() for line in members["labels"].decode("utf-8").splitlines() if line.strip()]
    if len(labels) != 1000:
        raise IntegrityError(f"expected 1000 labels, found {len(labels)}", "check assets.toml")
    return ["".join(f"{label}\n" for label in labels).encode("utf-8")]


def ssd_mobilenet_v2(members: Mapping[str, bytes]) -> list[bytes]:
    """Frozen TensorFlow graph -> folded weights of backbone, extra layers and box predictors."""
    graph = {name: torch.from_numpy(values.copy()) for name, values in read_frozen_graph(members["graph"]).items()}
    root = "FeatureExtractor/MobilenetV2"
    units = {"stem": "Conv", "head": "Conv_1"}
    for index in range(17):
        block = "expanded_conv" if index == 0 else f"expanded_conv_{index}"
        units |= {f"blocks.{index}.{part}": f"{block}/{part}" for part in ("expand", "depthwise", "project")}
    del units["blocks.0.expand"]
    for extra, depth in zip(range(2, 6), (512, 256, 256, 128), strict=True):
        units[f"extra.{extra}.reduce"] = f"layer_19_1_Conv2d_{extra}_1x1_{depth // 2}"
        units[f"extra.{extra}.depthwise"] = f"layer_19_2_Conv2d_{extra}_3x3_s2_{depth}_depthwise"
        units[f"extra.{extra}.expand"] = f"layer_19_2_Conv2d_{extra}_3x3_s2_{depth}"
    tensors: Tensors = {}
    for name, source in units.items():
        prefix = f"{root}/{source}/"
        unit = {part.removeprefix(prefix): value for part, value in graph.items() if part.startswith(prefix)}
        norm = {part: unit[f"BatchNorm/{part}"] for part in ("moving_mean", "moving_variance", "beta", "gamma")}
        if "depthwise_weights" in unit:
            weight = unit["depthwise_weights"].permute(2, 3, 0, 1)
        else:
            weight = unit["weights"].permute(3, 2, 0, 1)
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = fold_batch_norm(
            weight, norm["moving_mean"], norm["moving_variance"], norm["beta"], norm["gamma"], 1e-3
        )
    for level in range(6):
        for name, source in (("boxes", "BoxEncodingPredictor"), ("classes", "ClassPredictor")):
            tensors[f"{name}.{level}.weight"] = graph[f"BoxPredictor_{level}/{source}/weights"].permute(3, 2, 0, 1).contiguous()
            tensors[f"{name}.{level}.bias"] = graph[f"BoxPredictor_{level}/{source}/biases"]
    return [_serialise(tensors)]


def augnet(members: Mapping[str, bytes]) -> list[bytes]:
    """torch state dict of a ResNet-50 -> folded weights."""
    loaded = _state_dict(_torch_weights(members["weights"]))
    source = {name.removeprefix("module.").removeprefix("pre."): tensor for name, tensor in loaded.items()}
    tensors: Tensors = {"head.weight": source["fc.weight"], "head.bias": source["fc.bias"]}
    _folded(tensors, "stem", source, "conv1.weight", "bn1", 1e-5)
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            for part in (1, 2, 3):
                _folded(tensors, f"{name}.{part}", source, f"{name}.conv{part}.weight", f"{name}.bn{part}", 1e-5)
            if block == 0:
                _folded(tensors, f"{name}.skip", source, f"{name}.downsample.0.weight", f"{name}.downsample.1", 1e-5)
    return [_serialise(tensors)]


def aisfx(members: Mapping[str, bytes]) -> list[bytes]:
    """(state dict, class counts) -> folded weights of the embedding network; the classifiers' class names do not ship."""
    loaded = _torch_weights(members["weights"], NUMPY_SCALARS)
    source = _state_dict(loaded[0] if isinstance(loaded, (tuple, list)) and loaded else loaded)
    tensors: Tensors = {}
    for block in range(1, 5):
        for part in (1, 2):
            prefix = f"embedding_net.conv_block{block}"
            _folded(tensors, f"block{block}.{part}", source, f"{prefix}.conv{part}.weight", f"{prefix}.bn{part}", 1e-5)
    return [_serialise(tensors)]


def copy(members: Mapping[str, bytes]) -> list[bytes]:
    """Members as they are, in the order of the manifest."""
    return list(members.values())


def half_precision(members: Mapping[str, bytes]) -> list[bytes]:
    """Floating-point tensors of one safetensors file in float16; other tensors as they are."""
    tensors = load_safetensors(members["weights"])
    halved = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    return [save_safetensors(dict(sorted(halved.items())), metadata={"format": "pt"})]


CONVERTERS: dict[str, Callable[[Mapping[str, bytes]], list[bytes]]] = {
    "yamnet": yamnet,
    "minilm": minilm,
    "efficientnet_lite0": efficientnet_lite0,
    "efficientnet_lite3": efficientnet_lite3,
    "label_list": label_list,
    "ssd_mobilenet_v2": ssd_mobilenet_v2,
    "augnet": augnet,
    "aisfx": aisfx,
    "copy": copy,
    "half_precision": half_precision,
}


def convert(converter: str, members: Mapping[str, bytes]) -> list[bytes]:
    """Run a converter by name.

    Raises:
        ConfigError: unknown converter.
        IntegrityError: the members are not those of the converter's network.
    """
    function = CONVERTERS.get(converter)
    if function is None:
        raise ConfigError(f"assets.toml: unknown converter {converter!r}", f"known: {', '.join(sorted(CONVERTERS))}")
    try:
        return function(members)
    except (KeyError, StopIteration, SafetensorError, UnicodeDecodeError) as error:
        raise IntegrityError(
            f"converter {converter}: {type(error).__name__} {error}", "check the members in assets.toml"
        ) from error
