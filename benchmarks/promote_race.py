"""Two promoters at once, 20 rounds: how many champions, audit lines and refusals does each round leave?

    python -m benchmarks.promote_race [--store sqlite] [--store postgresql] [--store server] [--rounds 20]

Two processes propose, meet at a barrier and promote in the same moment: in even rounds two different challengers, in odd
ones the same. Every round must leave one new line in the ledger, the alias on the version that the line names, and one
refusal. `postgresql` starts a server of its own (Debian's package, in a temporary folder); `server` puts an MLflow server
before that database. For comparison the same race is run on the bare alias, which MLflow lets the last writer have.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
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

GATE = "promotion:\n  improve:\n    - {metric: test/win_rate_toy}\n"
ITEMS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", action="append", choices=["sqlite", "postgresql", "server"])
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    quiet = ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT")
    os.environ |= dict.fromkeys(quiet, "true")
    failed = False
    with tempfile.TemporaryDirectory(prefix="promote-race-", ignore_cleanup_errors=True) as scratch:
        Path(scratch).chmod(0o755)  # the database's user must pass
        for store in options.store or ["sqlite", "postgresql", "server"]:
            place = Path(scratch) / store
            place.mkdir()
            with opened(store, place) as uri:
                failed |= not race(store, uri, place / "project", options.rounds)
    sys.exit(1 if failed else 0)


def race(store: str, uri: str, root: Path, rounds: int) -> bool:
    """All rounds on one store; prints its row. True when every round was as it must be."""
    os.environ["MLFLOW_TRACKING_URI"] = uri
    (root / "infra").mkdir(parents=True)
    (root / "infra/gate.yaml").write_text(GATE)
    layout = ProjectPaths(root)
    fill(layout, 2 * rounds + 1)

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
    good, won, seconds = 0, {"A": 0, "B": 0}, []
    try:
        for number in range(rounds):
            pair = (2 * number + 2, 2 * number + 3) if number % 2 == 0 else (2 * number + 3, 2 * number + 3)
            for (tasks, _), version in zip(queues, pair, strict=True):
                tasks.put(version)
            answers = [answers.get(timeout=180) for _, answers in queues]
            seconds += [answer["seconds"] for answer in answers]
            lines = history(layout)
            winners = [answer for answer in answers if answer["outcome"] == "promoted"]
            refused = [answer for answer in answers if answer["outcome"] == "LockedError"]
            champion = ModelRegistry(layout).alias(CHAMPION)
            right = len(winners) == 1 and len(refused) == 1 and len(lines) == number + 2
            right = right and lines[-1].version == champion == str(winners[0]["version"])
            good += right
            if right:
                won[winners[0]["name"]] += 1
            else:
                print(f"  round {number}: {answers}, {len(lines)} lines, champion {champion}")
        both = bare_alias(queues, rounds)
    finally:
        for tasks, _ in queues:
            tasks.put(None)
        for worker in workers:
            worker.join(30)
    seconds.sort()
    print(f"{store:<11} {good}/{rounds} rounds: one champion, one audit line, one refusal; A won {won['A']}, B won {won['B']}")
    print(f"{'':<11} a decision takes {seconds[len(seconds) // 2]:.2f} s (median), {seconds[-1]:.2f} s (worst)")
    print(f"{'':<11} the bare alias told both promoters yes in {both}/{rounds} rounds", flush=True)
    return good == rounds


def bare_alias(queues: list[tuple[Any, Any]], rounds: int) -> int:
    """The same race without the ledger: in how many rounds both promoters are told that they won."""
    both = 0
    for number in range(rounds):
        for (tasks, _), version in zip(queues, (2 * number + 2, 2 * number + 3), strict=True):
            tasks.put(-version)
        both += all(answers.get(timeout=180)["outcome"] == "promoted" for _, answers in queues)
    return both


def promoter(root: str, name: str, barrier: Any, tasks: Any, answers: Any) -> None:
    """A process that promotes what it is told to, at the moment the other one does. A negative number: the bare alias."""
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
                client.set_registered_model_alias(REGISTERED_MODEL, "bare", str(-version))
            else:
                promote(proposal, actor=name, reason="race")
        except (StageError, MlflowException) as error:
            outcome = type(error).__name__
            if outcome != "LockedError":
                print(f"  {name}: {str(error)[:200]}", flush=True)
        answers.put({"name": name, "version": version, "outcome": outcome, "seconds": time.perf_counter() - started})


def fill(layout: ProjectPaths, count: int) -> None:
    """`count` versions, each a little better than the one before on the same items."""
    from pipeline_steps.tracking.client.mlflow_client import MlflowStore
    from pipeline_steps.tracking.settings import REGISTERED_MODEL, read_settings

    store = MlflowStore(read_settings(layout), 60)
    client, experiment = store.client, store.experiment_id()
    client.create_registered_model(REGISTERED_MODEL)
    for version in range(1, count + 1):
        md5 = f"{version:032x}.dir"
        run = client.create_run(experiment, run_name="evaluate")
        client.log_inputs(run.info.run_id, [data_set("models/audio2image", md5), data_set("data/pairs", f"{0:032x}.dir")])
        rates = [round(0.4 + 0.01 * version + 0.001 * (item % 5), 6) for item in range(ITEMS)]
        table = io.StringIO()
        rows = csv.writer(table)
        rows.writerow(["set", "pair", "image_id", "sound", "win_rate_toy.model"])
        rows.writerows(["test", f"p{item}", f"i{item}", f"s{item}", rate] for item, rate in enumerate(rates))
        entry = {"value": sum(rates) / ITEMS, "n": ITEMS, "clusters": ITEMS}
        evaluation = {"test": {"rows": {"model": {"win_rate_toy": entry}}}, "protocol": {"num_bootstrap": 200, "seed": 0}}
        client.log_text(run.info.run_id, json.dumps(evaluation), "report/evaluation.json")
        client.log_text(run.info.run_id, table.getvalue(), "report/plots/per_pair.csv")
        client.set_terminated(run.info.run_id)
        client.create_model_version(
            REGISTERED_MODEL, source=f"runs:/{run.info.run_id}/model", run_id=run.info.run_id, tags={"dvc.md5": md5}
        )

    client.set_registered_model_alias(REGISTERED_MODEL, "bare", "1")


def data_set(name: str, digest: str) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    return DatasetInput(Dataset(name, digest, "local", "{}"), [InputTag("mlflow.data.context", "evaluation")])


@contextlib.contextmanager
def opened(store: str, place: Path) -> Iterator[str]:
    """A fresh store; gives its MLflow URI."""
    if store == "sqlite":
        yield f"sqlite:///{place / 'mlflow.db'}"
        return
    with postgresql(place / "cluster") as database:
        if store == "postgresql":
            yield database
        else:
            with mlflow_server(database, place, workers=2) as uri:
                yield uri


@contextlib.contextmanager
def postgresql(cluster: Path) -> Iterator[str]:
    """A PostgreSQL of its own, on a free port of the loopback address. It refuses to run as root: then as user postgres."""
    tools = shutil.which("initdb") or next(iter(sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")))), "")
    if not tools:
        raise SystemExit("no PostgreSQL here: install Debian's package postgresql, or use --store sqlite")
    folder = Path(tools).resolve().parent
    port = free_port()
    user: list[str] = []
    cluster.mkdir()
    if os.geteuid() == 0:
        who = pwd.getpwnam("postgres")
        os.chown(cluster, who.pw_uid, who.pw_gid)
        user = ["setpriv", f"--reuid={who.pw_uid}", f"--regid={who.pw_gid}", "--clear-groups"]
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
