"""Presets: overlays of `params.yaml` that list only the keys whose values differ.

A preset is a file of `presets/`, of the project or else of the package, with the sections of `params.yaml`. The optional
top-level key `extends` names a preset that is applied before it. Comments and the order of keys of `params.yaml` stay.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline_steps.core.config import config_class, load_params, parse_section
from pipeline_steps.core.errors import ConfigError, StageError, suggest_name
from pipeline_steps.core.project_paths import PACKAGED

EXTENDS = "extends"


def preset_names(root: Path) -> tuple[str, ...]:
    """Names of the presets of a project and of the package, sorted."""
    return tuple(sorted({path.stem for folder in (root / "presets", PACKAGED / "presets") for path in folder.glob("*.yaml")}))


def load_overlay(root: Path, name: str) -> dict[str, Any]:
    """Values of a preset over those of the presets that it extends, as nested mappings.

    Raises:
        ConfigError: the preset or one that it extends does not exist, is not valid YAML, or extends itself.
    """
    chain: list[str] = []
    overlays: list[dict[str, Any]] = []
    current: Any = name
    while current:
        names = preset_names(root)
        if current not in names:
            where = f"presets/{chain[-1]}.yaml: extends: " if chain else ""
            raise ConfigError(f"{where}there is no preset {current!r}", suggest_name(str(current), names))
        if current in chain:
            raise ConfigError(f"presets/{current}.yaml extends itself: {' -> '.join([*chain, current])}", "remove one extends")
        chain.append(current)
        own = root / "presets" / f"{current}.yaml"
        overlay = load_params(own if own.is_file() else PACKAGED / "presets" / own.name)
        current = overlay.pop(EXTENDS, "")
        overlays.append(overlay)
    merged: dict[str, Any] = {}
    for overlay in reversed(overlays):
        merge(merged, overlay)
    return merged


def merge(target: Any, overlay: Mapping[str, Any]) -> None:
    """Set every value of `overlay` that differs in `target`; a mapping is merged, any other value replaces."""
    for key, value in overlay.items():
        if isinstance(value, Mapping) and isinstance(target.get(key), Mapping):
            merge(target[key], value)
        elif target.get(key, KeyError) != value:
            target[key] = value


def render_params(text: str, overlay: Mapping[str, Any]) -> str:
    """Text of `params.yaml` with the values of `overlay`; comments and the order of keys stay.

    Raises:
        ConfigError: the overlay has a section that `params.yaml` lacks.
    """

    def apply(params: Any) -> None:
        for section in overlay:
            if section not in params:
                action = suggest_name(str(section), list(params))
                raise ConfigError(f"section {section!r} of the preset is not in params.yaml", action)
        merge(params, overlay)

    return edit_params(text, apply)


def edit_params(text: str, edit: Callable[[Any], None]) -> str:
    """Text of `params.yaml` after `edit` changed its values in place; the same text if no value changed."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = 4096
    yaml.preserve_quotes = True
    params = yaml.load(text) or {}
    before = dict(flatten(params))
    edit(params)
    if dict(flatten(params)) == before:
        return text
    buffer = io.StringIO()
    yaml.dump(params, buffer)
    return buffer.getvalue()


def flatten(value: Mapping[str, Any], separator: str = ".", path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Joined keys and value of every leaf of nested mappings; an empty mapping is a leaf."""
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from flatten(inner, separator, (*path, str(key)))
        else:
            yield separator.join((*path, str(key))), inner


def changed_values(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line `key: old -> new` for each leaf that differs, in the order of `new`."""
    before, after = dict(flatten(old)), dict(flatten(new))
    keys = [key for key in dict.fromkeys([*after, *before]) if before.get(key, KeyError) != after.get(key, KeyError)]
    return [f"{key}: {before.get(key, 'unset')} -> {after.get(key, 'unset')}" for key in keys]


def validate_params(params: Mapping[str, Any], action: str, sections: Iterable[str] = ()) -> None:
    """Validate sections with the configuration of their stages; by default every section that has a stage.

    Raises:
        ConfigError: with every problem of every section.
    """
    problems = []
    for name in sections or params:
        try:
            parse_section(config_class(str(name)), str(name), params)
        except ModuleNotFoundError:
            continue
        except StageError as error:
            problems.append(error.reason)
    if problems:
        raise ConfigError("; ".join(problems), action)
