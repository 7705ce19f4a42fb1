"""Checks of everything outside the project that the parameters name: checkpoints of the hub, folders, servers.

`sonify doctor --online` prints them. `sonify run` makes them before the first stage: a wrong pin of the last stage is found at
once, not after the hours that the first stages take.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pipeline_steps.commands.console import CheckResult
from pipeline_steps.core.errors import ConfigError, IntegrityError, ServiceError, StageError
from pipeline_steps.core.project_paths import ProjectPaths

WEIGHTS = ("*.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json")
REQUIRED: dict[str, tuple[tuple[str, ...], ...]] = {
    "caption.vlm": (
        ("config.json",),
        WEIGHTS,
        ("tokenizer.json", "tokenizer_config.json"),
        ("preprocessor_config.json", "processor_config.json"),
    ),
    "embed.clap": (
        ("config.json",),
        WEIGHTS,
        ("tokenizer.json", "vocab.json"),
        ("preprocessor_config.json", "processor_config.json"),
    ),
    "embed.pe_av": (("config.json",), WEIGHTS, ("tokenizer.json",), ("preprocessor_config.json", "processor_config.json")),
    "train.audio.ast": (("config.json",), WEIGHTS, ("preprocessor_config.json",)),
    "train.ip_adapter.backbone": (
        ("unet/config.json",),
        ("unet/*.safetensors",),
        ("vae/diffusion_pytorch_model.safetensors",),
        ("scheduler/scheduler_config.json",),
    ),
}
"""Key -> groups of patterns; a checkpoint needs a file of each group."""
ANY_CHECKPOINT = (("config.json",), WEIGHTS)
TIMEOUT_SECONDS = 20


def named_checkpoints(params: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Key -> (model, revision) of every checkpoint that the selected implementations use.

    Folders that stage `assets` writes are left out, because they need not exist yet.
    """
    found = {}
    assets = ProjectPaths().assets
    for section, values in params.items():
        selected = set(_strings(values))
        for path, node in _groups(values, (str(section),)):
            model = node.get("model")
            if model and "revision" in node and selected & set(path[1:]) and not Path(str(model)).is_relative_to(assets):
                found[".".join(path)] = (str(model), str(node["revision"]))
    return found


def _groups(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    if isinstance(value, Mapping):
        yield path, value
        for name, inner in value.items():
            yield from _groups(inner, (*path, str(name)))


def _strings(value: Any) -> Iterator[str]:
    """Text values of nested mappings and lists."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
    elif isinstance(value, str):
        yield value


def run_preflight(layout: ProjectPaths, sections: Iterable[str] = ()) -> list[CheckResult]:
    """One result for each checkpoint and server that `params.yaml` names in `sections` (all, if empty)."""
    from pipeline_steps.core.config import load_params

    params = load_params(layout.params)
    chosen = {name: values for name, values in params.items() if not sections or name in set(sections)}
    results = [_result(key, _check_files, layout, key, *named) for key, named in named_checkpoints(chosen).items()]
    if "caption" in chosen and chosen["caption"].get("captioner") == "openai_server":
        results.append(_result("caption.openai_server", _check_server, layout, params))
    return results


def _result(key: str, check: Any, *arguments: Any) -> CheckResult:
    try:
        return CheckResult(key, "ok", check(*arguments))
    except StageError as error:
        return CheckResult(key, "fail", error.reason, fix=error.action, exit_code=error.exit_code)


def _check_files(layout: ProjectPaths, key: str, model: str, revision: str) -> str:
    """Short description of a checkpoint that exists and has all files; raises StageError if it has not."""
    from pipeline_steps.models.hub_checkpoint import resolve_model_path

    path = Path(resolve_model_path(model, layout.root))
    files, place = (_files_below(path), "folder") if path.is_dir() else _hub_files(key, model, revision)
    for patterns in REQUIRED.get(key, ANY_CHECKPOINT):
        if not any(fnmatch(file, pattern) for file in files for pattern in patterns):
            raise IntegrityError(
                f"{key}.model: {model} has no {' or '.join(patterns)}" + (f" at {revision}" if revision else ""),
                f"choose another commit or checkpoint in {key}",
            )
    return f"{model} ({place}, {len(files)} files)"


def _files_below(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _hub_files(key: str, model: str, revision: str) -> tuple[list[str], str]:
    """Files of a commit: of the local cache if it has weights, else as the hub lists them."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    from pipeline_steps.models.hub_checkpoint import COMMIT

    if not COMMIT.fullmatch(revision):
        raise ConfigError(f"{key}.revision: {revision!r} is not a commit", "pin the 40 hex digits of a commit of the model")
    cached = Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}" / "snapshots" / revision
    files = _files_below(cached) if cached.is_dir() else []
    if any(fnmatch(file, "*.safetensors") or fnmatch(file, "pytorch_model*.bin") for file in files):
        return files, "cached"
    try:
        listed = HfApi().model_info(model, revision=revision, timeout=TIMEOUT_SECONDS).siblings or []
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ConfigError(
            f"{key}.model: the hub has no {model} at {revision}", "correct both; a gated model needs HF_TOKEN"
        ) from error
    except Exception as error:  # the errors of the HTTP library that huggingface_hub uses, which changes between releases
        raise ServiceError(
            f"{key}.model: {model} is not cached and the hub does not answer: {type(error).__name__}",
            "connect to the hub, or name a local folder",
            transient=True,
        ) from error
    return [file.rfilename for file in listed], "hub"


def _check_server(layout: ProjectPaths, params: Mapping[str, Any]) -> str:
    """Ask the server of the captioner for its models; raises StageError if it does not answer or does not serve the model."""
    from pipeline_steps.caption.config import CaptionConfig
    from pipeline_steps.caption.stage import build_captioner
    from pipeline_steps.core.config import parse_section

    build_captioner(parse_section(CaptionConfig, "caption", params), layout).load()
    server = params["caption"]["openai_server"]
    return f"{server['model']} at {server['url']}"
