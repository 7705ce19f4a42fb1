"""Reading and writing of exported models: safetensors checked by hash, key and shape, JSON checked for foreign code.

Nothing is unpickled and a file cannot name a class: the code decides what a folder contains, and the files supply numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from pipeline_steps.core.atomic import write_bytes, write_json
from pipeline_steps.core.checksums import check_digest, read_verified
from pipeline_steps.core.errors import DataError, IntegrityError
from pipeline_steps.core.hashing import sha256_bytes
from pipeline_steps.models.audio.yamnet import YamNet
from pipeline_steps.models.bundled_weights import META

INDEX = "model_index.json"
FORMAT = 2
RETRAIN = "run: dvc repro --force train"


def copy_encoder_weights(assets: Path, target: Path) -> None:
    """Copy YAMNet's files and their recorded hashes into an exported folder."""
    meta = json.loads(read_verified(assets / META))
    for file in YamNet.files:
        write_bytes(target / file, read_verified(assets / file))
    write_json(target / META, {"files": {file: {"sha256": meta["files"][file]["sha256"]} for file in YamNet.files}})


def write_weights(path: Path, state: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> str:
    """Write tensors, sorted by key, as safetensors; return the sha256 of the file. `dtype` None keeps their types."""
    tensors = {key: value.detach().cpu().to(dtype or value.dtype).contiguous() for key, value in sorted(state.items())}
    payload = save_safetensors(tensors, metadata={"format": "pt"})
    write_bytes(path, payload)
    return sha256_bytes(payload)


def read_model_index(folder: Path, class_name: str) -> dict[str, Any]:
    """Index of an exported folder.

    Raises:
        DataError: the index is missing.
        IntegrityError: the index has another class or format.
    """
    index = read_json(folder / INDEX)
    if index.get("_class_name") != class_name or index.get("format") != FORMAT:
        raise IntegrityError(f"{folder / INDEX}: not a {class_name} of format {FORMAT}", RETRAIN)
    return index


def read_weights(path: Path, sha256: str = "") -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file.

    Raises:
        DataError: the file is missing.
        IntegrityError: wrong hash, or not safetensors.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing", RETRAIN)
    payload = path.read_bytes()
    found = sha256_bytes(payload)
    check_digest(path, found)
    if sha256 and found != sha256:
        raise IntegrityError(f"{path}: sha256 is {found}, expected {sha256}", RETRAIN)
    try:
        tensors: dict[str, torch.Tensor] = load_safetensors(payload)
    except SafetensorError as error:
        raise IntegrityError(f"{path}: not a safetensors file: {error}", RETRAIN) from error
    return tensors


def check_weights(path: Path, tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Check that keys and shapes are the expected ones.

    Raises:
        IntegrityError: a missing or unknown key, or another shape.
    """
    for key in sorted(expected.keys() | tensors.keys()):
        if key not in tensors or key not in expected:
            raise IntegrityError(f"{path}: key {key} is {'missing' if key in expected else 'unknown'}", RETRAIN)
        if tensors[key].shape != expected[key].shape:
            raise IntegrityError(
                f"{path}: {key} has shape {list(tensors[key].shape)}, expected {list(expected[key].shape)}", RETRAIN
            )


def read_json(path: Path) -> dict[str, Any]:
    """JSON object of an exported folder.

    Raises:
        DataError: the file is missing.
        IntegrityError: the file is not a JSON object, or requests foreign code.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing", "run: dvc repro train")
    try:
        value = json.loads(read_verified(path))
    except ValueError as error:
        raise IntegrityError(f"{path}: not JSON: {error}", RETRAIN) from error
    if not isinstance(value, dict):
        raise IntegrityError(f"{path}: not a JSON object", RETRAIN)
    for key in ("auto_map", "trust_remote_code", "_instantiator"):
        if key in json.dumps(value):
            raise IntegrityError(f"{path}: requests foreign code ({key})", "use a model exported by this program")
    return value
