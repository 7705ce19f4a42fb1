"""`sonify doctor`: is this machine and this project fit to run?"""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from pipeline_steps.commands.console import JsonFlag, handle_errors, layout_of, print_result, table
from pipeline_steps.core.errors import StageError
from pipeline_steps.core.git import try_git
from pipeline_steps.core.project_paths import ProjectPaths

FLOORS = {
    "diffusers": ">=0.38",
    "fastapi": "<0.155",
    "gitpython": ">=3.1.59",
    "gradio": ">=6.16",
    "lightning": ">=2.6.6,!=2.6.2,!=2.6.3",
    "mlflow": ">=3.17",
    "pillow": ">=12.3",
    "prefect": ">=3.8",
    "transformers": ">5.2",
}
"""Versions below these have known holes or breakages; `docs/dependencies.md` has the reasons."""

OPTIONAL = {"gradio"}
TARFILE_FIX = {(3, 11): 13, (3, 12): 11, (3, 13): 4}
"""First CPython patch releases whose tarfile is safe (CVE-2025-4517). This project never calls `extractall`."""

GIGABYTE = 1_000_000_000
RWLOCK = ".dvc/tmp/rwlock"
DISK_NEEDED = 3 * GIGABYTE
DISK_WISHED = 10 * GIGABYTE


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One line of the table. `status` is ok, warn or fail; a fail decides the exit code."""

    name: str
    status: str
    found: str
    wanted: str = ""
    cure: str = ""
    exit_code: int = 0


def run_checks(layout: ProjectPaths) -> list[CheckResult]:
    """Every check; one that itself goes wrong is a failed finding, never the end of the doctor."""
    checks: tuple[Callable[[ProjectPaths], Iterator[CheckResult]], ...] = (
        _python, _packages, _compiler, _disk, _gpu, _git, _params, _lock, _weights, _locks, _tracking,
    )  # fmt: skip
    findings: list[CheckResult] = []
    for check in checks:
        try:
            findings += check(layout)
        except StageError as error:
            findings.append(
                CheckResult(check.__name__.strip("_"), "fail", error.reason, cure=error.action, exit_code=error.exit_code)
            )
        except Exception as error:  # a broken install must be shown, not crash the tool that shows it
            findings.append(CheckResult(check.__name__.strip("_"), "fail", f"{type(error).__name__}: {error}", exit_code=1))
    return findings


def _python(_layout: ProjectPaths) -> Iterator[CheckResult]:
    version = sys.version_info
    supported = (3, 11) <= version[:2] < (3, 14)
    found = platform.python_version()
    yield CheckResult(
        "python",
        "ok" if supported else "fail",
        found,
        ">=3.11,<3.14",
        "" if supported else "use Python 3.11 to 3.13",
        2 * (not supported),
    )
    fixed = TARFILE_FIX.get(version[:2])
    if fixed is not None and version.micro < fixed:
        yield CheckResult(
            "python tarfile", "warn", found, f">={version.major}.{version.minor}.{fixed}", "update Python's patch release"
        )


def _packages(_layout: ProjectPaths) -> Iterator[CheckResult]:
    from importlib.metadata import PackageNotFoundError, version

    from packaging.specifiers import SpecifierSet

    for package in ("torch", "numpy", "dvc", *sorted(FLOORS)):
        wanted = FLOORS.get(package, "")
        try:
            found = version(package)
        except PackageNotFoundError:
            if package not in OPTIONAL:
                yield CheckResult(package, "fail", "not installed", wanted, "make install", 2)
            continue
        fits = found in SpecifierSet(wanted, prereleases=True)
        yield CheckResult(
            package,
            "ok" if fits else "fail",
            found,
            wanted,
            "" if fits else f"pip install '{package}{wanted}'",
            0 if fits else 2,
        )


def _compiler(_layout: ProjectPaths) -> Iterator[CheckResult]:
    from importlib.util import find_spec

    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler:
        yield CheckResult("C++ compiler", "ok", compiler)
    elif find_spec("annoy"):
        yield CheckResult("C++ compiler", "ok", "none; annoy is already built")
    else:
        yield CheckResult("C++ compiler", "fail", "none", "annoy is built from source", "install g++ or clang++", exit_code=4)


def _disk(layout: ProjectPaths) -> Iterator[CheckResult]:
    free = shutil.disk_usage(layout.root).free
    status = "fail" if free < DISK_NEEDED else "warn" if free < DISK_WISHED else "ok"
    cure = "" if status == "ok" else "make room; dvc gc --workspace drops cached outs of old runs"
    yield CheckResult(
        "disk", status, f"{free / GIGABYTE:.1f} GB free", f">={DISK_NEEDED / GIGABYTE:.0f} GB", cure, 4 * (status == "fail")
    )


def _gpu(_layout: ProjectPaths) -> Iterator[CheckResult]:
    import torch

    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi")
        cure = "a GPU driver is here, but this torch is a CPU build or too new for it" if driver else ""
        yield CheckResult(
            "GPU",
            "warn" if driver else "ok",
            f"none; torch {torch.__version__} uses {torch.get_num_threads()} cores",
            cure=cure,
        )
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield CheckResult(f"GPU {index}", "ok", f"{name}, {free / GIGABYTE:.1f} of {total / GIGABYTE:.1f} GB free")


def _git(layout: ProjectPaths) -> Iterator[CheckResult]:
    if shutil.which("git") is None:
        yield CheckResult("git", "warn", "not installed", cure="runs are tracked without a commit")
        return
    changed = try_git(layout.root, "status", "--porcelain", "--untracked-files=no", timeout_s=20)
    if changed is None:
        yield CheckResult("git", "warn", "not a repository", cure="git init, so that dvc.lock has a history")
        return
    yield CheckResult("git", "ok", f"{len(changed.splitlines())} changed files" if changed else "clean")


def _params(layout: ProjectPaths) -> Iterator[CheckResult]:
    from pipeline_steps.__main__ import STAGES
    from pipeline_steps.core.config import config_class, load_params, parse_section

    if not layout.params.is_file():
        yield CheckResult("params.yaml", "fail", "missing", cure="sonify run --preset embedded", exit_code=2)
        return
    params = load_params(layout.params)
    problems = []
    for stage in STAGES:
        try:
            parse_section(config_class(stage), stage, params)
        except StageError as error:
            problems.append(error.reason)
    yield CheckResult(
        "params.yaml",
        "fail" if problems else "ok",
        "; ".join(problems) or f"{len(params)} sections",
        exit_code=2 * bool(problems),
    )


def _lock(layout: ProjectPaths) -> Iterator[CheckResult]:
    from pipeline_steps.tracking.lineage.dvc_digests import read_lock

    lock = read_lock(layout.root / "dvc.lock")
    stages = list(lock.get("stages", {}))
    yield CheckResult(
        "dvc.lock", "ok", f"{len(stages)} stages done: {', '.join(stages)}" if stages else "none yet: no stage has run"
    )


def _weights(layout: ProjectPaths) -> Iterator[CheckResult]:
    path = layout.assets / "meta.json"
    if not path.is_file():
        yield CheckResult("weights", "warn", "not fetched", cure="dvc repro assets")
        return
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        missing = [name for name, entry in files.items() if _size(layout.assets / name) != entry["bytes"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield CheckResult("weights", "fail", f"{path} is damaged: {error}", cure="dvc repro --force assets", exit_code=6)
        return
    if missing:
        yield CheckResult(
            "weights", "fail", f"missing or cut: {', '.join(missing)}", cure="dvc repro --force assets", exit_code=6
        )
        return
    yield CheckResult("weights", "ok", f"{len(files)} files (sonify verify hashes them)")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _locks(layout: ProjectPaths) -> Iterator[CheckResult]:
    try:
        pids = lock_holders(layout)
    except (ValueError, KeyError, TypeError, AttributeError):
        path = layout.root / RWLOCK
        yield CheckResult("locks", "fail", f"{path} is broken", cure=f"rm {path} when no dvc is running", exit_code=7)
        return
    living = living_lock_holders(layout)
    if living:
        yield CheckResult("locks", "warn", f"dvc is running: PID {', '.join(map(str, living))}", cure="wait for it, or stop it")
    elif pids:
        yield CheckResult("locks", "ok", f"{len(pids)} left by dead processes; the next run clears them")
    else:
        yield CheckResult("locks", "ok", "none")


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
    entries = [
        item for kind in held.values() for value in kind.values() for item in (value if isinstance(value, list) else [value])
    ]
    return {int(item["pid"]) for item in entries}


def living_lock_holders(layout: ProjectPaths) -> list[int]:
    """Those of `lock_holders` that are alive; empty when the lock file is broken."""
    import psutil

    try:
        return sorted(pid for pid in lock_holders(layout) if psutil.pid_exists(pid))
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def _tracking(layout: ProjectPaths) -> Iterator[CheckResult]:
    from pipeline_steps.tracking.client.offline_queue import all_queues
    from pipeline_steps.tracking.client.uploader import check_reachable
    from pipeline_steps.tracking.errors import StoreUnavailableError
    from pipeline_steps.tracking.settings import read_settings, redact

    settings = read_settings(layout)
    where = redact(settings.uri)
    try:
        check_reachable(settings)
        yield CheckResult("tracking", "ok", f"{settings.mode}: {where}")
    except StoreUnavailableError as error:
        yield CheckResult("tracking", "warn", str(error), cure="stages go on; entries are kept and sent by: sonify sync")
    unsent = sum(queue.unsent() for queue in all_queues(layout))
    if unsent:
        yield CheckResult("tracking spool", "warn", f"{unsent} entries not sent", cure="sonify sync")


@handle_errors
def doctor(context: typer.Context, as_json: JsonFlag = False) -> None:
    """Check versions, compiler, disk, GPU, git, parameters, dvc.lock, weights, locks and tracking."""
    findings = run_checks(layout_of(context))
    code = max((finding.exit_code for finding in findings if finding.status == "fail"), default=0)
    lines = table([finding.status, finding.name, finding.found, finding.wanted] for finding in findings)
    lines += [f"cure for {finding.name}: {finding.cure}" for finding in findings if finding.cure]
    lines.append("all well" if not code else "not fit to run: mend what is marked fail")
    print_result({"healthy": not code, "findings": [asdict(finding) for finding in findings]}, lines, as_json)
    raise typer.Exit(code)
