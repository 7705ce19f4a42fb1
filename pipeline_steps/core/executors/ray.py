"""`engine: ray`: batches of ids through a pool of actors, as Ray Data `map_batches`. The only importer of ray.

Only ids and failures travel; rows go from the actor to the memo. Actors restart and their batches are done again where
there is room (Ray Data's own fault tolerance), so a batch is done at least once, and twice only if its actor died over it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import secrets
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline_steps.core.errors import ConfigError, ResourceError, ServiceError, StageError, error_from_dict
from pipeline_steps.core.executors.base import Failure, ItemProcessor, RayConfig
from pipeline_steps.core.executors.local import process_and_cache
from pipeline_steps.core.hashing import fingerprint

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 128 * 2**20
"""Shared memory of a Ray started here: only ids pass through it."""
CONNECT_SECONDS = 5.0
STARTS = 3
INIT_DEATHS = 3
"""Actors in a row that may die while they load (memory, a lost node) before the stage stops."""

OUTCOME = pa.schema([(name, pa.string()) for name in ("id", "code", "reason", "error")])
"""What an actor answers for an id. `code` is empty when its row is in the memo; `error` stops the stage."""


class RayWorker:
    """One worker: the model loaded once, then batches of ids.

    An error that stops the stage is an answer, not an exception: Ray would wrap it, or start the actor over and over.
    """

    def __init__(self, pickled: bytes, part: int, folder: str) -> None:
        self._part, self._error = part, ""
        try:
            self._enter(folder)
            work: ItemProcessor = pickle.loads(pickled)  # noqa: S301 - by the driver, through Ray, which pickles everything
            self._work = work
            work.load()
            if fingerprint(work.describe()) != work.cache.fingerprint:
                raise ConfigError(
                    f"the actor on {socket.gethostname()} would not compute what the driver asks for "
                    "(another device's precision, or other weights)",
                    "set device and precision by name, and share data/assets or the checkpoint",
                )
        except Exception as error:
            self._error = _serialize_error(error)

    def _enter(self, folder: str) -> None:
        """Work where the driver works, so that relative paths mean the same."""
        if not Path(folder).is_dir():
            raise ConfigError(f"{socket.gethostname()} does not see {folder}", "share the project folder under the same path")
        os.chdir(folder)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Outcomes [N] of ids [N]."""
        ids = batch["id"].to_pylist()
        outcomes: dict[str, Failure] = {}
        try:
            if not self._error:
                for key, result in process_and_cache(self._work, ids, self._part):
                    outcomes[key] = result if isinstance(result, tuple) else ("", "")
        except Exception as error:
            return _outcome_table(ids, outcomes, _serialize_error(error))
        return _outcome_table(ids, outcomes, self._error)


def _outcome_table(ids: Sequence[str], outcomes: dict[str, Failure], error: str) -> pa.Table:
    rows = [(key, *outcomes.get(key, ("", "")), error) for key in ids]
    return pa.table([pa.array(column, pa.string()) for column in zip(*rows, strict=True)], schema=OUTCOME)


def _serialize_error(error: Exception) -> str:
    """An error as JSON; one that is no StageError goes as its trace."""
    if isinstance(error, StageError):
        return json.dumps(error.as_dict(), default=str)
    return json.dumps({"kind": "", "reason": "".join(traceback.format_exception(error))})


def _deserialize_error(text: str) -> Exception:
    """Error from the JSON of `_serialize_error`."""
    fields = json.loads(text)
    return error_from_dict(fields) if fields["kind"] else RuntimeError(f"an actor failed:\n{fields['reason']}")


def run_on_ray(
    work: ItemProcessor, ids: Sequence[str], batch_size: int, settings: RayConfig
) -> Iterator[tuple[str, Failure | None]]:
    """(id, None) when its row is in the memo, (id, failure) otherwise, batch by batch as actors finish them.

    Raises:
        ConfigError: ray is missing or of another version than the cluster; an actor would compute something else.
        ResourceError: a Ray of this machine alone has no room for one actor.
        ServiceError: no cluster at the address, or it finished no batch for `no_progress_timeout_seconds`.
        StageError: what stopped the work inside an actor.
    """
    with _ray_session(settings) as ray:
        from ray.data import exceptions as halted

        _configure_ray_data(ray, settings)
        tables = [pa.table({"id": pa.array(ids[at : at + batch_size], pa.string())}) for at in range(0, len(ids), batch_size)]
        most = min(settings.max_actors, len(tables))
        outcomes = ray.data.from_arrow(tables).map_batches(
            RayWorker,
            fn_constructor_args=(ray.cloudpickle.dumps(work), batch_size, str(Path.cwd())),
            batch_size=batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                min_size=min(settings.min_actors, most), max_size=most, max_tasks_in_flight_per_actor=2
            ),
            num_cpus=settings.cpus_per_actor,
            num_gpus=settings.gpus_per_actor or None,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(_threads())}},
        )
        try:
            for batch in outcomes.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
                for key, code, reason, error in zip(*(batch[name].to_pylist() for name in OUTCOME.names), strict=True):
                    if error:
                        raise _deserialize_error(error)
                    yield key, (code, reason) if code else None
        except (ray.exceptions.RayError, halted.ExecutionTimeoutError, halted.SystemException) as error:
            reason = " ".join(str(error).split())[:500]
            raise ServiceError(
                f"Ray came to a halt: {type(error).__name__}: {reason}",
                "run again: finished items are cached; see the cluster's logs, and <stage>.ray.no_progress_timeout_seconds",
                transient=True,
            ) from error


def _threads() -> int:
    """Threads that a network has here. Actors get as many: with another number of them sums round differently."""
    import torch

    return torch.get_num_threads()


def _configure_ray_data(ray: Any, settings: RayConfig) -> None:
    """No progress bars and no advice on the terminal; how long to wait, and what to forgive."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = settings.no_progress_timeout_seconds
    context.max_consecutive_actor_init_deaths = INIT_DEATHS


@contextmanager
def _ray_session(settings: RayConfig) -> Iterator[Any]:
    """Ray, connected; it is left again at the end, and stopped if it was started here."""
    # Without the second, what is left of a stopped run asks for Ray after its shutdown and so starts another one.
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ENABLE_AUTO_CONNECT="0")
    own = settings.address == ""
    if own:  # its ports are open to the network: whoever connects must know a token that only this process's children have
        if sys.modules.get("ray") and os.environ.get("RAY_AUTH_MODE") != "token":  # Ray reads the mode when it is imported
            raise ConfigError(
                "engine ray: this process imported ray before, so a Ray of its own would have no token",
                "set RAY_AUTH_MODE=token before `import ray`, or name a cluster in <stage>.ray.address",
            )
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray reads it once: the same for every later start
        os.environ.setdefault("RAY_worker_niceness", "0")  # actors are the stage itself, and not to wait for all else
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError(
            f"engine ray needs the extra `ray` ({error})", "pip install 'seeing-sound[ray]', or set engine: local"
        ) from error
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    _connect(ray, settings)
    if main and handler is not None:
        signal.signal(signal.SIGTERM, handler)  # Ray puts its own in place, and a stopped stage would look like a crash
    try:
        if own:
            _check_room(ray.cluster_resources(), settings)
        yield ray
    finally:
        ray.shutdown()


def _connect(ray: Any, settings: RayConfig) -> None:
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if not settings.address:
        _start(ray, quiet)
        return
    action = "start it (ray start --head), correct <stage>.ray.address, or set engine: local"
    try:
        if settings.address != "auto":  # Ray itself would wait for minutes
            host, port = settings.address.rsplit(":", 1)
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        ray.init(address=settings.address, **quiet)
    except (OSError, OverflowError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ServiceError(f"no Ray cluster at {settings.address!r}: {reason}", action, transient=True) from error
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        if "ersion mismatch" in reason:
            raise ConfigError(
                f"the Ray cluster at {settings.address!r} is another one: {reason}", "one image for all"
            ) from error
        raise ServiceError(f"no Ray cluster at {settings.address!r}: {reason}", action, transient=True) from error


def _start(ray: Any, quiet: dict[str, Any]) -> None:
    """A Ray of this machine alone. Its processes give each other a fixed time to start, too short where all cores are busy."""
    for attempt in range(STARTS, 0, -1):
        try:
            ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)
            return
        except Exception as error:  # Ray raises bare exceptions here
            ray.shutdown()
            reason = " ".join(str(error).split())[:300]
            if attempt == 1:
                raise ServiceError(
                    f"Ray did not start on this machine: {reason}", "see /tmp/ray/session_latest/logs", transient=True
                ) from error
            log.warning("Ray did not start (%s); trying again", reason)


def _check_room(resources: dict[str, float], settings: RayConfig) -> None:
    """A Ray of this machine alone never grows: an actor that does not fit now never will."""
    for name, asked in (("CPU", settings.cpus_per_actor), ("GPU", settings.gpus_per_actor)):
        if asked > resources.get(name, 0.0):
            raise ResourceError(
                f"an actor asks for {asked:g} {name}, this machine has {math.floor(resources.get(name, 0.0))}",
                f"lower <stage>.ray.{name.lower()}s_per_actor, or name a cluster in <stage>.ray.address",
            )
