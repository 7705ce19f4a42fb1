"""Child process that uploads offline queues to MLflow: `python -m pipeline_steps.tracking.client.uploader FOLDER...`.

The folders are the queue of a stage and that of its pipeline run, if it has one.

The uploader runs at low priority and polls for new entries every few seconds while standard input is open. When the pipe
closes (the stage ended or was killed), it uploads the remaining entries and exits. Queues of earlier runs are uploaded first,
oldest first, so that a model is in the store before its evaluation. Exit code 0: everything was uploaded; 5: entries remain.

No entry is stored twice. The byte offset after the last accepted entry is saved after each batch. Every entry is idempotent: a
metric is a primary key of key, value, step and time, artifacts have fixed names, and runs and models are looked up by a tag
before they are created. A lost response therefore makes no duplicate.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.client.offline_queue import FINISHED, OfflineQueue, QueueState, all_queues
from pipeline_steps.tracking.errors import EntryRejectedError, RunDeletedError, StoreUnavailableError
from pipeline_steps.tracking.settings import HTTP_TIMEOUT_S, SYNC_TIMEOUT_S, TrackingSettings, read_settings, redact

if TYPE_CHECKING:
    from pipeline_steps.tracking.client.mlflow_writer import MlflowWriter

POLL_S = 4.0
MAX_BACKOFF_S = 60.0
CONNECT_TIMEOUT_S = 2.0
BUSY = "another process is uploading it"
EXIT_UNSENT = 5


def check_reachable(settings: TrackingSettings) -> None:
    """Open and close a connection to the server, which finds a stopped server without importing mlflow.

    Raises:
        StoreUnavailableError: the connection was refused or timed out.
    """
    if not settings.is_server:
        return
    parts = urlsplit(settings.uri)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise StoreUnavailableError(f"{parts.hostname}:{port} does not answer: {error.strerror or error}") from error


def upload_queue(queue: OfflineQueue, store: MlflowWriter) -> None:
    """Upload every complete entry of a queue in batches; the progress is saved after each batch.

    Raises:
        StoreUnavailableError: the store stopped accepting entries.
    """
    state = queue.state()
    if not queue.unsent():
        return
    here = store.settings.store
    if state.run_id and state.uri not in {here, redact(store.settings.uri)}:
        raise StoreUnavailableError(f"this run was started in {state.uri}; set MLFLOW_TRACKING_URI to it")
    if not state.run_id:
        state.uri, state.run_id = here, store.open_run(queue)
        queue.save_state(state)
    while batch := queue.read(state.offset):
        groups = list(store.groups(batch))
        while groups:
            group = groups.pop(0)
            entries, last = [entry for entry, _ in group], group[-1][0]
            try:
                store.send(queue, state.run_id, entries)
            except EntryRejectedError as error:
                if len(group) > 1:  # send one at a time to find the refused entry
                    groups[:0] = [[item] for item in group]
                    continue
                queue.reject(last, redact(str(error)))
                state.rejected += 1
                print(f"rejected by the store: {last['kind']}: {redact(str(error))}", flush=True)
            except RunDeletedError:
                state = QueueState(uri=here, run_id=store.open_run(queue))
                queue.save_state(state)
                break
            state.offset, state.problem = group[-1][1], ""
            state.sent += len(entries)
            state.ended = str(last["status"]) if last["kind"] == "end" else ""
            queue.save_state(state)


def try_upload(queue: OfflineQueue, make_store: Callable[[], MlflowWriter], settings: TrackingSettings) -> str:
    """Upload one queue under its lock. Returns an empty string, or why entries remain."""
    try:
        with FileLock(queue.lock_file, timeout=0):
            check_reachable(settings)
            upload_queue(queue, make_store())
            return ""
    except Timeout:
        return BUSY
    except StoreUnavailableError as error:
        problem = redact(str(error))[:300]
    except Exception as error:  # mlflow cannot be imported, the disk is full, a defect: the entries stay in the queue
        problem = redact(f"{type(error).__name__}: {error}")[:300]
    with contextlib.suppress(OSError):
        queue.save_state(replace(queue.state(), problem=problem))
    return problem


def _store_factory(settings: TrackingSettings, timeout_s: int) -> Callable[[], MlflowWriter]:
    """Function that creates the store on its first call: mlflow is only imported when there are entries."""

    @functools.cache
    def make_store() -> MlflowWriter:
        from pipeline_steps.tracking.client.mlflow_writer import MlflowWriter

        return MlflowWriter(settings, timeout_s)

    return make_store


def sync(layout: ProjectPaths) -> dict[str, str]:
    """Upload the remaining entries of every queue of the project, oldest first.

    Copies of finished, completely uploaded runs are deleted.

    Returns:
        Queue key -> why entries remain; empty if everything was uploaded.
    """
    settings = read_settings(layout)
    make_store = _store_factory(settings, SYNC_TIMEOUT_S)
    problems: dict[str, str] = {}
    for queue in all_queues(layout):
        problem = try_upload(queue, make_store, settings) if queue.unsent() else ""
        if problem:
            problems[queue.key] = problem
        elif not queue.unsent() and queue.state().ended == FINISHED:
            queue.prune()
    return problems


def main(folders: Sequence[Path]) -> int:
    """Upload the queues in `folders` until standard input closes; returns the exit code."""
    with contextlib.suppress(OSError):
        os.nice(10)
    queues = [OfflineQueue(folder) for folder in folders]
    keys = {queue.key for queue in queues}
    layout = ProjectPaths(folders[0].parents[2])
    settings = read_settings(layout)
    make_store = _store_factory(settings, HTTP_TIMEOUT_S)
    pause, last = POLL_S, False
    earlier_done = False
    while True:
        if not earlier_done:
            earlier = [other for other in all_queues(layout) if other.key not in keys and other.unsent()]
            earlier_done = all(not try_upload(other, make_store, settings) for other in earlier) or last
        problems = [try_upload(queue, make_store, settings) for queue in queues]
        problem = next(filter(None, problems), "")
        if last:
            return EXIT_UNSENT if problem or any(queue.unsent() for queue in queues) else 0
        pause = min(2 * pause, MAX_BACKOFF_S) if problem else POLL_S
        ready, _, _ = select.select([sys.stdin], [], [], pause)
        last = bool(ready)


if __name__ == "__main__":
    sys.exit(main([Path(folder) for folder in sys.argv[1:]]))
