"""Stage graph of `dvc.yaml` and the plan of a run, read with DVC's Python API.

This is the only module that uses DVC's Python API, which is internal (hence `dvc<4`). The `dvc` command runs the stages
(`dvc_subprocess.py`).
"""

from __future__ import annotations

import graphlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pipeline_steps.core.errors import ConfigError, DataError, LockedError
from pipeline_steps.core.presets import flatten

MAX_CHANGES = 3
"""Changed parameters listed in one reason; the others are counted."""
MAX_VALUE_LENGTH = 40
ALWAYS = "always runs"


@dataclass(frozen=True, slots=True)
class StageNode:
    """One stage of `dvc.yaml`. Paths are relative to the project folder."""

    name: str
    cmd: str
    desc: str
    deps: tuple[str, ...]
    outs: tuple[str, ...]  # everything that the stage writes, including metrics
    uncached: tuple[str, ...]  # outs that are tracked by git instead of DVC's cache (`cache: false`)
    metrics: tuple[str, ...]
    params: tuple[str, ...]  # sections (or keys) of `params.yaml` that the stage reads
    upstream: tuple[str, ...]  # names of the stages whose outs the stage reads
    # Execution hints: `retries` after transient failures, `retry_delay_s`, `timeout_s` of one attempt, `tags` of the Prefect
    # task, and the `flow` that runs the stage. A change does not make the stage stale.
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """A stage with the reasons to run it; no reasons: the stage is up to date."""

    node: StageNode
    reasons: tuple[str, ...]

    @property
    def runs(self) -> bool:
        """Whether the stage will be run."""
        return bool(self.reasons)

    @property
    def why(self) -> str:
        """Reasons as one line."""
        return "; ".join(self.reasons) or "nothing to do"


def read_graph(root: Path) -> tuple[StageNode, ...]:
    """Stages of the project at `root` in topological order.

    Raises:
        ConfigError: there is no `dvc.yaml`, or DVC cannot read it.
    """
    with _open(root) as repo:
        stages = _pipeline_stages(repo)
        return tuple(_node(repo, stages[name]) for name in _order(repo, stages))


def make_plan(root: Path, stages: Iterable[str] = (), *, force: bool = False) -> tuple[PlannedStage, ...]:
    """Plan a run of `stages` (default: all) and the stages that they depend on.

    With `force` the targets run even if nothing has changed.

    Raises:
        ConfigError: a stage does not exist, or DVC cannot read the project.
        DataError: a source (a dependency that no stage writes) is missing.
        LockedError: another DVC process holds the lock of this folder.
    """
    targets = tuple(stages)
    with _open(root) as repo:
        found = _pipeline_stages(repo)
        nodes = {name: _node(repo, found[name]) for name in _order(repo, found)}
        if unknown := [name for name in targets if name not in nodes]:
            raise ConfigError(f"there is no stage {unknown[0]!r}", f"use one of {', '.join(nodes)}")
        wanted = with_upstream(tuple(nodes.values()), targets or tuple(nodes))
        forced = set(targets or nodes) if force else set[str]()
        written = {out for node in nodes.values() for out in node.outs}
        plan: dict[str, PlannedStage] = {}
        with _locked(repo):
            for node in wanted:
                reasons = ["forced"] if node.name in forced else []
                reasons += _reasons(repo, found[node.name], node, written)
                # A stage that always runs makes others stale only by what it writes, which their own status shows.
                before = [name for name in node.upstream if name in plan and plan[name].reasons not in ((), (ALWAYS,))]
                reasons += [f"upstream runs: {', '.join(before)}"] if before else []
                plan[node.name] = PlannedStage(node, tuple(reasons))
        return tuple(plan.values())


def with_upstream(nodes: Sequence[StageNode], targets: Iterable[str]) -> tuple[StageNode, ...]:
    """Targets and all stages that they depend on, in the order of `nodes`."""
    by_name = {node.name: node for node in nodes}
    wanted, todo = set[str](), list(targets)
    while todo:
        name = todo.pop()
        if name not in wanted:
            wanted.add(name)
            todo += by_name[name].upstream
    return tuple(node for node in nodes if node.name in wanted)


def stages_of_flow(nodes: Iterable[StageNode], group: str) -> tuple[str, ...]:
    """Names of the stages whose `meta.flow` is `group`.

    Raises:
        ConfigError: there is no such stage.
    """
    names = tuple(node.name for node in nodes if node.meta.get("flow") == group)
    if not names:
        raise ConfigError(f"no stage of dvc.yaml belongs to {group!r}", f"add `flow: {group}` to the meta of its stages")
    return names


def modified_dvc_sources(root: Path) -> dict[str, str]:
    """Path -> kind of change of data that differs from its `.dvc` file.

    `dvc repro --single-item` does not check these files and would record data that no cache has.
    """
    with _open(root) as repo:
        sources = [stage for stage in repo.index.stages if not getattr(stage, "name", None)]
        outs = [out for stage in sources for out in stage.outs]
        return {_relative(repo, out.fs_path): str(what) for out in outs for what in out.status().values()}


def _open(root: Path) -> Any:
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.utils.strictyaml import YAMLSyntaxError

    if not (root / "dvc.yaml").is_file():
        raise ConfigError(f"{root} contains no dvc.yaml", "change to the project folder")
    try:
        repo = Repo(str(root))
        _ = repo.index.graph
        return repo
    except (DvcException, YAMLSyntaxError) as error:
        raise ConfigError(f"DVC cannot read {root}: {_one_line(error)}", "fix the named file, or run: sonify doctor") from error


def link_dvc_cache(project: Path, root: Path) -> None:
    """Configure the worktree `root` to use the DVC cache of `project`; DVC's other state stays inside `root`."""
    from dvc.config import Config
    from dvc.repo import Repo

    with Repo(str(project)) as repo:
        cache = repo.cache.local_cache_dir
    with Config(str(root / ".dvc"), validate=False).edit("local") as local:
        local.setdefault("cache", {}).update({"dir": cache, "type": "reflink,hardlink,copy"})
        local.setdefault("core", {}).update({"site_cache_dir": str(root / ".dvc/tmp/site")})


@contextmanager
def _locked(repo: Any) -> Iterator[None]:
    """Hold DVC's lock, which `status` needs; DVC waits 3 s for it."""
    from dvc.lock import LockError

    try:
        with repo.lock:
            yield
    except LockError as error:
        raise LockedError(
            f"another DVC process uses {repo.root_dir}: {_one_line(error)}", "wait until it ends, or stop it"
        ) from error


def _pipeline_stages(repo: Any) -> dict[str, Any]:
    """Stages of the project's `dvc.yaml` by name; not `.dvc` files, and not a `dvc.yaml` in a subfolder."""
    return {stage.name: stage for stage in repo.index.stages if stage.path_in_repo == "dvc.yaml"}


def _order(repo: Any, stages: Mapping[str, Any]) -> list[str]:
    sorter: graphlib.TopologicalSorter[str] = graphlib.TopologicalSorter()
    for name, stage in stages.items():
        sorter.add(name, *_upstream(repo, stage))
    return list(sorter.static_order())


def _upstream(repo: Any, stage: Any) -> list[str]:
    before = set(repo.index.graph.successors(stage))
    return [name for name, other in _pipeline_stages(repo).items() if other in before]


def _node(repo: Any, stage: Any) -> StageNode:
    from dvc.dependency.param import ParamsDependency

    deps = [dep for dep in stage.deps if not isinstance(dep, ParamsDependency)]
    params = [dep for dep in stage.deps if isinstance(dep, ParamsDependency)]
    return StageNode(
        name=stage.name,
        cmd=stage.cmd if isinstance(stage.cmd, str) else " && ".join(stage.cmd or ()),
        desc=stage.desc or "",
        deps=tuple(_relative(repo, dep.fs_path) for dep in deps),
        outs=tuple(_relative(repo, out.fs_path) for out in stage.outs),
        uncached=tuple(_relative(repo, out.fs_path) for out in stage.outs if not out.use_cache),
        metrics=tuple(_relative(repo, out.fs_path) for out in stage.outs if out.metric),
        params=tuple(str(name) for dep in params for name in dep.params),
        upstream=tuple(_upstream(repo, stage)),
        meta=MappingProxyType(dict(stage.meta or {})),
    )


def _relative(repo: Any, path: str) -> str:
    """`path` relative to the project; a path outside stays absolute."""
    relative = os.path.relpath(path, repo.root_dir)
    return path if relative.startswith("..") else Path(relative).as_posix()


def _reasons(repo: Any, stage: Any, node: StageNode, written: set[str]) -> list[str]:
    """DVC's status of a stage as reasons; `written` are the outs of all stages."""
    if stage.frozen:
        return []
    for dep in node.deps:
        if not (Path(repo.root_dir) / dep).exists() and not overlaps(dep, written):
            raise DataError(f"{node.name} reads {dep}, which does not exist", "create it, or correct the path in params.yaml")
    if not any(dep.hash_info for dep in stage.deps) and not any(out.hash_info for out in stage.outs):
        return ["never run"]
    reasons: list[str] = []
    for part in stage.status().get(stage.addressing, []):
        if isinstance(part, str):
            reasons.append({"changed checksum": "changed command", "always changed": ALWAYS}.get(part, part))
        else:
            for kind, entries in part.items():
                for path, change in entries.items():
                    if isinstance(change, dict):
                        reasons.append(_changed_params(stage, path, change))
                    else:
                        reasons.append(_changed_path("out" if kind == "changed outs" else "dep", path, change))
    return reasons


def overlaps(path: str, outs: set[str]) -> bool:
    """Whether `path` is one of `outs`, inside one of them, or contains one of them."""
    return any(path == out or Path(out) in Path(path).parents or Path(path) in Path(out).parents for out in outs)


def _changed_path(kind: str, path: str, change: str) -> str:
    if change == "not in cache":
        return f"{kind} {path} is not in the cache"
    adjective = {"deleted": "missing", "new": "new"}.get(change, "changed")
    return f"{adjective} {kind} {path}"


def _changed_params(stage: Any, path: str, changed: Mapping[str, Any]) -> str:
    """Reason that lists the first changed parameters: `changed parameter a.b 200 -> 20`."""
    dep = next(dep for dep in stage.deps if str(dep) == path)
    old, new = dict(flatten(dep.hash_info.value or {})), dict(flatten(dep.read_params(flatten=False)))
    keys = [key for key in dict.fromkeys([*new, *old]) if any(key == name or key.startswith(f"{name}.") for name in changed)]
    changes = [
        f"{key} {_shortened(old.get(key, 'unset'))} -> {_shortened(new.get(key, 'unset'))}"
        for key in keys
        if old.get(key, KeyError) != new.get(key, KeyError)
    ]
    more = f", and {len(changes) - MAX_CHANGES} more" if len(changes) > MAX_CHANGES else ""
    noun = "parameter" if len(changes) == 1 else "parameters"
    return f"changed {noun} {', '.join(changes[:MAX_CHANGES] or changed)}{more}"


def _shortened(value: Any) -> str:
    text = str(value) or "''"
    return text if len(text) <= MAX_VALUE_LENGTH else text[: MAX_VALUE_LENGTH - 3] + "..."


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
