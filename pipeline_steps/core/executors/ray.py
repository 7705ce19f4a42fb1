"""Executor `ray`: batches of ids on a pool of actors, with Ray Data's `map_batches`. The only importer of ray.

Only ids and failures are transferred; actors write rows to the cache. Ray Data restarts actors and repeats their batches, so a
batch is processed at least once, and again only if its actor died.
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
from collections.abc import Generator, Iterator, Sequence
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
"""Shared memory of a local Ray, which contains only ids."""
CONNECT_SECONDS = 5.0
STARTS = 3
INIT_DEATHS = 3
"""Consecutive actors that may die while loading (memory, a lost node) before the stage stops."""

OUTCOME = pa.schema([(name, pa.string()) for name in ("id", "code", "reason", "error")])
"""Result of an actor for an id. `code` is empty if its row is in the cache; `error` stops the stage."""


class RayWorker:
    """Ray actor: loads the model once, then processes batches of ids.

    An error that stops the stage is returned, not raised: Ray would wrap it, or restart the actor repeatedly.
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
                    f"the actor on {socket.gethostname()} has another fingerprint than the driver "
                    "(another device precision, or other weights)",
                    "set device and precision explicitly, and use the same data/assets or checkpoint on all nodes",
                )
        except Exception as error:
            self._error = _serialize_error(error)

    def _enter(self, folder: str) -> None:
        """Change to the driver's folder, so that relative paths are the same."""
        if not Path(folder).is_dir():
            raise ConfigError(
                f"{socket.gethostname()} has no folder {folder}", "mount the project folder under the same path on every node"
            )
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
    """An error as JSON; with the traceback if it is not a StageError."""
    if isinstance(error, StageError):
        return json.dumps(error.as_dict(), default=str)
    return json.dumps({"kind": "", "reason": "".join(traceback.format_exception(error))})


def _deserialize_error(text: str) -> Exception:
    """Error from the JSON of `_serialize_error`."""
    fields = json.loads(text)
    return error_from_dict(fields) if fields["kind"] else RuntimeError(f"an actor failed:\n{fields['reason']}")


def run_on_ray(
    work: ItemProcessor, ids: Sequence[str], batch_size: int, settings: RayConfig
) -> Generator[tuple[str, Failure | None], None, None]:
    """Yield (id, None) if its row is in the cache, else (id, failure), in the order in which batches finish.

    Raises:
        ConfigError: ray is missing or of another version than the cluster; an actor has another fingerprint.
        ResourceError: a local Ray has no resources for one actor.
        ServiceError: no cluster at the address, or it finished no batch for `no_progress_timeout_seconds`.
        StageError: raised inside an actor.
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
                f"Ray stopped: {type(error).__name__}: {reason}",
                "run again: finished items are cached; see the cluster's logs, and <stage>.ray.no_progress_timeout_seconds",
                transient=True,
            ) from error


def _threads() -> int:
    """Number of torch threads, also for the actors: another number rounds sums differently."""
    import torch

    return torch.get_num_threads()


def _configure_ray_data(ray: Any, settings: RayConfig) -> None:
    """Disable progress bars and hints; set the time limit and the number of tolerated actor failures."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = settings.no_progress_timeout_seconds
    context.max_consecutive_actor_init_deaths = INIT_DEATHS


@contextmanager
def _ray_session(settings: RayConfig) -> Iterator[Any]:
    """Connect to Ray; at the end disconnect, and stop a Ray that was started here."""
    # Without the second, leftovers of a stopped run call Ray after its shutdown and start another one.
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ENABLE_AUTO_CONNECT="0")
    own = settings.address == ""
    if own:  # its ports are open to the network, so clients need a token that only child processes have
        if sys.modules.get("ray") and os.environ.get("RAY_AUTH_MODE") != "token":  # Ray reads the mode when it is imported
            raise ConfigError(
                "executor ray: ray was imported before RAY_AUTH_MODE was set, so a local Ray would have no token",
                "set RAY_AUTH_MODE=token before `import ray`, or set a cluster in <stage>.ray.address",
            )
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray reads it once: the same for every later start
        os.environ.setdefault("RAY_worker_niceness", "0")  # actors do the work of the stage and get its priority
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError(
            f"executor ray needs the extra `ray` ({error})", "pip install 'seeing-sound[ray]', or set executor: local"
        ) from error
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    _connect(ray, settings)
    if main and handler is not None:
        signal.signal(signal.SIGTERM, handler)  # Ray installs its own, which would report a stopped stage as a crash
    try:
        if own:
            _check_resources(ray.cluster_resources(), settings)
        yield ray
    finally:
        ray.shutdown()


def _connect(ray: Any, settings: RayConfig) -> None:
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if not settings.address:
        _start(ray, quiet)
        return
    action = "start it (ray start --head), correct <stage>.ray.address, or set executor: local"
    try:
        if settings.address != "auto":  # Ray itself waits for minutes
            host, port = settings.address.rsplit(":", 1)
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        ray.init(address=settings.address, **quiet)
    except (OSError, OverflowError, RuntimeError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split())[:300]
        if "ersion mismatch" in reason:
            raise ConfigError(
                f"the Ray cluster at {settings.address!r} runs another version of Ray or Python: {reason}",
                "use the same image on all nodes",
            ) from error
        raise ServiceError(f"no Ray cluster at {settings.address!r}: {reason}", action, transient=True) from error


def _start(ray: Any, quiet: dict[str, Any]) -> None:
    """Start a local Ray. Its start has a fixed time limit, which is too short when all cores are busy; so it is tried again."""
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


def _check_resources(resources: dict[str, float], settings: RayConfig) -> None:
    """Raise ResourceError if one actor needs more than a local Ray has; its resources never grow."""
    for name, asked in (("CPU", settings.cpus_per_actor), ("GPU", settings.gpus_per_actor)):
        if asked > resources.get(name, 0.0):
            raise ResourceError(
                f"an actor needs {asked:g} {name}, this machine has {math.floor(resources.get(name, 0.0))}",
                f"lower <stage>.ray.{name.lower()}s_per_actor, or set a cluster in <stage>.ray.address",
            )
