"""The exported model: a folder in the diffusers layout, checked by hash and shape; and training checkpoints.

    models/audio2image/
      model_index.json                 what each folder holds, drawing defaults, sha256 of every weight file
      unet/        config.json, diffusion_pytorch_model.safetensors     (UNet2DConditionModel.from_pretrained reads it)
      scheduler/   scheduler_config.json                                (FlowMatchEulerDiscreteScheduler)
      codec/       config.json, model.safetensors
      conditioner/ config.json, model.safetensors
      composer/    config.json, model.safetensors                       (the MLP over all latents)
      prior/       config.json, model.safetensors                       (mean and covariance of the latents)
      encoder/     meta.json, yamnet.safetensors, audioset_classes.csv  (copied from the assets: the folder is whole)

Nothing here is ever unpickled but plain tensors and numbers (`weights_only=True`), and no class is named by a file: what a
folder holds is decided by this module, the files only fill in numbers.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn

from pipeline_steps.core.atomic import atomic_path, write_bytes, write_json
from pipeline_steps.core.errors import DataError, IntegrityError
from pipeline_steps.core.hashing import sha256_bytes
from pipeline_steps.diffusion.audio_conditioner import AudioConditioner
from pipeline_steps.diffusion.autoencoder import CODECS, Codec
from pipeline_steps.diffusion.denoiser import TIMESTEPS, Denoiser
from pipeline_steps.diffusion.gaussian_prior import GaussianDenoiser
from pipeline_steps.diffusion.mlp_denoiser import MLPDenoiser
from pipeline_steps.models.audio.yamnet import YamNet
from pipeline_steps.models.bundled_weights import META

INDEX = "model_index.json"
FORMAT = 1
SCRATCH_CLASS = "Audio2ImagePipeline"
ADAPTER_CLASS = "AudioAdapterPipeline"
"""`_class_name` of an exported model by recipe."""
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
UNET_KEYS = (
    "sample_size",
    "in_channels",
    "out_channels",
    "block_out_channels",
    "down_block_types",
    "up_block_types",
    "layers_per_block",
    "cross_attention_dim",
    "attention_head_dim",
    "norm_num_groups",
    "class_embed_type",
    "projection_class_embeddings_input_dim",
    "resnet_time_scale_shift",
)
"""Settings of the U-Net that are read back; any other key of its config.json is ignored."""
PREDICTIONS = ("residual", "velocity")
RETRAIN = "run: dvc repro --force train"
BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}


def save_model(
    folder: Path,
    denoiser: Denoiser,
    codec: Codec,
    scheduler: FlowMatchEulerDiscreteScheduler,
    defaults: dict[str, Any],
    assets: Path,
) -> None:
    """Write the model into `folder` (which must be new or scratch); `model_index.json` last, as the mark of completeness."""
    hashes: dict[str, str] = {}

    def weights(name: str, module: nn.Module) -> None:
        state = {key: value.detach().cpu().contiguous() for key, value in sorted(module.state_dict().items())}
        payload = save_safetensors(state, metadata={"format": "pt"})
        hashes[name] = sha256_bytes(payload)
        write_bytes(folder / name, payload)

    unet_config = {key: denoiser.unet.config[key] for key in UNET_KEYS}
    write_json(folder / "unet/config.json", {"_class_name": "UNet2DConditionModel", **unet_config})
    weights(UNET_WEIGHTS, denoiser.unet)
    write_json(
        folder / "scheduler/scheduler_config.json",
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": TIMESTEPS, "shift": scheduler.config.shift},
    )
    write_json(folder / "codec/config.json", {"kind": codec.name, "version": codec.version, "settings": codec.settings})
    weights("codec/model.safetensors", codec)
    write_json(folder / "conditioner/config.json", {"kind": "audio", "settings": denoiser.conditioner.settings})
    weights("conditioner/model.safetensors", denoiser.conditioner)
    write_json(folder / "composer/config.json", {"kind": "mlp", "settings": denoiser.composer.settings})
    weights("composer/model.safetensors", denoiser.composer)
    write_json(folder / "prior/config.json", {"kind": "gaussian", "settings": denoiser.prior.settings})
    weights("prior/model.safetensors", denoiser.prior)
    copy_encoder_weights(assets, folder / "encoder")
    index = {
        "_class_name": SCRATCH_CLASS,
        "format": FORMAT,
        "prediction": denoiser.prediction,
        "defaults": defaults,
        "sha256": hashes,
    }
    write_json(folder / INDEX, index)


def copy_encoder_weights(assets: Path, target: Path) -> None:
    """YAMNet's files with their recorded hashes, so that the exported folder is whole."""
    meta = json.loads((assets / META).read_text(encoding="utf-8"))
    for file in YamNet.files:
        with atomic_path(target / file) as temporary:
            shutil.copyfile(assets / file, temporary)
    write_json(target / META, {"files": {file: {"sha256": meta["files"][file]["sha256"]} for file in YamNet.files}})


def read_class_name(folder: Path) -> str:
    """`_class_name` of an exported folder's index.

    Raises:
        DataError: there is no index.
        IntegrityError: it is no index.
    """
    return str(read_json(folder / INDEX).get("_class_name"))


def read_model_index(folder: Path, kind: str) -> dict[str, Any]:
    """The index of an exported folder of one kind.

    Raises:
        DataError: it is missing.
        IntegrityError: it describes something else.
    """
    index = read_json(folder / INDEX)
    if index.get("_class_name") != kind or index.get("format") != FORMAT:
        raise IntegrityError(f"{folder / INDEX} is not a model of format {FORMAT}", RETRAIN)
    return index


def load_model(folder: Path) -> tuple[Denoiser, Codec, dict[str, Any]]:
    """Denoiser, codec and the index of a folder that `save_model` wrote; nothing is moved to a device.

    Raises:
        DataError: the folder or a file is missing.
        IntegrityError: a hash, key or shape differs, or a configuration holds what it must not.
    """
    index = read_model_index(folder, SCRATCH_CLASS)
    unet_config = read_json(folder / "unet/config.json")
    blocks = {*_strings(unet_config, "down_block_types"), *_strings(unet_config, "up_block_types")}
    if not blocks <= BLOCKS:
        raise IntegrityError(f"{folder / 'unet/config.json'} names unknown blocks {sorted(blocks - BLOCKS)}", RETRAIN)
    codec_config = read_json(folder / "codec/config.json")
    kind = codec_config.get("kind")
    if kind not in CODECS:
        raise IntegrityError(f"{folder / 'codec/config.json'}: unknown codec {kind!r}", RETRAIN)
    if index.get("prediction") not in PREDICTIONS:
        raise IntegrityError(f"{folder / INDEX}: unknown prediction {index.get('prediction')!r}", RETRAIN)

    def build(name: str, make: Callable[..., Any], settings: dict[str, Any]) -> Any:
        try:
            return make(**settings)
        except (TypeError, ValueError, RuntimeError) as error:
            raise IntegrityError(f"{folder / name}: settings do not make a model: {error}", RETRAIN) from error

    conditioner_config = read_json(folder / "conditioner/config.json")
    codec = build("codec/config.json", CODECS[str(kind)], dict(codec_config.get("settings", {})))
    conditioner = build("conditioner/config.json", AudioConditioner, dict(conditioner_config.get("settings", {})))
    composer_config = read_json(folder / "composer/config.json")
    composer = build("composer/config.json", MLPDenoiser, dict(composer_config.get("settings", {})))
    prior_config = read_json(folder / "prior/config.json")
    prior = build("prior/config.json", GaussianDenoiser, dict(prior_config.get("settings", {})))
    unet = build("unet/config.json", UNet2DConditionModel, {key: unet_config[key] for key in UNET_KEYS if key in unet_config})
    hashes = index.get("sha256", {})
    for name, module in (
        (UNET_WEIGHTS, unet),
        ("codec/model.safetensors", codec),
        ("conditioner/model.safetensors", conditioner),
        ("composer/model.safetensors", composer),
        ("prior/model.safetensors", prior),
    ):
        load_weights(folder / name, module, hashes.get(name, ""))
    return Denoiser(unet, conditioner, composer, prior, index["prediction"]), codec, index


def load_weights(path: Path, module: nn.Module, sha256: str = "") -> None:
    """Fill `module` from a safetensors file; keys and shapes must agree exactly.

    Raises:
        DataError: the file is missing.
        IntegrityError: wrong hash, not safetensors, a missing or unknown key, another shape.
    """
    tensors = read_weights(path, sha256)
    check_weights(path, tensors, module.state_dict())
    module.load_state_dict(tensors)


def read_weights(path: Path, sha256: str = "") -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file.

    Raises:
        DataError: the file is missing.
        IntegrityError: wrong hash, or not safetensors.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing", RETRAIN)
    payload = path.read_bytes()
    if sha256 and sha256_bytes(payload) != sha256:
        raise IntegrityError(f"{path}: sha256 expected {sha256}, got {sha256_bytes(payload)}", RETRAIN)
    try:
        tensors: dict[str, torch.Tensor] = load_safetensors(payload)
    except SafetensorError as error:
        raise IntegrityError(f"{path} is not a safetensors file: {error}", RETRAIN) from error
    return tensors


def check_weights(path: Path, tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Refuse tensors that are not exactly the expected ones by key and shape.

    Raises:
        IntegrityError: a missing or unknown key, or another shape.
    """
    for key in sorted(expected.keys() | tensors.keys()):
        if key not in tensors or key not in expected:
            raise IntegrityError(f"{path}: key {key} is {'missing' if key in expected else 'unknown'}", RETRAIN)
        if tensors[key].shape != expected[key].shape:
            raise IntegrityError(
                f"{path}: {key} has shape {list(tensors[key].shape)}, not {list(expected[key].shape)}", RETRAIN
            )


def save_weights(path: Path, module: nn.Module) -> None:
    """Write a module's state as safetensors, atomically."""
    write_bytes(path, save_safetensors({key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}))


def new_scheduler(shift: float) -> FlowMatchEulerDiscreteScheduler:
    """Euler steps along the flow; sigma becomes shift sigma / (1 + (shift - 1) sigma) (arXiv 2403.03206, eq. 23)."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEPS, shift=shift)


def load_scheduler(folder: Path) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler that the folder describes."""
    return new_scheduler(float(read_json(folder / "scheduler/scheduler_config.json").get("shift", 1.0)))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of an exported folder.

    Raises:
        DataError: it is missing.
        IntegrityError: it is no JSON object, or asks for foreign code.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing", "run: dvc repro train")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise IntegrityError(f"{path} is not JSON: {error}", RETRAIN) from error
    if not isinstance(value, dict):
        raise IntegrityError(f"{path} must hold an object", RETRAIN)
    for key in ("auto_map", "trust_remote_code", "_instantiator"):
        if key in json.dumps(value):
            raise IntegrityError(f"{path} asks for foreign code ({key})", "use a model that this program exported")
    return value


def _strings(config: dict[str, Any], key: str) -> list[str]:
    value = config.get(key, [])
    return [str(item) for item in value] if isinstance(value, list) else ["?"]


class AtomicCheckpointIO(TorchCheckpointIO):  # type: ignore[misc, unused-ignore]
    """Training checkpoints: written beside their place and renamed, read without unpickling anything but plain types."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; an interruption leaves the previous one."""
        with atomic_path(Path(path)) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            IntegrityError: damaged, or holding anything but tensors and plain types.
        """
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A training checkpoint, on the CPU.

    Raises:
        DataError: it is missing.
        IntegrityError: damaged, holding anything but tensors and plain types, or naming code to be run.
    """
    if not path.is_file():
        raise DataError(f"checkpoint {path} is missing", "remove `resume_from` or give a checkpoint of this configuration")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise IntegrityError(f"checkpoint {path} is not a plain checkpoint: {first}", f"remove {path} and run again") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise IntegrityError(f"checkpoint {path} holds no state_dict", f"remove {path} and run again")
    hyper = checkpoint.get("hyper_parameters", {})
    if "_instantiator" in checkpoint or (isinstance(hyper, dict) and "_instantiator" in hyper):
        raise IntegrityError(f"checkpoint {path} names code to be run (_instantiator)", f"remove {path} and run again")
    return checkpoint
