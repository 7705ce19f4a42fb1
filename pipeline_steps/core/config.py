"""`params.yaml` -> one frozen pydantic model per stage. Every error at once, with the key and a suggestion."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline_steps.core.errors import ConfigError

MAX_BYTES = 1_000_000
SECRET_WORDS = ("token", "password", "secret", "api_key", "apikey")


class StageConfig(BaseModel):
    """Base of every stage's section: frozen, strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Section = TypeVar("Section", bound=StageConfig)


def load_params(path: Path) -> dict[str, Any]:
    """Read `params.yaml` (YAML 1.2, safe loader, no duplicate keys, no anchors).

    Raises:
        ConfigError: missing, too large, not YAML, not a mapping, or holding what looks like a secret.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    if not path.is_file():
        raise ConfigError(f"{path} is missing", "copy a file from presets/ or run in the project folder")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_BYTES} bytes", "parameters are a small file")
    text = path.read_text(encoding="utf-8")
    try:
        # Events are scanned before anything is built: an alias is the raw material of a YAML bomb and params need none.
        if any(type(event).__name__ == "AliasEvent" for event in YAML(typ="safe", pure=True).parse(text)):
            raise ConfigError(f"{path} uses YAML aliases", "write the values out")
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        first = " ".join(str(error).split())
        raise ConfigError(f"{path} is not valid YAML: {first}", "mend the line named") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold one section per stage, found {type(value).__name__}")
    _refuse_secrets(value, ())
    return value


def _refuse_secrets(value: Mapping[Any, Any], where: tuple[str, ...]) -> None:
    for key, inner in value.items():
        name = str(key).lower()
        if isinstance(inner, str) and inner and any(word in name for word in SECRET_WORDS):
            raise ConfigError(f"{'.'.join((*where, str(key)))} looks like a secret", "pass secrets by environment only")
        if isinstance(inner, Mapping):
            _refuse_secrets(inner, (*where, str(key)))


def parse_section(model: type[Section], name: str, params: Mapping[str, Any]) -> Section:
    """Validate section `name` of the parameters against its model.

    Raises:
        ConfigError: all problems of the section in one message; unknown keys with "did you mean".
    """
    if name not in params:
        raise ConfigError(f"params.yaml has no section {name!r}", "take it from presets/embedded.yaml")
    try:
        return model.model_validate(params[name])
    except ValidationError as error:
        problems = [_explain(model, name, dict(problem)) for problem in error.errors()]
        raise ConfigError("; ".join(problems), "correct params.yaml") from error


def _explain(model: type[BaseModel], section: str, problem: dict[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join([section, *location])
    if problem["type"] == "extra_forbidden":
        known = _keys_at(model, location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        return f"{key} is unknown" + (f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(known))}")
    return f"{key}: {problem['msg']} (got {problem.get('input')!r})"


def _keys_at(model: type[BaseModel], location: list[str]) -> list[str]:
    current: Any = model
    for part in location:
        field = getattr(current, "model_fields", {}).get(part)
        if field is None:
            return []
        current = field.annotation
    return list(getattr(current, "model_fields", {}))
