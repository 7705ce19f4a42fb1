"""Soak test: two concurrent promotions, 20 rounds on each store.

    python -m tests.soak.promote_race [--store sqlite] [--store postgresql] [--store server] [--rounds 20]

Two processes propose, wait at a barrier and promote at the same time: in even rounds two different challengers, in odd rounds
the same one. Every round must leave one new entry in the promotion log, the alias on the version of this entry, and one
refusal. `postgresql` starts a server in a temporary folder (Debian's package); `server` starts an MLflow server with that
database. For comparison the race is repeated with the alias only, for which MLflow accepts both writes.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.servers import free_port, mlflow_server
from pipeline_steps.core.project_paths import ProjectPaths
from tests.factories.registered_models import client_of, register, write_gate

GATE = "promotion:\n  improve:\n    - {metric: test/win_rate_toy}\n"
NUM_ITEMS = 40
ALIAS = "race"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", action="append", choices=["sqlite", "postgresql", "server"])
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    quiet = ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT")
    os.environ |= dict.fromkeys(quiet, "true")
    failed = False
    with tempfile.TemporaryDirectory(prefix="promote-race-", ignore_cleanup_errors=True) as scratch:
        Path(scratch).chmod(0o755)  # the database's user must be able to access it
        for store in options.store or ["sqlite", "postgresql", "server"]:
            folder = Path(scratch) / store
            folder.mkdir()
            with open_store(store, folder) as uri:
                failed |= not race(store, uri, folder / "project", options.rounds)
    sys.exit(1 if failed else 0)


def race(store: str, uri: str, root: Path, rounds: int) -> bool:
    """Run all rounds on one store and print the result. Returns whether every round met the requirements."""
    os.environ["MLFLOW_TRACKING_URI"] = uri
    layout = ProjectPaths(root)
    write_gate(layout, GATE)
    register_versions(layout, 2 * rounds + 1)

    from pipeline_steps.tracking.registry.model_registry import ModelRegistry
    from pipeline_steps.tracking.registry.promotion import history, promote, propose
    from pipeline_steps.tracking.settings import CHAMPION

    promote(propose(layout, "1"), actor="setup", reason="the first champion")
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    queues = [(context.Queue(), context.Queue()) for _ in range(2)]
    workers = [
        context.Process(target=promoter, args=(str(root), name, barrier, *pair))
        for name, pair in zip("AB", queues, strict=True)
    ]
    for worker in workers:
        worker.start()
    correct_rounds, won, seconds = 0, {"A": 0, "B": 0}, []
    try:
        for number in range(rounds):
            pair = (2 * number + 2, 2 * number + 3) if number % 2 == 0 else (2 * number + 3, 2 * number + 3)
            for (tasks, _), version in zip(queues, pair, strict=True):
                tasks.put(version)
            answers = [answers.get(timeout=180) for _, answers in queues]
            seconds += [answer["seconds"] for answer in answers]
            events = history(layout)
            winners = [answer for answer in answers if answer["outcome"] == "promoted"]
            refused = [answer for answer in answers if answer["outcome"] == "LockedError"]
            champion = ModelRegistry(layout).aliases().get(CHAMPION)
            correct = len(winners) == 1 and len(refused) == 1 and len(events) == number + 2
            correct = correct and events[-1].version == champion == str(winners[0]["version"])
            correct_rounds += correct
            if correct:
                won[winners[0]["name"]] += 1
            else:
                print(f"  round {number}: {answers}, {len(events)} entries, champion {champion}")
        both = race_on_alias(queues, rounds)
    finally:
        for tasks, _ in queues:
            tasks.put(None)
        for worker in workers:
            worker.join(30)
    seconds.sort()
    print(f"{store:<11} {correct_rounds}/{rounds} rounds: one champion, one entry, one refusal; A won {won['A']}, B {won['B']}")
    print(f"{'':<11} a decision takes {seconds[len(seconds) // 2]:.2f} s (median), {seconds[-1]:.2f} s (worst)")
    print(f"{'':<11} with the alias only both processes succeeded in {both}/{rounds} rounds", flush=True)
    return correct_rounds == rounds


def race_on_alias(queues: list[tuple[Any, Any]], rounds: int) -> int:
    """Repeat the race without the promotion log; returns the number of rounds in which both processes succeeded."""
    both = 0
    for number in range(rounds):
        for (tasks, _), version in zip(queues, (2 * number + 2, 2 * number + 3), strict=True):
            tasks.put(-version)
        both += all(answers.get(timeout=180)["outcome"] == "promoted" for _, answers in queues)
    return both


def promoter(root: str, name: str, barrier: Any, tasks: Any, answers: Any) -> None:
    """Process that promotes the versions in `tasks` at the same time as the other one; negative versions: the alias only."""
    from mlflow.exceptions import MlflowException

    from pipeline_steps.core.errors import StageError
    from pipeline_steps.tracking.registry.model_registry import ModelRegistry
    from pipeline_steps.tracking.registry.promotion import promote, propose
    from pipeline_steps.tracking.settings import REGISTERED_MODEL

    layout = ProjectPaths(Path(root))
    while (version := tasks.get()) is not None:
        outcome = "promoted"
        proposal = propose(layout, str(version)) if version > 0 else None
        client = ModelRegistry(layout).client
        barrier.wait(120)
        started = time.perf_counter()
        try:
            if proposal is None:
                client.set_registered_model_alias(REGISTERED_MODEL, ALIAS, str(-version))
            else:
                promote(proposal, actor=name, reason="race")
        except (StageError, MlflowException) as error:
            outcome = type(error).__name__
            if outcome != "LockedError":
                print(f"  {name}: {str(error)[:200]}", flush=True)
        answers.put({"name": name, "version": version, "outcome": outcome, "seconds": time.perf_counter() - started})


def register_versions(layout: ProjectPaths, count: int) -> None:
    """Register versions of which each has higher win rates than the one before on the same items."""
    from pipeline_steps.tracking.client.mlflow_client import MlflowStore
    from pipeline_steps.tracking.settings import REGISTERED_MODEL, read_settings

    MlflowStore(read_settings(layout), 60).experiment_id()  # with the store's own artifact location
    for version in range(1, count + 1):
        register(layout, [0.4 + 0.01 * version + 0.001 * (item % 5) for item in range(NUM_ITEMS)], version=version)
    client_of(layout).set_registered_model_alias(REGISTERED_MODEL, ALIAS, "1")


@contextlib.contextmanager
def open_store(store: str, folder: Path) -> Iterator[str]:
    """Create a store in `folder`; yields its MLflow URI."""
    if store == "sqlite":
        yield f"sqlite:///{folder / 'mlflow.db'}"
        return
    with postgresql(folder / "cluster") as database:
        if store == "postgresql":
            yield database
        else:
            with mlflow_server(database, folder, workers=2) as uri:
                yield uri


@contextlib.contextmanager
def postgresql(cluster: Path) -> Iterator[str]:
    """Start a PostgreSQL server on a free loopback port; as user postgres if the caller is root. Yields its URI."""
    tools = shutil.which("initdb") or next(iter(sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")))), "")
    if not tools:
        raise SystemExit("no PostgreSQL found; install Debian's package postgresql, or use --store sqlite")
    folder = Path(tools).resolve().parent
    port = free_port()
    user: list[str] = []
    cluster.mkdir()
    if os.geteuid() == 0:
        account = pwd.getpwnam("postgres")
        os.chown(cluster, account.pw_uid, account.pw_gid)
        user = ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
    quiet: Any = {"check": True, "stdout": subprocess.DEVNULL, "cwd": "/"}
    subprocess.run(
        [*user, str(folder / "initdb"), "-D", str(cluster / "data"), "-U", "race", "--auth=trust", "-E", "UTF8"], **quiet
    )
    options = f"-h 127.0.0.1 -p {port} -k {cluster}"
    log = str(cluster / "log")
    subprocess.run(
        [*user, str(folder / "pg_ctl"), "-D", str(cluster / "data"), "-l", log, "-w", "-o", options, "start"], **quiet
    )
    try:
        subprocess.run([*user, str(folder / "createdb"), "-h", "127.0.0.1", "-p", str(port), "-U", "race", "mlflow"], **quiet)
        yield f"postgresql+psycopg2://race@127.0.0.1:{port}/mlflow"
    finally:
        subprocess.run([*user, str(folder / "pg_ctl"), "-D", str(cluster / "data"), "-m", "immediate", "stop"], **quiet)


if __name__ == "__main__":
    main()
