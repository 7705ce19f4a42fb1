"""Parameters of one run: preset, overrides and seed, validated by the configuration of the stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline_steps.core.atomic import write_text
from pipeline_steps.core.config import load_params
from pipeline_steps.core.errors import ConfigError, suggest_name
from pipeline_steps.core.presets import changed_values, edit_params, load_overlay, render_params, validate_params


@dataclass(frozen=True, slots=True)
class RunRequest:
    """Requested parameters of a run."""

    preset: str = ""  # name of a preset in `presets/`; empty: none
    overrides: tuple[str, ...] = ()  # `KEY=VALUE` lines with a dotted key and a YAML value
    seed: int | None = None  # value of every parameter named `seed`; None: unchanged
    revision: str = "HEAD"  # git revision to run

    @property
    def changes_params(self) -> bool:
        """Whether the request may change `params.yaml`."""
        return bool(self.preset or self.overrides or self.seed is not None)


def write_params(root: Path, request: RunRequest) -> list[str]:
    """Write the requested parameters to `root/params.yaml`; returns one line `key: old -> new` for each change.

    Raises:
        ConfigError: a preset, section or key does not exist, or the configuration of a stage refuses a value.
    """
    path = root / "params.yaml"
    if not path.is_file() and not request.changes_params:
        return []
    old = load_params(path)
    text = path.read_text(encoding="utf-8")
    if request.preset:
        text = render_params(text, load_overlay(root, request.preset))

    def override(params: dict[str, Any]) -> None:
        for line in request.overrides:
            _set(params, *_parse(line))
        if request.seed is not None:
            _set_seed(params, request.seed)

    text = edit_params(text, override)
    if request.changes_params:
        write_text(path, text)
    new = load_params(path)
    validate_params(new, "correct the overrides of this run")
    return changed_values(old, new)


def _parse(line: str) -> tuple[list[str], Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    key, sign, value = line.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"override {line!r} is not KEY=VALUE", "write section.key=value")
    try:
        return key.strip().split("."), YAML(typ="safe", pure=True).load(value) if value.strip() else ""
    except YAMLError as error:
        raise ConfigError(f"override {key.strip()}: {value!r} is not a YAML value", "quote the value") from error


def _set(params: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set a dotted key. The section must exist; the configuration of its stage validates the keys below it."""
    if keys[0] not in params or len(keys) < 2:
        action = suggest_name(keys[0], list(params), f"use one of {', '.join(params)}")
        name = ".".join(keys)
        raise ConfigError(f"{name} is unknown" if len(keys) > 1 else f"{name} is a whole section", action)
    node: Any = params
    for number, key in enumerate(keys[:-1], 1):
        node = node.setdefault(key, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise ConfigError(f"{'.'.join(keys)} is unknown", f"{'.'.join(keys[:number])} is a value, not a section")
    node[keys[-1]] = value


def _set_seed(params: Any, seed: int) -> None:
    if isinstance(params, dict):
        for key, value in params.items():
            if key == "seed":
                params[key] = seed
            else:
                _set_seed(value, seed)
