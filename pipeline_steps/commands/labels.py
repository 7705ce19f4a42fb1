"""`sonify labels`: write the table for `evaluate.ground_truth`, from a data set with labels or from the project's own tables.

Ingest never reads labels. Only stage evaluate reads those of the written table.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline_steps.commands.console import JsonFlag, handle_errors, ingest_config, layout_of, print_result
from pipeline_steps.core.errors import ConfigError

if TYPE_CHECKING:
    from pipeline_steps.ingest.sources.resolve import Source

COLUMNS = ("kind", "file", "label", "split", "pair")
TEXTS = ("license", "author", "source", "group", "text")
OWN_COLUMNS = (*COLUMNS, "collection", "path", *TEXTS)
"""Columns of a table that is also `metadata` of the pools: `path` is relative to the root of the pool `collection`."""


@handle_errors
def labels(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="CSV to write; outside DIR and the pools.")],
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIR]", help="Folder with data sets in a known layout; default: the tables of the project's pools."
        ),
    ] = None,
    gold: Annotated[
        str, typer.Option(help="With DIR: split whose rows are the true pairs. Without: number of true pairs to hold out.")
    ] = "",
    label: Annotated[str, typer.Option(help="Without DIR: column of the tables with the labels.")] = "label",
    seed: Annotated[int, typer.Option(min=0, help="Without DIR: seed of the choice of pairs.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Write kind, file, label, split and pair of every item that has a label.

    Without DIR an image and a clip of equal label are a true pair; their groups are held out. Prints the parameters to set.
    """
    from pipeline_steps.core.atomic import write_bytes
    from pipeline_steps.ingest.config import IngestConfig
    from pipeline_steps.ingest.sources.resolve import collect_ground_truth, list_sources

    params: dict[str, Any] = {"evaluate": {"ground_truth": str(out)}}
    columns: tuple[str, ...] = COLUMNS
    if folder is None:
        layout = layout_of(context)
        sources = [source for source in list_sources(ingest_config(layout), layout.root) if source.settings.role == "pool"]
        for source in sources:
            _check_outside(out, source.root)
        if not gold.isdigit() or not int(gold):
            raise ConfigError(
                f"--gold {gold!r}: without DIR a number of pairs is required", "give the number of pairs to hold out"
            )
        table, columns = [row for source in sources for row in labelled_rows(source, label)], OWN_COLUMNS
        hold_out_pairs(table, int(gold), seed)
        params = own_parameters(table, sources, out.resolve(), layout.root.resolve())
    else:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is not a folder", "give a folder with data sets")
        _check_outside(out, folder)
        rows = collect_ground_truth(IngestConfig(metadata=None, pool=None, holdout=None), folder)
        if not rows:
            raise ConfigError(
                f"{folder} contains no data set of a known layout with labels", "see docs/reference/dataset-layouts.md"
            )
        table = [{**row, "split": "gold" if gold and row["split"] == gold else row["split"]} for row in rows]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_bytes(out, buffer.getvalue().encode("utf-8"))
    pairs = {row["pair"] for row in table if row["pair"] and row["split"] == "gold"}
    value: dict[str, Any] = {"rows": len(table), "labels": len({row["label"] for row in table}), "gold_pairs": len(pairs)}
    lines = [f"{out}: {value['rows']} rows, {value['labels']} labels, {value['gold_pairs']} gold pairs", "set in params.yaml:"]
    lines += [f"  {line}" for line in _yaml(params).splitlines()]
    if folder is None:
        lines.append(f"then renew dvc.yaml: sonify init {layout.root}")
    print_result(value | {"parameters": params}, lines, as_json)


def _check_outside(out: Path, folder: Path) -> None:
    if out.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"{out} lies inside {folder}", "write the table outside that folder: ingest must not read labels")


def labelled_rows(source: Source, label: str) -> list[dict[str, str]]:
    """Rows of a source's metadata table, in pool. `file` is the item's path in the catalog, and empty if there is no such file.

    Labels are compared without regard to case and spaces around them, and written so.

    Raises:
        ConfigError: the source has no table, or holds items out already.
        DataError: the table cannot be used, or has no such column.
    """
    from pipeline_steps.core.safe_paths import UnsafePathError, display_path, find_other_normal_form, validate_relative_path
    from pipeline_steps.ingest.file_signatures import kind_from_extension
    from pipeline_steps.ingest.sources.resolve import read_source_table

    settings = source.settings
    if settings.metadata is None:
        raise ConfigError(f"{source.key}.metadata is null: the pool has no labels", "name a table with a column of labels")
    if settings.holdout is not None:
        raise ConfigError(
            f"{source.key}.holdout is set: the pool has held-out items already", "set it to null, or keep its table"
        )
    kinds = {"images": ("image",), "audio": ("audio",)}.get(settings.kind, ("image", "audio"))
    found = []
    for row, labelled in zip(read_source_table(source)["rows"], read_source_table(source, label)["rows"], strict=True):
        if (kind := kind_from_extension(row.file)) not in kinds:
            continue
        name = ""
        with suppress(UnsafePathError):
            name = find_other_normal_form(source.root, validate_relative_path(row.file))
        found.append(
            {
                "kind": "image" if kind == "image" else "sound",
                "file": source.prefix + display_path(name) if name and (source.root / name).is_file() else "",
                "label": (labelled.text or "").casefold(),
                "split": "pool",
                "pair": "",
                "collection": source.name,
                "path": row.file,
                **{column: getattr(row, column) or "" for column in TEXTS},
            }
        )
    return found


def hold_out_pairs(rows: Sequence[dict[str, str]], count: int, seed: int) -> None:
    """Choose true pairs and set `split` and `pair` of `rows`; the rest of a chosen group is held out without a pair.

    A pair takes an image and a sound of one label, each from a group of its own (a row without a group is one). The labels
    take turns in a random order. The last group of a label is taken only if no other is left.

    Raises:
        ConfigError: there are fewer pairs.
    """
    from pipeline_steps.core.hashing import fingerprint

    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["kind"], row["collection"], row["group"] and "group", row["group"] or row["path"]), []).append(
            row
        )
    choices: dict[str, dict[str, list[tuple[str, ...]]]] = {}
    for key in sorted(groups, key=lambda key: fingerprint([seed, *key])):
        if first := _first_labelled(groups[key]):
            choices.setdefault(first["label"], {"image": [], "sound": []})[key[0]].append(key)
    places = {label: min(len(keys) for keys in kinds.values()) for label, kinds in choices.items()}
    turns = sorted(
        (place + 1 == most, place, fingerprint([seed, label]), label) for label, most in places.items() for place in range(most)
    )
    if len(turns) < count:
        raise ConfigError(
            f"--gold {count}: only {len(turns)} pairs are possible: a label of both kinds gives one for each group of images "
            "and sounds",
            f"give at most {len(turns)}" if turns else "name the column of labels that images and sounds share: --label",
        )
    for _, place, _, label in islice(turns, count):
        for kind in ("image", "sound"):
            members = groups[choices[label][kind][place]]
            for row in members:
                row["split"] = "gold"
            if first := _first_labelled(members):
                first["pair"] = f"{label}-{place + 1}"


def _first_labelled(rows: Sequence[dict[str, str]]) -> dict[str, str] | None:
    """First row, by file, of an existing file with a label."""
    return min((row for row in rows if row["file"] and row["label"]), key=lambda row: row["file"], default=None)


def own_parameters(table: Sequence[Mapping[str, str]], sources: Sequence[Source], out: Path, project: Path) -> dict[str, Any]:
    """Values of `params.yaml` with which ingest holds the gold rows out and evaluate reads the pairs."""
    columns = {"file": "path", **{name: name for name in TEXTS if any(row[name] for row in table)}}
    found: dict[str, Any] = {}
    for source in sources:
        own = {"collection": source.name} if source.name else {}
        found[source.name] = {
            "metadata": str(out),
            "columns": columns,
            "pool": {**own, "split": "pool"},
            "holdout": {**own, "split": "gold"},
        }
    truth = out.relative_to(project) if out.is_relative_to(project) else out
    return {"ingest": found.get("", {"pools": found}), "evaluate": {"ground_truth": str(truth)}}


def _yaml(value: Mapping[str, Any]) -> str:
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.representer.ignore_aliases = lambda _: True
    buffer = io.StringIO()
    yaml.dump(value, buffer)
    return buffer.getvalue()
