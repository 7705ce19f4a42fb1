"""Parameters of one run: a preset, single values on top, a seed; checked by the stages' configs before anything runs."""

from __future__ import annotations

import difflib
import importlib.util
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.dvc_graph import flatten
from pipeline_steps.core.atomic import write_text
from pipeline_steps.core.config import StageConfig, config_class, load_params, parse_section
from pipeline_steps.core.errors import ConfigError, StageError


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
    from ruamel.yaml import YAML

    path = root / "params.yaml"
    if not path.is_file() and not request.changes_params:
        return []
    old = load_params(path)
    source = _preset(root, request.preset) if request.preset else path
    load_params(source)  # size, aliases, duplicate keys
    yaml = YAML()
    yaml.width = 4096
    params = yaml.load(source.read_text(encoding="utf-8"))
    for line in request.overrides:
        _set(params, *_parse(line))
    if request.seed is not None:
        _set_seed(params, request.seed)
    text = io.StringIO()
    yaml.dump(params, text)
    untouched = not request.overrides and request.seed is None
    content = source.read_text(encoding="utf-8") if untouched else text.getvalue()
    if request.changes_params:
        write_text(path, content)
    new = load_params(path)
    check_sections(new)
    before, after = flatten(old), flatten(new)
    keys = [key for key in dict.fromkeys([*after, *before]) if before.get(key, KeyError) != after.get(key, KeyError)]
    return [f"{key}: {before.get(key, 'unset')} -> {after.get(key, 'unset')}" for key in keys]


def check_sections(params: Mapping[str, Any]) -> None:
    """Validate every section that has a stage package, all problems in one message.

    Raises:
        ConfigError: with every problem of every section.
    """
    problems = []
    for name in params:
        if not str(name).isidentifier() or importlib.util.find_spec(f"pipeline_steps.{name}") is None:
            continue
        if importlib.util.find_spec(f"pipeline_steps.{name}.config") is None:
            continue
        model = config_class(name)
        if isinstance(model, type) and issubclass(model, StageConfig):
            try:
                parse_section(model, str(name), params)
            except StageError as error:
                problems.append(error.reason)
    if problems:
        raise ConfigError("; ".join(problems), "correct the overrides of this run")


def preset_names(root: Path) -> tuple[str, ...]:
    """Names of the files in `presets/`."""
    return tuple(sorted(path.stem for path in (root / "presets").glob("*.yaml")))


def _preset(root: Path, name: str) -> Path:
    known = preset_names(root)
    if name not in known:
        raise ConfigError(f"there is no preset {name!r}", _hint(name, known))
    return root / "presets" / f"{name}.yaml"


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
