"""The exported adapter: what was trained, and by which frozen models it must be completed.

    models/audio2image/
      model_index.json            drawing defaults, prompt, references to backbone and encoder, sha256 of every weight file
      ip_adapter.safetensors      IP-Adapter layout: stock `load_ip_adapter` reads it
      resampler/                  config.json, model.safetensors: the resampler up to the embeddings
      scheduler/                  scheduler_config.json of the solver that draws
      encoder/                    YAMNet, or the AST checkpoint if it is a small local folder
      backbone/                   the backbone, if it is a small local folder

A frozen model is named, not copied: by hub id and commit, or by its folder and the sha256 of its files. Only a local folder of
at most 100 MB is copied, so that small models travel whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from safetensors.torch import save as save_safetensors

from pipeline_steps.core.atomic import atomic_path, write_bytes, write_json
from pipeline_steps.core.errors import DataError, IntegrityError
from pipeline_steps.core.identity import sha256_bytes
from pipeline_steps.diffusion.adapter import AudioAdapter
from pipeline_steps.diffusion.backbone import FILES as BACKBONE_FILES
from pipeline_steps.diffusion.backbone import Backbone
from pipeline_steps.diffusion.grids import AstGrids, GridEncoder, YamNetGrids
from pipeline_steps.diffusion.resampler import TokenResampler
from pipeline_steps.diffusion.storage import (
    ADAPTER_CLASS,
    FORMAT,
    INDEX,
    RETRAIN,
    check_weights,
    copy_yamnet,
    read_index,
    read_json,
    read_weights,
)
from pipeline_steps.encoders.ast_tokens import AstTokens
from pipeline_steps.encoders.checkpoint import FILES as ENCODER_FILES
from pipeline_steps.encoders.yamnet import YamNet

IP_ADAPTER = "ip_adapter.safetensors"
RESAMPLER = "resampler/model.safetensors"
COPY_LIMIT = 100_000_000
"""Bytes up to which a local folder is copied into the export."""
MODELS_VARIABLE = "SONIFY_MODELS"
"""Environment: folder in which the local folders that an export names are looked up; else the project that holds the export."""
SOLVERS = {"DPMSolverMultistepScheduler": DPMSolverMultistepScheduler, "DDIMScheduler": DDIMScheduler}


def save_adapter(
    folder: Path, adapter: AudioAdapter, scheduler: Any, encoder: GridEncoder, defaults: dict[str, Any], assets: Path
) -> None:
    """Write the adapter into `folder` (which must be new or scratch); `model_index.json` last, as the mark of completeness."""
    hashes: dict[str, str] = {}
    for name, state in ((IP_ADAPTER, adapter.ip_adapter()), (RESAMPLER, adapter.gathering())):
        kept = {key: value.detach().float().cpu().contiguous() for key, value in sorted(state.items())}
        payload = save_safetensors(kept, metadata={"format": "pt"})
        hashes[name] = sha256_bytes(payload)
        write_bytes(folder / name, payload)
    write_json(folder / "resampler/config.json", {"kind": "perceiver", "settings": adapter.resampler.settings})
    scheduler.save_pretrained(folder / "scheduler")
    backbone = adapter.backbone
    named = _named(backbone, BACKBONE_FILES, folder / "backbone")
    if isinstance(encoder, AstGrids):
        heard = {**_named(encoder.encoder, ENCODER_FILES, folder / "encoder"), "precision": encoder.encoder.precision}
    else:
        copy_yamnet(assets, folder / "encoder")
        heard = {"kind": "copy"}
    index = {
        "_class_name": ADAPTER_CLASS,
        "format": FORMAT,
        "prompt": adapter.prompt,
        "backbone": named,
        "encoder": {"name": encoder.name, **heard},
        "defaults": defaults,
        "sha256": hashes,
    }
    write_json(folder / INDEX, index)


def _named(part: Backbone | AstTokens, files: Sequence[str], target: Path) -> dict[str, str]:
    """Reference to a frozen model; a small local folder is copied to `target`."""
    folder, known = part.fetch(), part.describe()
    if "sha256" not in known:
        return {"kind": "hub", "model": part.model, "revision": part.revision}
    paths = sorted({path for pattern in files for path in folder.glob(pattern)})
    if sum(path.stat().st_size for path in paths) > COPY_LIMIT:
        return {"kind": "folder", "model": part.model, "revision": known["sha256"]}
    for path in paths:
        with atomic_path(target / path.relative_to(folder)) as temporary:
            shutil.copyfile(path, temporary)
    return {"kind": "copy", "revision": known["sha256"]}


def load_adapter(folder: Path, dtype: torch.dtype) -> tuple[AudioAdapter, Any, GridEncoder, dict[str, Any]]:
    """Adapter in its backbone (on the CPU, frozen weights of `dtype`), scheduler, encoder and index of an exported folder.

    Raises:
        DataError: the folder, a file, or a folder that it names is missing.
        IntegrityError: a hash, key or shape differs, or a configuration holds what it must not.
        ServiceError: a named hub model is neither in the hub's cache nor to be fetched.
    """
    index = read_index(folder, ADAPTER_CLASS)
    settings = dict(read_json(folder / "resampler/config.json").get("settings", {}))
    schedule = read_json(folder / "scheduler/scheduler_config.json")
    solver = SOLVERS.get(str(schedule.get("_class_name")))
    if solver is None:
        raise IntegrityError(f"{folder}: unknown scheduler {schedule.get('_class_name')!r}", RETRAIN)
    backbone = Backbone(**_place(folder, "backbone", index), dtype=dtype, key="backbone").load()
    try:
        resampler = TokenResampler(**settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise IntegrityError(f"{folder / 'resampler/config.json'}: settings do not make a model: {error}", RETRAIN) from error
    adapter = AudioAdapter(backbone, resampler, str(index.get("prompt", "")))
    hashes = index.get("sha256", {})
    for name, state in ((IP_ADAPTER, adapter.ip_adapter()), (RESAMPLER, adapter.gathering())):
        tensors = read_weights(folder / name, hashes.get(name, ""))
        check_weights(folder / name, tensors, state)
        with torch.no_grad():
            for key, value in tensors.items():
                state[key].copy_(value)
    return adapter, solver.from_config(schedule), _encoder(folder, index), index


def _encoder(folder: Path, index: dict[str, Any]) -> GridEncoder:
    known = index.get("encoder", {})
    if known.get("name") == YamNetGrids.name:
        return YamNetGrids(YamNet(folder / "encoder"))
    if known.get("name") != AstGrids.name:
        raise IntegrityError(f"{folder / INDEX}: unknown encoder {known.get('name')!r}", RETRAIN)
    return AstGrids(AstTokens(**_place(folder, "encoder", index), precision=str(known.get("precision")), key="encoder"))


def _place(folder: Path, part: str, index: dict[str, Any]) -> dict[str, Any]:
    """Arguments that name a frozen model: where it lies and what it must be."""
    known = index.get(part, {})
    revision = str(known.get("revision", ""))
    if known.get("kind") == "copy":
        return {"model": str(folder / part), "revision": revision}
    model = str(known.get("model", ""))
    if known.get("kind") == "hub":
        return {"model": model, "revision": revision}
    root = Path(os.environ.get(MODELS_VARIABLE) or folder.resolve().parents[1])
    if not (root / model).is_dir():
        raise DataError(
            f"{folder / INDEX}: {part} is the folder {model} (sha256 {revision}), which is not in {root}",
            f"put it there, or set {MODELS_VARIABLE} to the folder that holds it",
        )
    return {"model": str(root / model), "revision": revision}
