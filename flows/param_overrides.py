"""Parameters of one run: a preset, single values on top, a seed; checked by the stages' configs before anything runs."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline_steps.core.atomic import write_text
from pipeline_steps.core.config import load_params
from pipeline_steps.core.errors import ConfigError
from pipeline_steps.core.presets import changed_values, load_overlay, merge, render_params, validate_params


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What a run asks of its parameters.

    Attributes:
        preset: file of `presets/` to start from; empty: `params.yaml` as committed.
        overrides: `KEY=VALUE` lines, dotted key, YAML value.
        seed: put into every key named `seed`; None leaves them.
        revision: git revision to run.
    """

    preset: str = ""
    overrides: tuple[str, ...] = ()
    seed: int | None = None
    revision: str = "HEAD"

    @property
    def changes_params(self) -> bool:
        """Whether `params.yaml` may differ from the committed one."""
        return bool(self.preset or self.overrides or self.seed is not None)


def write_params(root: Path, request: RunRequest) -> list[str]:
    """Make `root/params.yaml` what the request asks for; returns one line `key: old -> new` for each change.

    Raises:
        ConfigError: unknown preset, key or section ("did you mean"), a value the stage's config refuses, something secret.
    """
    path = root / "params.yaml"
    if not path.is_file() and not request.changes_params:
        return []
    old, params = load_params(path), load_params(path)
    if request.preset:
        merge(params, load_overlay(root, request.preset))
    for line in request.overrides:
        _set(params, *_parse(line))
    if request.seed is not None:
        _set_seed(params, request.seed)
    if request.changes_params:
        write_text(path, render_params(path.read_text(encoding="utf-8"), params))
    new = load_params(path)
    validate_params(new, "correct the overrides of this run")
    return changed_values(old, new)


def _parse(line: str) -> tuple[list[str], Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    key, sign, value = line.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"override {line!r} is not KEY=VALUE", "write it like section.key=value")
    try:
        return key.strip().split("."), YAML(typ="safe", pure=True).load(value) if value.strip() else ""
    except YAMLError as error:
        raise ConfigError(f"override {key.strip()}: {value!r} is not a YAML value", "quote it") from error


def _set(params: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set a dotted key. The section must exist; the stage's config judges what is below it."""
    if keys[0] not in params or len(keys) < 2:
        name = ".".join(keys)
        raise ConfigError(f"{name} is unknown" if len(keys) > 1 else f"{name} is a whole section", _hint(keys[0], list(params)))
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


def _hint(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known) or 'none'}"
