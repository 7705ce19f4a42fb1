"""Offline queue: tracking entries are appended to local disk first and uploaded later. Does not import mlflow.

.runs/tracking/<key>/
    run.json        stage, store, tags, start time (written once)
    entries.jsonl   one JSON object per line, append only; a partial last line is cut when the run is opened again
    files/          copies of images, audio, artifacts
    state.json      upload progress: store, run id, byte offset (written by the uploader only)
    rejected.jsonl  entries that the store refused permanently, with its reason
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


def queue_root(layout: ProjectPaths) -> Path:
    """Folder of a project's queues."""
    return layout.runs / "tracking"


@dataclass
class QueueState:
    """Upload progress of a queue.

    Attributes:
        uri: the store, without credentials; empty before the first upload.
        run_id: MLflow run id; empty before the run exists.
        offset: bytes of `entries.jsonl` that were uploaded.
        sent: number of uploaded entries.
        rejected: number of entries that the store refused permanently.
        ended: status of the run after its last entry was uploaded, else empty.
        problem: why the last attempt failed, else empty.
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
    """Queue folder of one run. Appending is thread-safe; one uploader at a time reads, under a file lock."""

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
        """Content of `run.json`."""
        return dict(json.loads((self.folder / "run.json").read_text(encoding="utf-8")))

    def append(self, kind: str, **values: Any) -> None:
        """Append one entry. A line that cannot be written completely (disk full) is removed again.

        Raises:
            OSError: the entry could not be written.
        """
        line = json.dumps({"kind": kind, "time": _now_ms(), **values}, ensure_ascii=False, allow_nan=False) + "\n"
        rest = line.encode("utf-8")
        with self._lock, self.entries_file.open("ab", buffering=0) as handle:
            before = handle.tell()
            try:
                while rest:  # on a full disk the last write is short and only the next one fails
                    rest = rest[handle.write(rest) :]
            except OSError:
                handle.truncate(before)
                raise

    def read(self, offset: int, limit: int = 400) -> list[tuple[dict[str, Any], int]]:
        """Return at most `limit` complete entries from byte `offset` on, each with the offset of its end.

        A line that is not an entry is returned as kind `unreadable`; the uploader rejects it.
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
                found.append((_parse_entry(line), offset))
        return found

    def new_folder(self) -> Path:
        """Create an empty folder below `files/` for the copies of one entry."""
        root = self.folder / "files"
        root.mkdir(parents=True, exist_ok=True)
        with self._lock:
            number = sum(1 for _ in root.iterdir())
            path = root / f"{number:06d}"
            path.mkdir()
        return path

    def path_of(self, name: str) -> Path:
        """Path of a copy from its name relative to `files/`."""
        return self.folder / "files" / name

    def name_of(self, path: Path) -> str:
        """Inverse of `path_of`."""
        return path.relative_to(self.folder / "files").as_posix()

    def state(self) -> QueueState:
        """Upload progress; the initial state if nothing was uploaded yet."""
        try:
            return QueueState(**json.loads((self.folder / "state.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return QueueState()

    def save_state(self, state: QueueState) -> None:
        """Write the upload progress."""
        write_json(self.folder / "state.json", asdict(state))

    def reject(self, entry: dict[str, Any], reason: str) -> None:
        """Write a permanently refused entry to `rejected.jsonl`."""
        with (self.folder / "rejected.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"reason": reason, "entry": entry}, ensure_ascii=False) + "\n")

    def unsent(self) -> int:
        """Number of entries that were not uploaded yet."""
        if not self.entries_file.exists():
            return 0
        with self.entries_file.open("rb") as handle:
            handle.seek(self.state().offset)
            return sum(1 for _ in handle)

    def prune(self) -> None:
        """Delete entries and copies of a finished, completely uploaded run; `state.json` stays."""
        shutil.rmtree(self.folder / "files", ignore_errors=True)
        self.entries_file.unlink(missing_ok=True)

    def last_steps(self) -> dict[str, int]:
        """Highest step of every metric and image in the queue; a resumed run does not log them again."""
        last: dict[str, int] = {}
        offset = 0
        while batch := self.read(offset):
            for entry, end in batch:
                offset = end
                keys = entry["values"] if entry["kind"] == "metrics" else [entry["key"]] if entry["kind"] == "image" else []
                for key in keys:
                    last[key] = max(last.get(key, -1), int(entry["step"]))
        return last

    def truncate_partial_line(self) -> None:
        """Remove an incomplete last line of a killed process."""
        if self.entries_file.exists():
            os.truncate(self.entries_file, self.entries_file.read_bytes().rfind(b"\n") + 1)


def open_queue(layout: ProjectPaths, stage: str, resume_key: str | None, header: dict[str, Any]) -> OfflineQueue:
    """Open the unfinished queue of this stage and `resume_key` if there is one, else a new queue.

    A killed or failed run is resumed. A finished run is not: the same key then opens a new run.
    """
    key = resume_key or f"{_now_ms():x}-{os.getpid():x}"
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", f"{stage}-{key}")[:120]
    root = queue_root(layout)
    root.mkdir(parents=True, exist_ok=True)
    number = 0
    while True:
        folder = root / (name if number == 0 else f"{name}.{number}")
        queue = OfflineQueue(folder)
        if not (folder / "run.json").exists():
            folder.mkdir(exist_ok=True)
            write_json(folder / "run.json", {"stage": stage, "key": folder.name, "start_time": _now_ms(), **header})
            return queue
        if resume_key and queue.state().uri in {"", header.get("uri", "")} and not _is_finished(queue):
            queue.truncate_partial_line()
            return queue
        number += 1


def all_queues(layout: ProjectPaths) -> Iterator[OfflineQueue]:
    """Yield every queue of the project, oldest first, so that a model is uploaded before its evaluation."""
    root = queue_root(layout)
    if not root.is_dir():
        return
    found = []
    for folder in root.iterdir():
        with contextlib.suppress(OSError, ValueError):
            queue = OfflineQueue(folder)
            found.append((queue.header()["start_time"], folder.name, queue))
    for _, _, queue in sorted(found, key=lambda item: item[:2]):
        yield queue


def _parse_entry(line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if isinstance(entry, dict) and "kind" in entry:
        return entry
    return {"kind": UNREADABLE, "line": line.decode("utf-8", errors="replace")}


def _is_finished(queue: OfflineQueue) -> bool:
    """Whether the run ended successfully, whether or not its entries were uploaded."""
    lines = queue.entries_file.read_bytes().splitlines() if queue.entries_file.exists() else []
    last = _parse_entry(lines[-1]) if lines else {}
    return FINISHED in (queue.state().ended, last.get("status"))


def pending_model(queue: OfflineQueue, digest: str) -> str:
    """Key of another queue that holds the model with this DVC md5 for the same store; empty if there is none."""
    uri = queue.state().uri
    for folder in sorted(queue.folder.parent.iterdir()):
        other = OfflineQueue(folder)
        with contextlib.suppress(OSError, ValueError):
            state = other.state()
            if state.uri in {"", uri} and any(
                entry["kind"] == "model" and entry["digest"] == digest for entry, _ in other.read(state.offset, sys.maxsize)
            ):
                return other.key
    return ""


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
