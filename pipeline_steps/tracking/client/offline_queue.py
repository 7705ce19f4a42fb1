"""The spool: what a run wants to say, on local disk before anything else. No mlflow here.

.runs/tracking/<key>/
    run.json        stage, experiment, tags, start time (written once)
    entries.jsonl   one JSON object per line, append only; a torn last line is cut when the run is opened again
    files/          copies of pictures, sounds, artifacts
    state.json      how far the uploader got: store, run id, byte offset (written by the uploader alone)
    rejected.jsonl  entries the store refused for good, with its reason
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline_steps.core.atomic import write_json
from pipeline_steps.core.project_paths import ProjectPaths

FINISHED = "FINISHED"
UNREADABLE = "unreadable"


def spool_root(layout: ProjectPaths) -> Path:
    """Folder of all spools of a project."""
    return layout.runs / "tracking"


@dataclass
class QueueState:
    """How far a spool was carried into a store.

    Attributes:
        uri: the store, without credentials; empty before the first contact.
        run_id: id of the MLflow run; empty before it exists.
        offset: bytes of `entries.jsonl` that are in the store.
        sent: entries in the store.
        rejected: entries the store refused for good.
        ended: status of the run once its last entry is in the store.
        problem: why the last attempt stopped.
    """

    uri: str = ""
    run_id: str = ""
    offset: int = 0
    sent: int = 0
    rejected: int = 0
    ended: str = ""
    problem: str = ""


@dataclass
class OfflineQueue:
    """One run's spool folder. Appending is thread-safe; reading is done by one uploader at a time (it holds a lock)."""

    folder: Path
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def entries_file(self) -> Path:
        return self.folder / "entries.jsonl"

    @property
    def lock_file(self) -> Path:
        return self.folder / "upload.lock"

    @property
    def key(self) -> str:
        return self.folder.name

    def header(self) -> dict[str, Any]:
        """What was written when the run was first opened."""
        return dict(json.loads((self.folder / "run.json").read_text(encoding="utf-8")))

    def append(self, kind: str, **values: Any) -> None:
        """Add one entry; the line is handed to the operating system before this returns, whole or (disk full) not at all."""
        line = json.dumps({"kind": kind, "time": _now_ms(), **values}, ensure_ascii=False, allow_nan=False) + "\n"
        rest = line.encode("utf-8")
        with self._lock, self.entries_file.open("ab", buffering=0) as handle:
            before = handle.tell()
            try:
                while rest:  # the last bytes of a disk are taken; the next call says that it is full
                    rest = rest[handle.write(rest) :]
            except OSError:
                handle.truncate(before)
                raise

    def read(self, offset: int, limit: int = 400) -> list[tuple[dict[str, Any], int]]:
        """Whole entries from byte `offset` on, each with the offset behind it; at most `limit`.

        A line that is no entry becomes one of kind `unreadable`, which no store takes: it ends among the rejected ones.
        """
        found: list[tuple[dict[str, Any], int]] = []
        if not self.entries_file.exists():
            return found
        with self.entries_file.open("rb") as handle:
            handle.seek(offset)
            for line in handle:
                if not line.endswith(b"\n") or len(found) == limit:
                    break
                offset += len(line)
                found.append((_entry(line), offset))
        return found

    def new_folder(self) -> Path:
        """A fresh, empty folder below `files/`, for the copies of one entry."""
        root = self.folder / "files"
        root.mkdir(parents=True, exist_ok=True)
        with self._lock:
            number = sum(1 for _ in root.iterdir())
            path = root / f"{number:06d}"
            path.mkdir()
        return path

    def path_of(self, name: str) -> Path:
        """Path of a copy that an entry names relative to `files/`."""
        return self.folder / "files" / name

    def name_of(self, path: Path) -> str:
        """Inverse of `path_of`."""
        return path.relative_to(self.folder / "files").as_posix()

    def state(self) -> QueueState:
        """How far the uploader got (the beginning, if it never ran)."""
        try:
            return QueueState(**json.loads((self.folder / "state.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return QueueState()

    def save(self, state: QueueState) -> None:
        """Remember how far the uploader got."""
        write_json(self.folder / "state.json", asdict(state))

    def reject(self, entry: dict[str, Any], reason: str) -> None:
        """Keep an entry that the store refused for good, with the reason."""
        with (self.folder / "rejected.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"reason": reason, "entry": entry}, ensure_ascii=False) + "\n")

    def unsent(self) -> int:
        """Entries that are not in the store yet."""
        if not self.entries_file.exists():
            return 0
        with self.entries_file.open("rb") as handle:
            handle.seek(self.state().offset)
            return sum(1 for _ in handle)

    def prune(self) -> None:
        """Drop the copies of a finished run that is wholly in the store; the run id stays."""
        shutil.rmtree(self.folder / "files", ignore_errors=True)
        self.entries_file.unlink(missing_ok=True)

    def last_steps(self) -> dict[str, int]:
        """The highest step of every metric and picture in the spool; what a resumed run need not say again."""
        last: dict[str, int] = {}
        offset = 0
        while batch := self.read(offset):
            for entry, end in batch:
                offset = end
                keys = entry["values"] if entry["kind"] == "metrics" else [entry["key"]] if entry["kind"] == "image" else []
                for key in keys:
                    last[key] = max(last.get(key, -1), int(entry["step"]))
        return last

    def mend(self) -> None:
        """Cut a last line that a killed process left unfinished."""
        if not self.entries_file.exists():
            return
        payload = self.entries_file.read_bytes()
        whole = payload.rfind(b"\n") + 1
        if whole != len(payload):
            with self.entries_file.open("r+b") as handle:
                handle.truncate(whole)


def open_spool(layout: ProjectPaths, stage: str, resume_key: str | None, header: dict[str, Any]) -> OfflineQueue:
    """The spool to write to: the unfinished one of this stage and `resume_key` if there is one, else a new one.

    A run that was killed or failed is continued; a finished one is history, and the same key opens a new run.
    """
    name = _safe(f"{stage}-{resume_key}" if resume_key else f"{stage}-{_now_ms():x}-{os.getpid():x}")
    root = spool_root(layout)
    root.mkdir(parents=True, exist_ok=True)
    number = 0
    while True:
        folder = root / (name if number == 0 else f"{name}.{number}")
        spool = OfflineQueue(folder)
        if not (folder / "run.json").exists():
            folder.mkdir(exist_ok=True)
            write_json(folder / "run.json", {"stage": stage, "key": folder.name, "start_time": _now_ms(), **header})
            return spool
        if resume_key and _same_store(spool, header) and not _finished(spool):
            spool.mend()
            return spool
        number += 1


def all_spools(layout: ProjectPaths) -> Iterator[OfflineQueue]:
    """Every spool of the project, oldest first, so that a model is in the store before its evaluation."""
    root = spool_root(layout)
    if not root.is_dir():
        return
    found = []
    for folder in root.iterdir():
        with contextlib.suppress(OSError, ValueError):
            spool = OfflineQueue(folder)
            found.append((spool.header()["start_time"], folder.name, spool))
    for _, _, spool in sorted(found, key=lambda item: item[:2]):
        yield spool


def _entry(line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if isinstance(entry, dict) and "kind" in entry:
        return entry
    return {"kind": UNREADABLE, "line": line.decode("utf-8", errors="replace")}


def _finished(spool: OfflineQueue) -> bool:
    if spool.state().ended == FINISHED:
        return True
    if not spool.entries_file.exists():
        return False
    with spool.entries_file.open("rb") as handle:
        handle.seek(max(0, spool.entries_file.stat().st_size - 4096))
        last = handle.read().rstrip(b"\n").rsplit(b"\n", 1)[-1]
    return b'"kind": "end"' in last and FINISHED.encode() in last


def pending_model(spool: OfflineQueue, digest: str) -> str:
    """Key of a spool beside `spool` that still has the model with this DVC md5 to send to the same store; else empty."""
    uri = spool.state().uri
    for folder in sorted(spool.folder.parent.iterdir()):
        other = OfflineQueue(folder)
        with contextlib.suppress(OSError, ValueError):
            state = other.state()
            if state.uri in {"", uri} and any(
                entry["kind"] == "model" and entry["digest"] == digest for entry, _ in other.read(state.offset, sys.maxsize)
            ):
                return other.key
    return ""


def _same_store(spool: OfflineQueue, header: dict[str, Any]) -> bool:
    """False when the run already lives in another store than the one named now."""
    return spool.state().uri in {"", header.get("uri", "")}


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:120]


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
