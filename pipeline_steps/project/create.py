"""Create a project folder, or renew its `dvc.yaml` from its `params.yaml`."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline_steps.core.atomic import write_text
from pipeline_steps.core.config import config_class, load_params
from pipeline_steps.core.errors import ConfigError, ResourceError
from pipeline_steps.core.git import try_git
from pipeline_steps.core.pool_check import pool_roots, source_deps
from pipeline_steps.core.presets import load_overlay, validate_params
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.ingest.file_signatures import Kind, extension, kind_from_extension
from pipeline_steps.ingest.sources.archives import AUTHOR, GROUP, LICENSE, SOURCE
from pipeline_steps.ingest.sources.dataset_layouts import ARCHIVE_EXTENSIONS
from pipeline_steps.project.code_digests import packaged_graph, packaged_stages, write_code_digests

FILE_COLUMNS = ("file", "path", "file_name", "filename", "filepath", "image", "audio", "image_path", "audio_path")
SAMPLED_ROWS = 200
"""Rows of a metadata table that decide to which folder its paths are relative."""

GRAPH_HEADER = """\
# Written by `sonify init` from params.yaml. After a change of ingest.pools or evaluate.ground_truth: sonify init .
# Stage `code` always runs, in a second: it records a digest of the code of each stage in code.yaml, so that an upgrade of the
# package makes stale exactly the stages whose code differs.
"""
PARAMS_HEADER = """# Values that differ from the defaults. All keys: docs of the package; check them with: sonify doctor
"""
IGNORED = ("/.cache/", "/.runs/", "/error.json", "/mlflow.db*", "/mlartifacts/", "/reports/runtime/", "__pycache__/")
DVC_IGNORED = (".cache", ".runs", ".venv", "__pycache__", "*.pyc")
DVC_CONFIG = "[core]\n    analytics = false\n    check_update = false\n"
README = """# {name}

A Seeing Sound project: images and audio clips are paired, a model learns to generate images from audio, and both are evaluated.

    dvc repro          # or: sonify run. Only stale stages run; the report is reports/index.html
    sonify doctor      # what is missing or wrong

| file | content |
|---|---|
| `params.yaml` | folders of the files, and what differs from the defaults |
| `dvc.yaml` | stages; written by `sonify init .` |
| `code.yaml` | version of the package and digests of the code that the stages use |
"""


def create_project(
    folder: Path, pictures: Path, sounds: Path, metadata: Path | None = None, preset: str = "trial"
) -> tuple[ProjectPaths, list[str]]:
    """Write a project for two folders of files; returns it and one line for each thing that was done.

    Args:
        folder: the project; it may exist, and may lie in a git repository.
        pictures, sounds: folders with the files; they may be the same.
        metadata: CSV or Parquet with a column of file names, and optionally licenses, authors, sources, groups.
        preset: name of a preset of the package.

    Raises:
        ConfigError: a folder does not exist or overlaps with the project's outs, the project exists, or the table has no
            column of file names.
    """
    layout = ProjectPaths(folder)
    for key, path in (("--pictures", pictures), ("--sounds", sounds)):
        if not path.is_dir():
            raise ConfigError(f"{key}: {path} is not a folder", "name the folder that contains the files")
    counts = {"images": _count(pictures, "image", "audio"), "clips": _count(sounds, "audio", "image")}
    for path in (layout.params, layout.graph):
        if path.exists():
            raise ConfigError(f"{path} exists", f"change ingest.pools in it, then run: sonify init {folder}")
    params: dict[str, Any] = {name: {} for name in packaged_stages()}
    for name, section in load_overlay(folder, preset).items():
        params[name] = _changes(section, config_class(name).with_groups(section)().model_dump())
    params["ingest"] = {"pools": _pools(folder, pictures, sounds, metadata), **params["ingest"]}
    _check_overlap(layout, params)
    validate_params(params, "report this: a project must be valid from the start")
    layout.root.mkdir(parents=True, exist_ok=True)
    write_text(layout.params, PARAMS_HEADER + _yaml(params))
    found = ", ".join(f"{count} {name}" for name, count in counts.items())
    return layout, [f"{found} found by their names", f"{layout.params}: preset {preset}", *renew_project(layout)]


def _count(folder: Path, kind: Kind, other: Kind) -> int:
    """Files of a kind below a folder, by their names.

    Raises:
        ConfigError: there is none, and no archive or table that may contain media.
    """
    names = [name for _, _, files in os.walk(folder) for name in files]
    kinds = Counter(kind_from_extension(name) for name in names)
    archives = {end for ends in ARCHIVE_EXTENSIONS.values() for end in ends}
    if not kinds[kind] and not any(extension(name) in archives for name in names):
        hint = f"; it has {kinds[other]} of kind {other}: are the two folders swapped?" if kinds[other] else ""
        raise ConfigError(f"{folder} has no file of kind {kind}{hint}", "name the folder that contains the files")
    return kinds[kind]


def renew_project(layout: ProjectPaths) -> list[str]:
    """Write `dvc.yaml` and `code.yaml` from `params.yaml`, and all else that is missing; returns what was done.

    Raises:
        ConfigError: there is no `params.yaml`, or `dvc.yaml` was not written by `sonify init`.
    """
    if not layout.params.is_file():
        raise ConfigError(f"{layout.root} is no project", "to make one, give --pictures and --sounds")
    first = GRAPH_HEADER.splitlines()[0]
    if layout.graph.is_file() and not layout.graph.read_text(encoding="utf-8").startswith(first):
        raise ConfigError(f"{layout.graph} was not written by sonify init", "edit its deps by hand, or remove it")
    params = load_params(layout.params)
    _check_overlap(layout, params)
    graph = packaged_graph()
    write_text(layout.graph, GRAPH_HEADER + _yaml({**graph, "stages": project_stages(params)}))
    write_code_digests(layout)
    done = [f"{layout.graph}: stage code and the {len(graph['stages'])} stages of the pipeline"]
    _add_lines(layout.root / ".gitignore", [*IGNORED, *(f"/{out}" for out in _cached_outs())])
    if not (layout.root / "README.md").exists():
        write_text(layout.root / "README.md", README.format(name=layout.root.resolve().name))
    return [*done, *_join_repositories(layout)]


def project_stages(params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Stages of a project without the source: the repository's, with code digests instead of code, and its own sources."""
    stages: dict[str, dict[str, Any]] = {
        "code": {
            "desc": "Record the version of the package and a digest of the code of each stage",
            "cmd": "python -m pipeline_steps.project",
            "always_changed": True,
            "outs": [{"code.yaml": {"cache": False}}],
            "meta": {"flow": "data"},
        }
    }
    truth = (params.get("evaluate") or {}).get("ground_truth")
    sources = {"ingest": list(source_deps(params)), "evaluate": [truth] if truth else []}
    for name, stage in packaged_stages().items():
        deps = [*sources.get(name, []), *(dep for dep in stage["deps"] if dep in _cached_outs())]
        stages[name] = {
            **{key: stage[key] for key in ("desc", "cmd")},
            **({"deps": deps} if deps else {}),
            "params": [*stage["params"], {"code.yaml": [f"code.{name}"]}],
            **{key: stage[key] for key in ("outs", "metrics", "plots", "meta") if key in stage},
        }
    return stages


def _cached_outs() -> list[str]:
    """Outs that DVC keeps in its cache, and git does not track."""
    return [out for stage in packaged_stages().values() for out in stage["outs"] if isinstance(out, str)]


def _changes(section: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a section that differ from the defaults."""
    found = {}
    for key, value in section.items():
        if isinstance(value, Mapping) and isinstance(defaults.get(key), Mapping):
            value = _changes(value, defaults[key])
            if not value:
                continue
        if value != defaults.get(key, KeyError):
            found[key] = value
    return found


def _pools(folder: Path, pictures: Path, sounds: Path, metadata: Path | None) -> dict[str, Any]:
    """Value of `ingest.pools`."""
    if metadata is None:
        if pictures.resolve() == sounds.resolve():
            return {"media": {"root": _stored(folder, pictures)}}
        return {
            "pictures": {"root": _stored(folder, pictures), "kind": "images"},
            "sounds": {"root": _stored(folder, sounds), "kind": "audio"},
        }
    header, rows = _read_table(metadata)
    bases = {"own": (pictures, sounds), "table": (metadata.parent, metadata.parent)}

    def matches(column: str, base: str) -> int:
        return sum(any((root / row[column]).is_file() for root in set(bases[base])) for row in rows if row[column])

    columns = [name for wanted in FILE_COLUMNS for name in header if name.lower() == wanted]
    choices = [(matches(column, base), column, base) for column in columns for base in bases]
    count, column, base = max(choices, key=lambda choice: choice[0], default=(0, "", ""))
    if not count:
        raise ConfigError(
            f"--metadata: no column of {metadata} names files below {pictures}, {sounds} or {metadata.parent}; "
            f"it has {', '.join(header)}",
            f"name the column of paths {' or '.join(FILE_COLUMNS[:3])}, with paths relative to one of these folders",
        )
    names = {"license": LICENSE, "author": AUTHOR, "source": SOURCE, "group": GROUP}
    found = {key: next((name for name in header if name.lower() in known), None) for key, known in names.items()}
    pools = {}
    for name, kind, root in zip(("pictures", "sounds"), ("images", "audio"), bases[base], strict=True):
        inside = metadata.resolve().is_relative_to(root.resolve())
        table = metadata.resolve().relative_to(root.resolve()).as_posix() if inside else str(metadata.resolve())
        used = {key: value for key, value in found.items() if value}
        columns_of = {"file": column, **used} if column != "file" or used else {}
        pools[name] = {
            "root": _stored(folder, root),
            "kind": kind,
            "metadata": table,
            **({"columns": columns_of} if columns_of else {}),
        }
    return pools


def _read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Column names and first rows of a CSV or Parquet table."""
    try:
        if path.suffix.lower() in {".parquet", ".pq"}:
            import pyarrow.parquet as pq

            table = pq.ParquetFile(path)
            batch = next(table.iter_batches(batch_size=SAMPLED_ROWS), None)
            rows = batch.to_pylist() if batch is not None else []
            return table.schema_arrow.names, [{name: str(value or "") for name, value in row.items()} for row in rows]
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")))
        names = list(reader.fieldnames or ())
        return names, [{name: row.get(name) or "" for name in names} for row in islice(reader, SAMPLED_ROWS)]
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"--metadata: {path} cannot be read: {error}", "give a CSV with a header line, or Parquet") from error


def _stored(folder: Path, path: Path) -> str:
    """`path` for `params.yaml`: relative to the project if it lies inside, so that a copy has its own files; else absolute."""
    inner, outer = path.resolve(), folder.resolve()
    return inner.relative_to(outer).as_posix() if inner.is_relative_to(outer) else str(inner)


def _check_overlap(layout: ProjectPaths, params: Mapping[str, Any]) -> None:
    """Raise ConfigError when a source contains the project or lies in an out: DVC would find a circle."""
    project = layout.root.resolve()
    outs = [project / out for out in _cached_outs()]
    for name, root in pool_roots(params).items():
        source = (project / root).resolve()
        for path in (project, *outs):
            if path.is_relative_to(source) or (path != project and source.is_relative_to(path)):
                raise ConfigError(
                    f"ingest.pools.{name}.root: {source} overlaps with {path}, which the pipeline writes",
                    "choose a project folder beside the files, neither inside nor around them",
                )


def _add_lines(path: Path, lines: Iterable[str]) -> None:
    """Append the lines that a file lacks."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    missing = [line for line in lines if line not in text.splitlines()]
    if missing:
        write_text(path, (text if not text or text.endswith("\n") else text + "\n") + "\n".join(missing) + "\n")


def _join_repositories(layout: ProjectPaths) -> list[str]:
    """Make the project a DVC project in a git repository; one that exists is joined."""
    root = layout.root
    done = []
    top = try_git(root, "rev-parse", "--show-toplevel")
    if top is None:
        _call(root, "git", "init", "--quiet")
        done.append(f"{root}: new git repository")
    elif Path(top).resolve() != root.resolve():
        done.append(f"{root}: in the git repository {top}")
    if not (root / ".dvc").is_dir():
        nested = top is not None and Path(top).resolve() != root.resolve()
        _call(root, sys.executable, "-m", "dvc", "init", "--quiet", *(["--subdir"] if nested else []))
        write_text(root / ".dvc/config", DVC_CONFIG)
        if nested:  # DVC stages its files; what enters somebody's repository is theirs to decide
            try_git(root, "reset", "--quiet", "--", ".dvc", ".dvcignore")
        done.append(f"{root}: new DVC project")
    _add_lines(root / ".dvcignore", DVC_IGNORED)
    return done


def _call(root: Path, *command: str) -> None:
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    try:
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ResourceError(f"{command[0]} is not installed", f"install {command[0]} and run again") from error
    if done.returncode:
        reason = " ".join((done.stderr or done.stdout).split())[-300:]
        raise ConfigError(f"{' '.join(command)} failed in {root}: {reason}", "correct this and run: sonify init " + str(root))


def _yaml(value: Any) -> str:
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = 4096
    buffer = io.StringIO()
    yaml.dump(value, buffer)
    return buffer.getvalue()
