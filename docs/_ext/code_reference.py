"""Sphinx extension: reference pages generated from the code.

A fenced block of the form below is replaced by Markdown before the page is parsed.

    ```{generated} configuration pair
    ```
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import typer.main
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

from pipeline_steps.cli import app as typer_app
from pipeline_steps.core import errors
from pipeline_steps.core.config import config_class
from pipeline_steps.ingest.reason_codes import CODES, NORMALIZATIONS

BLOCK = re.compile(r"^```\{generated\} (?P<name>[\w-]+) ?(?P<argument>[\w-]*)\n```$", re.MULTILINE)


def first_paragraph(docstring: str | None) -> str:
    """First paragraph of a docstring in one line, with Markdown code spans."""
    text = " ".join(inspect.cleandoc(docstring or "").split("\n\n")[0].split())
    return text.replace("``", "`")


# --- Configuration ---


def configuration(stage: str) -> Iterator[str]:
    """Keys of section `stage`, with the groups of all built-in implementations."""
    model = config_class(stage)
    groups: dict[str, Any] = {}
    for registry in model.registries.values():
        for name in registry.names():
            if getattr(registry.get(name), "config_class", None) is not None:
                groups[name] = {}
    complete = model.with_groups(groups)
    schema = complete.model_json_schema()
    yield from _group(stage, schema, schema, complete().model_dump(mode="json"), 3)


def _group(
    key: str, schema: Mapping[str, Any], root: Mapping[str, Any], defaults: Mapping[str, Any], level: int
) -> Iterator[str]:
    """Keys of one group; groups inside it follow under their own heading."""
    inner = []
    for name, declared in schema.get("properties", {}).items():
        field = _resolve(declared, root)
        default = defaults.get(name, declared.get("default"))
        if field.get("type") == "object" and "properties" in field:
            inner.append((f"{key}.{name}", field, default if isinstance(default, Mapping) else {}))
        else:
            required = default is None and name in schema.get("required", ())
            yield from _key(f"{key}.{name}", field, "required" if required else f"`{_yaml(default)}`", declared)
            entry = field.get("additionalProperties")
            if isinstance(entry, Mapping) and "properties" in entry:
                inner.append((f"{key}.{name}.<name>", entry, {}))
    extra = schema.get("additionalProperties")
    if isinstance(extra, Mapping):
        entry = _resolve(extra, root)
        inner.append((f"{key}.<name>", entry, {}))
    for path, field, default in inner:
        yield f"{'#' * level} `{path}`\n"
        if meaning := re.sub(r"^Group `[\w.]+`[.:]? ?", "", first_paragraph(field.get("description"))):
            yield sentence(meaning) + "\n"
        yield from _group(path, field, root, default, level)


def _key(key: str, field: Mapping[str, Any], default: str, declared: Mapping[str, Any]) -> Iterator[str]:
    yield f"````{{confval}} {key}"
    yield f":type: {describe_type(field)}"
    yield f":default: {default}\n"
    yield sentence(declared.get("description") or field.get("description", ""), field.get("enum", ())) + "\n````\n"


def sentence(text: str, names: Sequence[str] = ()) -> str:
    """Text with a capital letter and a full stop; units, names and identifiers at its beginning stay as they are."""
    text = " ".join(text.split())
    word = re.match(r"[^\s,:;]*", text)[0]  # type: ignore[index]
    keep = word in {"px", "auto", *map(str, names)} or re.search(r"[_./]", word)
    return f"{text if keep else text[:1].upper() + text[1:]}{'' if not text or text[-1] in '.?!' else '.'}"


def _resolve(field: Mapping[str, Any], root: Mapping[str, Any]) -> dict[str, Any]:
    """A property without references, also in its parts; keys beside a reference win."""
    if "$ref" in field or len(field.get("allOf", ())) == 1:
        reference = field["$ref"] if "$ref" in field else field["allOf"][0]["$ref"]
        beside = {key: value for key, value in field.items() if key not in ("$ref", "allOf", "default", "description")}
        return _resolve({**root["$defs"][reference.rsplit("/", 1)[-1]], **beside}, root)
    found = dict(field)
    for entry in found.pop("patternProperties", {}).values():  # a mapping whose names follow a pattern
        found["additionalProperties"] = entry
    for key in ("items", "additionalProperties"):
        if isinstance(found.get(key), Mapping):
            found[key] = _resolve(found[key], root)
    if "anyOf" in found:
        found["anyOf"] = [_resolve(one, root) for one in found["anyOf"]]
    return found


def _yaml(value: Any) -> str:
    """A default as it is written in params.yaml."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(_yaml(one) for one in value)}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_yaml(one)}" for key, one in value.items()) + "}"
    return '""' if value == "" else str(value)


def describe_type(field: Mapping[str, Any]) -> str:
    """Type and bounds of a JSON schema property in words."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(describe_type(one) for one in field["anyOf"]))
    if "enum" in field or "const" in field:
        return (
            "one of " + ", ".join(f"`{_yaml(value)}`" for value in field["enum"])
            if "enum" in field
            else f"`{_yaml(field['const'])}`"
        )
    kind = field.get("type", "any")
    if kind == "array":
        items = describe_type(field["items"]) if field.get("items") else "any"
        return f"list of {items}{_range(field, 'minItems', 'maxItems', 'items')}"
    if kind == "object":
        values = field.get("additionalProperties")
        named = isinstance(values, Mapping) and values and "properties" not in values
        return f"mapping of names to {describe_type(values)}" if named else "mapping"
    name = {"integer": "int", "number": "float", "boolean": "`true` or `false`", "string": "str", "null": "`null`"}.get(
        kind, kind
    )
    if kind == "string":
        pattern = f", pattern `{field['pattern']}`" if "pattern" in field else ""
        return f"{name}{_range(field, 'minLength', 'maxLength', 'characters')}{pattern}"
    return name + _number_bounds(field)


def _number_bounds(field: Mapping[str, Any]) -> str:
    words = {"minimum": "at least {}", "exclusiveMinimum": "above {}", "maximum": "at most {}", "exclusiveMaximum": "below {}"}
    found = [text.format(field[key]) for key, text in words.items() if key in field]
    if "multipleOf" in field:
        found.append(f"a multiple of {field['multipleOf']}")
    if "minimum" in field and "maximum" in field:
        found[:2] = [f"{field['minimum']} to {field['maximum']}"]
    return ", " + ", ".join(found) if found else ""


def _range(field: Mapping[str, Any], low: str, high: str, unit: str) -> str:
    if low in field and high in field and field[low]:
        return f", {field[low]} to {field[high]} {unit}"
    if field.get(low):
        return ", not empty" if field[low] == 1 else f", at least {field[low]} {unit}"
    return f", at most {field[high]} {unit}" if high in field else ""


# --- Command line ---


def command_line(_argument: str) -> Iterator[str]:
    """Every command of `sonify` with its arguments and options."""
    yield from _command("sonify", typer.main.get_command(typer_app))


def _command(path: str, command: Any) -> Iterator[str]:
    options = [one for one in command.params if one.param_type_name == "option" and not one.hidden]
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    commands = getattr(command, "commands", {})
    if path != "sonify":
        yield f"## `{path}`\n\n{_paragraphs(command.help)}\n"
    if not commands:
        usage = [path, *(["[OPTIONS]"] if options else []), *(_placeholder(one) for one in arguments)]
        yield f"```text\n{' '.join(usage)}\n```\n"
    yield f"```{{program}} {path}\n```\n"
    for one in arguments:
        yield f"`{_placeholder(one)}`\n: {_help(one)}\n"
    for one in options:
        value = "" if one.is_flag else f" {_placeholder(one)}"
        names = ", ".join(f"{name}{value}" for name in [*one.opts, *one.secondary_opts])
        yield f"````{{option}} {names}\n\n{_help(one)}\n````\n"
    for name in sorted(commands):
        yield from _command(f"{path} {name}", commands[name])


def _placeholder(parameter: Any) -> str:
    if parameter.metavar or parameter.param_type_name == "argument":
        return parameter.metavar or parameter.name.upper()
    if parameter.type_descriptor.choices:
        return "NAME"
    return {Path: "PATH", int: "N", float: "X"}.get(_value_type(parameter), "TEXT")


def _value_type(parameter: Any) -> Any:
    kinds = [one for one in get_args(parameter.type_descriptor.annotation) if one is not type(None)]
    return kinds[0] if kinds else parameter.type_descriptor.annotation


def _help(parameter: Any) -> str:
    text = sentence(parameter.help or "")
    default = getattr(parameter.default, "value", parameter.default)
    if choices := parameter.type_descriptor.choices:
        text += " One of " + ", ".join(f"`{getattr(one, 'value', one)}`" for one in choices) + "."
    if parameter.max is not None:
        text += f" Range: {parameter.min} to {parameter.max}."
    elif parameter.min is not None:
        text += f" At least {parameter.min}."
    if isinstance(default, str | int | float) and default not in ("", False, True) and "efault" not in text:
        text += f" Default: `{default}`."
    return text


def _paragraphs(text: str | None) -> str:
    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(text or "").split("\n\n"))


# --- Codes ---


def reason_codes(_argument: str) -> Iterator[str]:
    """Quarantine and abstention codes of stage `ingest`."""
    yield "| code | meaning | action | decoded again by the next run |\n|---|---|---|---|"
    for name, code in CODES.items():
        yield f"| `{name}` | {code.description} | {code.action} | {'yes' if code.retryable else 'no'} |"


def normalizations(_argument: str) -> Iterator[str]:
    """Codes of the normalizations applied to accepted items."""
    yield "| code | meaning |\n|---|---|"
    for name, description in NORMALIZATIONS.items():
        yield f"| `{name}` | {description} |"


def exit_codes(_argument: str) -> Iterator[str]:
    """Exit codes of the error classes."""
    classes = [one for one in vars(errors).values() if inspect.isclass(one) and issubclass(one, errors.StageError)]
    yield "| exit code | `kind` in `error.json` | class | meaning |\n|---|---|---|---|"
    yield "| 0 | | | done, or nothing to do |"
    for one in sorted(classes, key=lambda error: error.exit_code):
        meaning = (
            first_paragraph(one.__doc__)
            if one is not errors.StageError
            else "an error in the program; `error.json` has the traceback"
        )
        yield f"| {one.exit_code} | `{one.kind}` | `{one.__name__}` | {meaning} |"


GENERATORS: dict[str, Callable[[str], Iterator[str]]] = {
    "configuration": configuration,
    "command-line": command_line,
    "reason-codes": reason_codes,
    "normalizations": normalizations,
    "exit-codes": exit_codes,
}


def expand(text: str) -> str:
    """Replace the generated blocks of a page.

    Raises:
        KeyError: a block has an unknown name.
    """
    return BLOCK.sub(lambda match: "\n".join(GENERATORS[match["name"]](match["argument"])), text)


def expand_source(_app: Sphinx, _name: str, source: list[str]) -> None:
    """Event `source-read`."""
    source[0] = expand(source[0])


def generated_pages(_app: Sphinx, env: BuildEnvironment, *_changes: set[str]) -> list[str]:
    """Event `env-get-outdated`: pages with a generated block are read in every build, because the code may have changed."""
    return [name for name in env.found_docs if BLOCK.search(env.doc2path(name).read_text(encoding="utf-8"))]


def markdown_docstring(_app: Sphinx, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Event `autodoc-process-docstring`: indented code after a colon is a code block, and a bar is text."""
    for number, line in enumerate(lines):
        lines[number] = line.replace("|", "\\|")
        following = lines[number + 1 : number + 3]
        if line.endswith(":") and len(following) == 2 and not following[0] and following[1].startswith("    "):
            lines[number] = line + ":"


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", expand_source)
    app.connect("autodoc-process-docstring", markdown_docstring, priority=400)
    app.connect("env-get-outdated", generated_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
