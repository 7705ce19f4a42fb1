"""The child process that carries spools into MLflow: `python -m pipeline_steps.tracking.client.uploader FOLDER`.

It works at low priority while standard input is open, looks for new entries every few seconds, and when the pipe closes (the
stage ended, or was killed) it sends what is left and ends. Left-overs of earlier runs go first, oldest first, so a model is in
the store before its evaluation. Exit code 0: all sent; 5: something stays in the spool.

Nothing is sent twice: the byte offset behind the last accepted entry is saved after each batch, and every entry is idempotent
in the store (a metric is a primary key of key, value, step and time; artifacts have fixed names; runs and models are looked up
by a tag before they are made), so even an answer lost on the way makes no duplicate.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.client.offline_queue import FINISHED, OfflineQueue, QueueState, all_spools
from pipeline_steps.tracking.errors import EntryRejectedError, RunDeletedError, StoreUnavailableError
from pipeline_steps.tracking.settings import HTTP_TIMEOUT_S, SYNC_TIMEOUT_S, TrackingSettings, read_settings, redact

if TYPE_CHECKING:
    from pipeline_steps.tracking.client.mlflow_client import MlflowStore

POLL_S = 4.0
MAX_BACKOFF_S = 60.0
CONNECT_TIMEOUT_S = 2.0
BUSY = "another process is sending it"
EXIT_UNSENT = 5


def check_reachable(settings: TrackingSettings) -> None:
    """Open and close a connection to the server: a dead one is found in milliseconds, before mlflow is even imported.

    Raises:
        OutageError: nobody listens.
    """
    if not settings.is_server:
        return
    parts = urlsplit(settings.uri)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise StoreUnavailableError(f"{parts.hostname}:{port} does not answer: {error.strerror or error}") from error


def upload_queue(spool: OfflineQueue, store: MlflowStore) -> None:
    """Send every whole entry of a spool, batch by batch, remembering each step.

    Raises:
        OutageError: the store stopped taking entries.
    """
    state = spool.state()
    if not spool.unsent():
        return
    here = redact(store.settings.uri)
    if state.run_id and state.uri != here:
        raise StoreUnavailableError(f"this run lives in {state.uri}; set MLFLOW_TRACKING_URI to it")
    if not state.run_id:
        state.uri, state.run_id = here, store.open_run(spool)
        spool.save(state)
    while batch := spool.read(state.offset):
        for group in store.groups(batch):
            entries = [entry for entry, _ in group]
            try:
                store.send(spool, state.run_id, entries)
            except EntryRejectedError as error:
                if len(entries) > 1:  # find the one that is refused: one by one
                    for entry, end in group:
                        _send_one(spool, store, state, entry, end)
                    continue
                _refuse(spool, state, entries[0], error)
            except RunDeletedError:
                state = QueueState(uri=here, run_id=store.open_run(spool))
                spool.save(state)
                break
            _advance(spool, state, group[-1][1], len(entries), entries[-1])


def _send_one(spool: OfflineQueue, store: MlflowStore, state: QueueState, entry: dict[str, object], end: int) -> None:
    try:
        store.send(spool, state.run_id, [entry])
    except EntryRejectedError as error:
        _refuse(spool, state, entry, error)
    _advance(spool, state, end, 1, entry)


def _refuse(spool: OfflineQueue, state: QueueState, entry: dict[str, object], error: EntryRejectedError) -> None:
    spool.reject(entry, redact(str(error)))
    state.rejected += 1
    print(f"rejected by the store: {entry.get('kind')}: {redact(str(error))}", flush=True)


def _advance(spool: OfflineQueue, state: QueueState, offset: int, count: int, last: dict[str, object]) -> None:
    state.offset = offset
    state.sent += count
    state.problem = ""
    state.ended = str(last["status"]) if last["kind"] == "end" else ""
    spool.save(state)


def try_upload(spool: OfflineQueue, make_store: Callable[[], MlflowStore], settings: TrackingSettings) -> str:
    """Carry one spool under its lock. Returns the empty string, or why something is left."""
    lock = FileLock(spool.lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return BUSY
    try:
        check_reachable(settings)
        upload_queue(spool, make_store())
    except StoreUnavailableError as error:
        problem = redact(str(error))[:300]
    except Exception as error:  # mlflow cannot be imported, the disk is full, a defect: the entries are safe in the spool
        problem = redact(f"{type(error).__name__}: {error}")[:300]
    else:
        problem = ""
    finally:
        lock.release()
    if problem:
        with contextlib.suppress(OSError):
            state = spool.state()
            state.problem = problem
            spool.save(state)
    return problem


def _store_maker(settings: TrackingSettings, timeout_s: int) -> Callable[[], MlflowStore]:
    made: list[MlflowStore] = []

    def make() -> MlflowStore:
        if not made:
            from pipeline_steps.tracking.client.mlflow_client import MlflowStore

            made.append(MlflowStore(settings, timeout_s))
        return made[0]

    return make


def sync(layout: ProjectPaths, timeout_s: int = SYNC_TIMEOUT_S) -> dict[str, str]:
    """Send what every spool of the project still holds, oldest first. Returns spool key -> problem, empty when all is sent.

    Finished and wholly sent spools lose their copies; the run id stays.
    """
    settings = read_settings(layout)
    make = _store_maker(settings, timeout_s)
    problems: dict[str, str] = {}
    for spool in all_spools(layout):
        problem = try_upload(spool, make, settings) if spool.unsent() else ""
        if problem:
            problems[spool.key] = problem
        elif not spool.unsent() and spool.state().ended == FINISHED:
            spool.prune()
    return problems


def main(folder: Path) -> int:
    """Serve the spool in `folder` until standard input closes; see the module's docstring."""
    with contextlib.suppress(OSError):
        os.nice(10)
    spool = OfflineQueue(folder)
    layout = ProjectPaths(folder.parents[2])
    settings = read_settings(layout)
    make = _store_maker(settings, HTTP_TIMEOUT_S)
    pause, last = POLL_S, False
    earlier_done = False
    while True:
        if not earlier_done:
            earlier = [other for other in all_spools(layout) if other.key != spool.key and other.unsent()]
            earlier_done = all(not try_upload(other, make, settings) for other in earlier) or last
        problem = try_upload(spool, make, settings)
        if last:
            return EXIT_UNSENT if problem or spool.unsent() else 0
        pause = min(2 * pause, MAX_BACKOFF_S) if problem else POLL_S
        ready, _, _ = select.select([sys.stdin], [], [], pause)
        last = bool(ready)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
