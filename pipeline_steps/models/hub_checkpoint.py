"""Published checkpoints: fetched by a pinned commit or read from a folder, and checked before anything of them is loaded."""

from __future__ import annotations

import json
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from pipeline_steps.core.checksums import verified_sha256
from pipeline_steps.core.errors import ConfigError, IntegrityError, ResourceError, ServiceError
from pipeline_steps.core.hashing import sha256_bytes
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.models.pickled_weights import PICKLED_FILES, converted_checkpoint, pickled_shards

FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
"""What is fetched and hashed: configurations, weights that cannot run code, vocabularies, chat templates."""

COMMIT = re.compile(r"[0-9a-f]{40}")


class HubModel(ABC):
    """Published network, by hub id and commit or by folder. Fetching it and loading its weights are separate steps.

    Weights that exist only as `pytorch_model.bin` are converted to safetensors once, into `.cache/checkpoints` of the project.

    Args:
        model: hub id or local folder.
        revision: commit of a hub id; sha256 of a folder, checked when given.
        key: of params.yaml, for messages.
        root: project folder; a relative `model` is resolved against it.
    """

    files: ClassVar[Sequence[str]] = FILES
    """Patterns of what is fetched and hashed."""

    def __init__(self, model: str, revision: str, key: str, root: Path = Path()) -> None:
        self.model, self.revision, self.key, self.root = model, revision, key, Path(root)
        self._folder: Path | None = None
        self._identity: dict[str, str] = {}

    def fetch(self) -> Path:
        """Folder of the checkpoint, fetched if necessary, and checked; weights are not loaded. A second call does nothing.

        Raises:
            ConfigError: a checkpoint of another kind.
            IntegrityError: it asks for code to be run, has no weights, or differs from the revision.
        """
        if self._folder is None:
            model = resolve_model_path(self.model, self.root)
            folder = fetch_checkpoint(model, self.revision, self.key, self.files)
            files = self.files
            if pickled_shards(folder) and not any(folder.glob("*.safetensors")):
                files = (*files, *PICKLED_FILES)
                reject_remote_code(folder)
            self._identity = identity(model, self.revision, folder, self.key, files)
            if files is not self.files:
                cache = ProjectPaths(self.root).converted_checkpoints
                digest = self._identity.get("sha256") or folder_digest(folder, files)
                folder = converted_checkpoint(folder, digest, self.files, cache, self.key)
            self._accept(folder)
            self._folder = folder
        return self._folder

    @property
    def identity(self) -> dict[str, str]:
        """Hub id and commit, or a folder's digest; never a path."""
        self.fetch()
        return self._identity

    @abstractmethod
    def _accept(self, folder: Path) -> None:
        """Refuse a checkpoint of another kind; keep what its configuration says."""


def fetch_checkpoint(model: str, revision: str, key: str, files: Sequence[str] = FILES) -> Path:
    """Folder of a checkpoint: `model` itself if it is one, else the hub's snapshot of that commit (kept in the hub's cache).

    Of a checkpoint without safetensors, `pytorch_model.bin` is fetched instead.

    Args:
        model: local folder or hub id.
        revision: commit of a hub id, 40 hex digits: a branch could change while results are cached.
        key: of params.yaml, for messages.
        files: patterns of what is fetched.

    Raises:
        ConfigError: the revision is no commit, or the hub knows no such model.
        ServiceError: the hub cannot be reached and the snapshot is not in its cache.
    """
    if Path(model).is_dir():
        return Path(model)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise ConfigError(f"{key}.model: {model} is neither a folder nor a hub id", "write owner/name or the path of a folder")
    if not COMMIT.fullmatch(revision):
        raise ConfigError(
            f"{key}.revision: {revision!r} is not a commit", "pin the 40 hex digits that the model's page shows under history"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=list(files)))
        if "*.safetensors" in files and not any(folder.glob("*.safetensors")):
            snapshot_download(model, revision=revision, allow_patterns=list(PICKLED_FILES))
        return folder
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ConfigError(
            f"{key}.model: the hub has no {model} at {revision}", "check both; a gated model needs HF_TOKEN"
        ) from error
    except Exception as error:  # the errors of the HTTP library that huggingface_hub uses, which changes between releases
        raise ServiceError(
            f"{key}.model: {model} cannot be fetched: {type(error).__name__}",
            "connect to the hub, or name a local folder with the same files",
            transient=True,
        ) from error


def resolve_model_path(model: str, root: Path) -> str:
    """`model` as `fetch_checkpoint` takes it: the folder below `root` if there is one of that name, else what was given."""
    place = root / model
    return str(place) if place.is_dir() else model


def resolve_device(device: str, key: str) -> str:
    """`cuda` or `cpu`; `auto` selects the GPU where there is one.

    Raises:
        ResourceError: a GPU is asked for and none is usable.
    """
    import torch

    usable = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if usable else "cpu"
    if device == "cuda" and not usable:
        raise ResourceError(f"{key}.device is cuda and no GPU is usable", "set it to auto or cpu, or check the driver")
    return device


def resolve_dtype(precision: str, device: str) -> str:
    """`bfloat16` or `float32`; `auto` selects bfloat16 on a GPU that computes with it and does not emulate it."""
    if precision != "auto":
        return precision
    import torch

    return "bfloat16" if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"


def reject_remote_code(folder: Path) -> None:
    """Refuse a folder whose JSON files request that code of the checkpoint is run.

    Raises:
        IntegrityError: `auto_map` or `trust_remote_code` anywhere in a JSON file, or an unreadable file.
    """
    for path in sorted(folder.glob("*.json")):
        if path.name in {"tokenizer.json", "vocab.json"}:  # vocabularies: any word may be a key there
            continue
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise IntegrityError(f"{path}: not readable JSON: {str(error)[:120]}", "fetch the checkpoint again") from error
        key = _code_key(value)
        if key:
            raise IntegrityError(
                f"{path}: {key} asks for code of the checkpoint to be run; nothing was imported",
                "choose a checkpoint of an architecture that transformers itself knows",
            )


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """Refuse a folder that asks for code to be run or has no safetensors; returns its `config.json`.

    Raises:
        IntegrityError: as `reject_remote_code`, or no safetensors, or no usable `config.json`.
    """
    reject_remote_code(folder)
    if not (folder / "config.json").is_file():
        raise IntegrityError(f"{folder}: config.json is missing", "name the folder that save_pretrained wrote")
    if not any(folder.glob("*.safetensors")):
        raise IntegrityError(
            f"{folder}: no safetensors and no pytorch_model.bin", "fetch the checkpoint again, or choose one with safetensors"
        )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise IntegrityError(f"{folder / 'config.json'} is not an object", "fetch the checkpoint again")
    return config


def _code_key(value: Any) -> str:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in {"auto_map", "custom_pipelines", "trust_remote_code"} and inner:
                return str(key)
            if found := _code_key(inner):
                return found
    elif isinstance(value, list):
        for inner in value:
            if found := _code_key(inner):
                return found
    return ""


def folder_digest(folder: Path, files: Sequence[str] = FILES) -> str:
    """sha256 over names and contents of the files that determine an output; the path of the folder does not matter.

    Raises:
        IntegrityError: a file of an out of the project is damaged.
    """
    paths = sorted({path for pattern in files for path in folder.glob(pattern) if path.is_file()})
    named = [[path.relative_to(folder).as_posix(), verified_sha256(path)] for path in paths]
    return sha256_bytes(json.dumps(named).encode("utf-8"))


def identity(model: str, revision: str, folder: Path, key: str, files: Sequence[str] = FILES) -> dict[str, str]:
    """Part of a fingerprint that identifies a checkpoint: hub id and commit, or the digest of a folder.

    Raises:
        IntegrityError: `revision` is given for a folder and is not its digest.
    """
    if not Path(model).is_dir():
        return {"model": model, "revision": revision}
    digest = folder_digest(folder, files)
    if revision and revision != digest:
        raise IntegrityError(
            f"{key}.revision: the files of {model} have the sha256 {digest}, pinned is {revision}",
            "restore the folder, or pin what is there if the change was meant",
        )
    return {"sha256": digest}


def load_weights(kind: Any, folder: Path, key: str, dtype: Any, **options: Any) -> Any:
    """Transformers model of class `kind` with the safetensors of a checked folder; `options` go to `from_pretrained`.

    Raises:
        IntegrityError: a file is damaged, or weights are missing or of another shape. Transformers would initialize them at
            random.
    """
    from safetensors import SafetensorError

    quiet = logging.getLogger("transformers")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # it lists every weight of a part that is not used; missing weights are an error below
    try:
        model, info = kind.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = f"{key}.model: the weights cannot be loaded: {' '.join(str(error).split())[:300]}"
        raise IntegrityError(reason, "fetch the checkpoint again") from error
    finally:
        quiet.setLevel(level)
    # Whole numbers (positions, indices) follow from the architecture: transformers computes those that a file leaves out.
    constants = {name for name, buffer in model.named_buffers() if not buffer.is_floating_point()}
    absent = sorted([*(set(info["missing_keys"]) - constants), *(str(name) for name in info["mismatched_keys"])])
    if absent:
        raise IntegrityError(
            f"{key}.model: {len(absent)} weights are not in the checkpoint (first: {absent[0]})", "fetch it again"
        )
    return model


TOWER_FAMILIES = {"clip_vision_model": "clip", "siglip_vision_model": "siglip", "siglip2_vision_model": "siglip"}
"""`model_type` of a vision tower's configuration -> family."""
TOWER_ORIGINS = {
    **dict.fromkeys(("smolvlm", "idefics3", "idefics2", "paligemma", "gemma3"), "siglip"),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_5"), "siglip"),
    "perception_lm": "pe_av",
    **dict.fromkeys(("blip-2", "instructblip", "idefics", "kosmos-2", "qwen2_vl"), "clip"),
}
"""`model_type` of a model -> family of the published tower that its own was initialized from, where the configuration does not
say so (BLIP-2 and InstructBLIP: EVA-CLIP, Qwen2-VL: the CLIP of Data Filtering Networks, Qwen3-VL:
SigLIP 2, PerceptionLM: the Perception Encoder, which PE-AV contains)."""


def vision_families(config: dict[str, Any]) -> tuple[str, ...]:
    """Families of a checkpoint's parts, so that evaluation can refuse judges of them: the model's and its vision tower's."""
    kind = str(config.get("model_type") or "unknown")
    vision = config.get("vision_config") or {}
    tower = str(vision.get("model_type") or "") if isinstance(vision, dict) else ""
    return tuple(sorted({kind, TOWER_FAMILIES.get(tower, tower), TOWER_ORIGINS.get(kind, "")} - {""}))
