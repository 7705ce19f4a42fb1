"""`sonify doctor`: checks of this machine and this project."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Annotated

import typer

from pipeline_steps.commands.console import CheckResult, JsonFlag, handle_errors, layout_of, print_result, table
from pipeline_steps.core.errors import ConfigError, IntegrityError, LockedError, ResourceError, StageError, load_error_file
from pipeline_steps.core.git import try_git
from pipeline_steps.core.project_paths import ProjectPaths

DISTRIBUTION = "seeing-sound"
TARFILE_FIX = {(3, 11): 13, (3, 12): 11, (3, 13): 4}
"""First CPython patch releases whose tarfile is safe (CVE-2025-4517). This project never calls `extractall`."""

GIGABYTE = 1_000_000_000
RWLOCK = ".dvc/tmp/rwlock"
REQUIRED_DISK_BYTES = 3 * GIGABYTE
RECOMMENDED_DISK_BYTES = 10 * GIGABYTE
BROKEN_FILE_ERRORS = (ValueError, KeyError, TypeError, AttributeError)


def run_checks(layout: ProjectPaths) -> list[CheckResult]:
    """Results of all checks; a check that raises an error counts as failed."""
    checks: tuple[Callable[[ProjectPaths], Iterator[CheckResult]], ...] = (
        _python, _packages, _compiler, _disk, _gpu, _git, _params, _pool, _lock, _last_run, _weights, _locks, _tracking,
    )  # fmt: skip
    results: list[CheckResult] = []
    for check in checks:
        name = check.__name__.strip("_")
        try:
            results += check(layout)
        except StageError as error:
            results.append(CheckResult(name, "fail", error.reason, fix=error.action, exit_code=error.exit_code))
        except Exception as error:  # a broken installation must be reported, whatever it raises
            results.append(CheckResult(name, "fail", f"{type(error).__name__}: {error}", exit_code=1))
    return results


def _require(name: str, good: bool, found: str, wanted: str, fix: str, code: int) -> CheckResult:
    return CheckResult(name, "ok", found, wanted) if good else CheckResult(name, "fail", found, wanted, fix, code)


def _python(_layout: ProjectPaths) -> Iterator[CheckResult]:
    version, found = sys.version_info, platform.python_version()
    supported = (3, 11) <= version[:2] < (3, 14)
    yield _require("python", supported, found, ">=3.11,<3.14", "use Python 3.11 to 3.13", ConfigError.exit_code)
    safe = TARFILE_FIX.get(version[:2])
    if safe is not None and version.micro < safe:
        wanted = f">={version.major}.{version.minor}.{safe}"
        yield CheckResult("python tarfile", "warn", found, wanted, "update Python's patch release")


def _packages(_layout: ProjectPaths) -> Iterator[CheckResult]:
    """Runtime dependencies of the installed distribution and their version bounds (reasons: docs/contributing)."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in requires(DISTRIBUTION) or ()]
    except PackageNotFoundError:
        yield CheckResult(DISTRIBUTION, "fail", "not installed", fix="make install", exit_code=ConfigError.exit_code)
        return
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, bounds = requirement.name, requirement.specifier
        try:
            found = version(name)
        except PackageNotFoundError:
            yield CheckResult(name, "fail", "not installed", str(bounds), "make install", ConfigError.exit_code)
            continue
        good = bounds.contains(found, prereleases=True)
        yield _require(name, good, found, str(bounds), f"pip install '{name}{bounds}'", ConfigError.exit_code)


def _compiler(_layout: ProjectPaths) -> Iterator[CheckResult]:
    from importlib.util import find_spec

    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    built = find_spec("annoy") is not None
    text = found or ("none; annoy is already built" if built else "none")
    wanted = "" if found or built else "annoy is built from source"
    yield _require("C++ compiler", bool(found) or built, text, wanted, "install g++ or clang++", ResourceError.exit_code)


def _disk(layout: ProjectPaths) -> Iterator[CheckResult]:
    free = shutil.disk_usage(layout.root).free
    found, wanted = f"{free / GIGABYTE:.1f} GB free", f">={REQUIRED_DISK_BYTES / GIGABYTE:.0f} GB"
    fix = "free disk space; dvc gc --workspace removes cached outs of old runs"
    if REQUIRED_DISK_BYTES <= free < RECOMMENDED_DISK_BYTES:
        yield CheckResult("disk", "warn", found, wanted, fix)
    else:
        yield _require("disk", free >= RECOMMENDED_DISK_BYTES, found, wanted, fix, ResourceError.exit_code)


def _gpu(_layout: ProjectPaths) -> Iterator[CheckResult]:
    import torch

    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi")
        fix = "a GPU driver is installed; install a CUDA build of torch that supports it" if driver else ""
        found = f"none; torch {torch.__version__} uses {torch.get_num_threads()} cores"
        yield CheckResult("GPU", "warn" if driver else "ok", found, fix=fix)
    for index in range(torch.cuda.device_count()):
        free, total = (amount / GIGABYTE for amount in torch.cuda.mem_get_info(index))
        found = f"{torch.cuda.get_device_name(index)}, {free:.1f} of {total:.1f} GB free"
        yield CheckResult(f"GPU {index}", "ok", found)


def _git(layout: ProjectPaths) -> Iterator[CheckResult]:
    if shutil.which("git") is None:
        yield CheckResult("git", "warn", "not installed", fix="install git; without it runs are tracked without a commit")
        return
    changed = try_git(layout.root, "status", "--porcelain", "--untracked-files=no", timeout_s=20)
    if changed is None:
        yield CheckResult("git", "warn", "not a repository", fix="git init; it keeps the history of dvc.lock")
    else:
        yield CheckResult("git", "ok", f"{len(changed.splitlines())} changed files" if changed else "clean")


def _params(layout: ProjectPaths) -> Iterator[CheckResult]:
    from pipeline_steps.__main__ import STAGES
    from pipeline_steps.core.config import load_params
    from pipeline_steps.core.presets import validate_params

    if not layout.params.is_file():
        raise ConfigError("params.yaml is missing", "git checkout params.yaml")
    params = load_params(layout.params)
    validate_params(params, "correct params.yaml", STAGES)
    yield CheckResult("params", "ok", f"{len(params)} sections")


def _pool(layout: ProjectPaths) -> Iterator[CheckResult]:
    from pipeline_steps.core.pool_check import check_project_pools

    check_project_pools(layout)
    yield CheckResult("pool", "ok", "DVC can hash every entry of the pools")


def _lock(layout: ProjectPaths) -> Iterator[CheckResult]:
    from pipeline_steps.tracking.lineage.dvc_digests import read_lock

    stages = list(read_lock(layout.lock).get("stages", {}))
    yield CheckResult("dvc.lock", "ok", f"{len(stages)} stages: {', '.join(stages)}" if stages else "no stage has run yet")


def _last_run(layout: ProjectPaths) -> Iterator[CheckResult]:
    """Stage that failed last; the next run of a stage removes its record."""
    error = load_error_file(layout.root)
    if error is None:
        yield CheckResult("last run", "ok", "no stage failed")
    else:
        found = f"stage {error.stage or 'unknown'} failed with exit code {error.exit_code}: {error.reason}"
        yield CheckResult("last run", "warn", found, fix=error.action or "sonify run shows the whole message")


def _weights(layout: ProjectPaths) -> Iterator[CheckResult]:
    path = layout.assets / "meta.json"
    if not path.is_file():
        yield CheckResult("weights", "warn", "not fetched", fix="dvc repro assets")
        return
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        sizes = {name: path.stat().st_size for name in files if (path := layout.assets / name).is_file()}
        wrong = [name for name, entry in files.items() if sizes.get(name) != entry["bytes"]]
    except BROKEN_FILE_ERRORS as error:
        raise IntegrityError(f"{path} is damaged: {error}", "dvc repro --force assets") from error
    found = f"missing or truncated: {', '.join(wrong)}" if wrong else f"{len(files)} files (sonify verify hashes them)"
    yield _require("weights", not wrong, found, "", "dvc repro --force assets", IntegrityError.exit_code)


def _locks(layout: ProjectPaths) -> Iterator[CheckResult]:
    try:
        pids = lock_holders(layout)
    except BROKEN_FILE_ERRORS as error:
        path = layout.root / RWLOCK
        raise LockedError(f"{path} is damaged: {error}", f"rm {path} when no dvc is running") from error
    running = living_lock_holders(layout)
    if running:
        yield CheckResult("locks", "warn", f"dvc is running: PID {', '.join(map(str, running))}", fix="wait for it, or stop it")
    else:
        yield CheckResult("locks", "ok", f"{len(pids)} of exited processes; the next run removes them" if pids else "none")


def lock_holders(layout: ProjectPaths) -> set[int]:
    """PIDs named in DVC's lock file: one writer (a mapping) or several readers (a list) per path.

    Raises:
        ValueError: the file is not DVC's lock (a crash while it was written).
    """
    try:
        held = json.loads((layout.root / RWLOCK).read_text(encoding="utf-8") or "{}")
    except FileNotFoundError:
        return set()
    if not isinstance(held, dict):
        raise ValueError("not a mapping")
    values = [value for kind in held.values() for value in kind.values()]
    return {int(item["pid"]) for value in values for item in (value if isinstance(value, list) else [value])}


def living_lock_holders(layout: ProjectPaths) -> list[int]:
    """Those of `lock_holders` whose process exists; empty when the lock file is damaged."""
    import psutil

    try:
        return sorted(pid for pid in lock_holders(layout) if psutil.pid_exists(pid))
    except BROKEN_FILE_ERRORS:
        return []


def check_unlocked(layout: ProjectPaths) -> None:
    """Raise LockedError if another DVC process holds a lock on this project."""
    if holders := living_lock_holders(layout):
        raise LockedError(f"another dvc is running in this project (PID {', '.join(map(str, holders))})", "wait or stop it")


def _tracking(layout: ProjectPaths) -> Iterator[CheckResult]:
    from pipeline_steps.tracking.client.offline_queue import all_queues
    from pipeline_steps.tracking.client.uploader import check_reachable
    from pipeline_steps.tracking.errors import StoreUnavailableError
    from pipeline_steps.tracking.settings import read_settings, redact

    settings = read_settings(layout)
    try:
        check_reachable(settings)
        yield CheckResult("tracking", "ok", f"{settings.mode}: {redact(settings.uri)}")
    except StoreUnavailableError as error:
        yield CheckResult("tracking", "warn", str(error), fix="sonify sync uploads the queued entries; stages run without it")
    if unsent := sum(queue.unsent() for queue in all_queues(layout)):
        yield CheckResult("tracking queue", "warn", f"{unsent} entries not uploaded", fix="sonify sync")


@handle_errors
def doctor(
    context: typer.Context,
    as_json: JsonFlag = False,
    online: Annotated[
        bool, typer.Option("--online", help="Also check the checkpoints and servers that params.yaml names.")
    ] = False,
) -> None:
    """Check versions, compiler, disk, GPU, git, parameters, dvc.lock, the last run, weights, locks and tracking."""
    layout = layout_of(context)
    results = run_checks(layout)
    if online:
        from pipeline_steps.commands.preflight import run_preflight

        results += run_preflight(layout)
    code = max((result.exit_code for result in results if result.status == "fail"), default=0)
    lines = table([result.status, result.name, result.found, result.wanted] for result in results)
    lines += [f"fix for {result.name}: {result.fix}" for result in results if result.fix]
    lines.append("fix what is marked fail" if code else "all required checks pass")
    print_result({"healthy": not code, "findings": [asdict(result) for result in results]}, lines, as_json)
    raise typer.Exit(code)
