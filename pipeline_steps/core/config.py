"""Configuration: sections of `params.yaml` as frozen pydantic models. All errors are reported at once."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from pipeline_steps.core.errors import ConfigError, suggest_name
from pipeline_steps.core.registry import Registry

MAX_BYTES = 1_000_000
SECRET_WORDS = ("token", "password", "secret", "api_key", "apikey")


class StageConfig(BaseModel):
    """Base of every stage's section, of every group in it, and of other configuration files: frozen, strict about unknown keys.

    Attributes:
        registries: fields whose value names an implementation (or a list of names), with the registry that holds them. The
            configuration of an implementation is the group of the section that has its name; its model is the
            implementation's class attribute `config_class`. An implementation without that attribute has no group.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    registries: ClassVar[Mapping[str, Registry[Any]]] = {}

    @classmethod
    def from_params(cls, section: Mapping[str, Any]) -> Self:
        """Validate a section, with the groups of the implementations that it selects or configures.

        Raises:
            pydantic.ValidationError: a key is unknown or a value is not valid.
            ConfigError: an implementation does not exist.
        """
        return cls.with_groups(section).model_validate(section)

    @classmethod
    def with_groups(cls, section: Mapping[str, Any]) -> type[Self]:
        """This model with one field per implementation that the section selects or configures.

        Raises:
            ConfigError: a selected implementation does not exist.
        """
        groups: dict[str, Any] = {}
        for field, registry in cls.registries.items():
            chosen = section.get(field, cls.model_fields[field].get_default(call_default_factory=True))
            selected = [chosen] if isinstance(chosen, str) else chosen if isinstance(chosen, list | tuple) else []
            present = [key for key in section if isinstance(key, str) and key not in cls.model_fields and key in registry]
            for name in dict.fromkeys([*selected, *present]):
                if not isinstance(name, str) or name in RESERVED_NAMES:
                    continue
                model = getattr(registry.get(name), "config_class", None)
                if model is not None:
                    groups[name] = (model, Field(default_factory=model))
        if not groups:
            return cls
        model = create_model(cls.__name__, __base__=cls, __module__=cls.__module__, **groups)
        model.__made_by_with_groups__ = True
        return model

    def implementation_config(self, name: str) -> Any:
        """Configuration of the implementation `name`, its default if the section has no such group; None if it has none."""
        group = getattr(self, name, None)
        if isinstance(group, StageConfig):
            return group
        registries = [registry for registry in self.registries.values() if name in registry]
        models = [getattr(registry.get(name), "config_class", None) for registry in registries]
        return next((model() for model in models if model is not None), None)

    def __reduce__(self) -> tuple[Any, ...]:
        # A model made by `with_groups` has no importable name: pickle stores its base and its values.
        kind = type(self)
        base: Any = kind.__base__ if "__made_by_with_groups__" in vars(kind) else kind
        return base.from_params, (self.model_dump(),)


RESERVED_NAMES = ("auto",)
"""Values of a field with a registry that name no implementation."""

Section = TypeVar("Section", bound=StageConfig)


def config_class(stage: str) -> type[StageConfig]:
    """Configuration model of a stage: `<Stage>Config` of the stage's module `config`.

    Raises:
        ModuleNotFoundError: there is no such stage.
    """
    module = importlib.import_module(f"pipeline_steps.{stage}.config")
    model: type[StageConfig] = getattr(module, f"{stage.capitalize()}Config")
    return model


def load_params(path: Path) -> dict[str, Any]:
    """Read `params.yaml` (YAML 1.2, safe loader, no duplicate keys, no anchors).

    Raises:
        ConfigError: missing, too large, not YAML, not a mapping, or with a value that looks like a secret.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    if not path.is_file():
        raise ConfigError(f"{path} is missing", "run in the project folder, or restore it: git checkout params.yaml")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_BYTES} bytes", "remove keys that no stage has")
    text = path.read_text(encoding="utf-8")
    try:
        # Events are scanned before anything is built: aliases allow exponential expansion, and parameters need none.
        if any(type(event).__name__ == "AliasEvent" for event in YAML(typ="safe", pure=True).parse(text)):
            raise ConfigError(f"{path} uses YAML aliases", "write the values out")
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        first = " ".join(str(error).split())
        raise ConfigError(f"{path} is not valid YAML: {first}", "correct that line") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must contain one section per stage, found {type(value).__name__}")
    _refuse_secrets(value, ())
    return value


def _refuse_secrets(value: Mapping[Any, Any], where: tuple[str, ...]) -> None:
    for key, inner in value.items():
        name = str(key).lower()
        names_variable = name.endswith("_env")  # its value is the name of an environment variable
        if isinstance(inner, str) and inner and not names_variable and any(word in name for word in SECRET_WORDS):
            raise ConfigError(f"{'.'.join((*where, str(key)))} looks like a secret", "pass secrets by environment only")
        if isinstance(inner, Mapping):
            _refuse_secrets(inner, (*where, str(key)))


def parse_section(model: type[Section], name: str, params: Mapping[str, Any]) -> Section:
    """Validate section `name` of the parameters against its model.

    Raises:
        ConfigError: all problems of the section in one message; unknown keys with "did you mean".
    """
    if name not in params:
        raise ConfigError(f"params.yaml has no section {name!r}", "restore it: git checkout params.yaml")
    try:
        section = params[name]
        if isinstance(section, Mapping):
            model = model.with_groups(section)
        return model.model_validate(section)
    except ValidationError as error:
        problems = [_explain(model, name, dict(problem)) for problem in error.errors()]
        raise ConfigError("; ".join(problems), "correct params.yaml") from error


def _explain(model: type[BaseModel], section: str, problem: dict[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join([section, *location])
    if problem["type"] == "extra_forbidden":
        keys = sorted(_keys_at(model, location[:-1]))
        listed = f"valid keys: {', '.join(keys)}" if keys else "this group has no keys"
        return f"{key} is unknown; {suggest_name(location[-1], keys, listed)}"
    return f"{key}: {problem['msg']} (got {problem.get('input')!r})"


def _keys_at(model: type[BaseModel], location: list[str]) -> list[str]:
    current: Any = model
    for part in location:
        fields = getattr(current, "model_fields", {})
        if part in fields:
            current = fields[part].annotation
        elif get_origin(current) is dict:  # entries of one type under names of the user
            current = get_args(current)[1]
        elif getattr(current, "model_config", {}).get("extra") == "allow":  # named entries of one type
            current = get_args(get_type_hints(current)["__pydantic_extra__"])[1]
        else:
            return []
    return list(getattr(current, "model_fields", {}))
