"""Test of the running services: access, deployments, a nightly run, approval, outages, kills, backup."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from flows.automations import HEARTBEAT_S, MAX_MISSED
from infra import backup, passwords, services
from infra.topology import DEMO, MLFLOW, POSTGRES, PREFECT, WORKER, ServiceEnvironment, ServiceSpec, programs
from tests.services import access_checks, browser_checks
from tests.services.clients import Mlflow, Prefect, wait_for
from tests.services.project import call

pytestmark = [pytest.mark.services, pytest.mark.timeout(2700)]
WHOLE = os.environ.get("SERVICES_TEST") == "whole"
"""`make services-test` runs everything (13 min); `make services-check`, a part of CI, runs a part."""


def test_services(env: ServiceEnvironment, services_folder: Path) -> None:
    """One test, because each part uses the state that the one before left."""
    prefect, mlflow = Prefect(env), Mlflow(env)
    check_access(env)
    check_pages(env)
    check_deployments(prefect, env)
    check_scheduled_run(prefect, mlflow, env)
    access_checks.check_artifact_access(env, model_file(mlflow))
    check_approval(prefect, mlflow)
    if WHOLE:
        check_pages_of_results(prefect, env)
        check_outages(prefect, env)
        check_concurrent_runs(prefect, env)
        check_killed_worker(prefect, mlflow, env)
        check_backup(mlflow, prefect, env, services_folder)
    check_no_leaked_password(env)


def check_access(env: ServiceEnvironment) -> None:
    """Requests without a password, from another origin or with another host name are refused."""
    access_checks.check_prefect_api(env)
    access_checks.check_prefect_websockets(env)
    access_checks.check_mlflow(env)
    access_checks.check_stores(env)
    access_checks.check_report_page(env)
    access_checks.check_listeners(env)


def check_pages(env: ServiceEnvironment) -> None:
    """Pages are served; Prefect's API answers even without its pages."""
    login = httpx.get(f"{env.prefect_api.removesuffix('/api')}/login", headers={"Accept": "text/html"})
    assert login.status_code == 200
    assert "<title>Prefect" in login.text
    front = httpx.get(env.mlflow, auth=Mlflow(env).http.auth)
    assert front.status_code == 200
    assert "<title>MLflow" in front.text
    assert (env.folder / "prefect-server/ui").is_dir(), "beside the data, not in the installed package"


def check_deployments(prefect: Prefect, env: ServiceEnvironment) -> None:
    """Repeated deployment leaves the limits and one automation on the server."""
    services.deploy(env)
    pool = "/work_pools/seeing-sound/queues"
    limits = {queue["name"]: queue["concurrency_limit"] for queue in prefect.post(f"{pool}/filter", {})}
    assert limits["workspace"] == 1
    for name in ("reproduce", "refresh-data", "train-and-evaluate", "nightly"):
        deployment = prefect.deployment(f"{name}/{name}")
        assert deployment["work_queue_name"] == "workspace"
        assert deployment["global_concurrency_limit"]["limit"] == 1
        assert deployment["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    (found,) = prefect.post("/automations/filter", {})
    assert found["enabled"] is True
    assert found["trigger"]["posture"] == "Proactive"
    assert found["trigger"]["within"] == 90
    assert [(action["type"], action["state"]) for action in found["actions"]] == [("change-flow-run-state", "CRASHED")]


def check_scheduled_run(prefect: Prefect, mlflow: Mlflow, env: ServiceEnvironment) -> None:
    """A schedule starts a run; the model is registered and its files are in the object store."""
    nightly = prefect.deployment("nightly/nightly")
    assert [schedule["schedule"]["cron"] for schedule in nightly["schedules"]] == ["0 2 * * *"]
    # Every 40 s, until it has fired once: a loaded machine may miss a single date.
    schedule = {"schedule": {"interval": 40, "anchor_date": datetime.now(UTC).isoformat()}, "active": True}
    created = prefect.post(f"/deployments/{nightly['id']}/schedules", [schedule])
    due = datetime.now(UTC) + timedelta(minutes=10)

    def fired() -> str | None:
        for run in prefect.runs_of("nightly/nightly"):
            started = run["state"]["type"] not in {"SCHEDULED", "PENDING"}
            if run["auto_scheduled"] and started and datetime.fromisoformat(run["expected_start_time"]) < due:
                return str(run["id"])
        return None

    run_id = wait_for("the schedule to fire", fired, 240)
    prefect.http.delete(
        f"/deployments/{nightly['id']}/schedules/{created[0]['id']}", headers=token_headers(prefect)
    ).raise_for_status()
    run = prefect.finished(run_id, 300)
    assert run["state"]["type"] == "COMPLETED", run["state"]["message"]
    artifacts = prefect.artifacts(run_id)
    assert {"plan", "report"} <= artifacts.keys(), artifacts.keys()
    report = next(word for word in artifacts["report"]["data"].replace("(", " ").replace(")", " ").split() if "http" in word)
    assert "win rate" in httpx.get(report).text, "the report's link works"
    (version,) = mlflow.versions()
    assert version["status"] == "READY"
    assert mlflow.alias("challenger") == version["version"]
    assert mlflow.alias("champion") is None
    tags = {tag["key"]: tag["value"] for tag in version["tags"]}
    lock = call(env.project, "git", "show", f"runs/{run['name']}:dvc.lock")
    assert tags["dvc.md5"] in lock, "the version is the model of the run's dvc.lock"
    by_name = {found["info"]["run_name"]: found for found in mlflow.runs()}
    assert {"train", "evaluate"} <= by_name.keys()
    assert by_name["train"]["info"]["artifact_uri"].startswith("mlflow-artifacts:"), "artifacts go through the server"
    flow_runs = {tag["key"]: tag["value"] for tag in by_name["train"]["data"]["tags"]}
    assert flow_runs["flow_run_id"] == run_id
    assert call(env.project, "git", "status", "--porcelain") == "", "the working tree is as it was"


def token_headers(prefect: Prefect) -> dict[str, str]:
    token = prefect.http.get("/csrf-token", params={"client": "services-test"}).json()["token"]
    return {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": "services-test"}


def check_approval(prefect: Prefect, mlflow: Mlflow) -> None:
    """The promotion that the nightly run started waits; an approval makes the champion."""

    def waiting() -> str | None:
        found = [run for run in prefect.runs_of("promote/promote") if run["state"]["type"] == "PAUSED"]
        return str(found[0]["id"]) if found else None

    run_id = wait_for("the promotion to ask", waiting, 240)
    assert mlflow.alias("champion") is None
    wrong = {"run_input": {"decision": "perhaps", "reason": "x", "name": ""}}
    answer = prefect.post(f"/flow_runs/{run_id}/resume", wrong)
    assert answer["status"] == "REJECT", "an answer outside the form is refused"
    approval = {"run_input": {"decision": "approve", "reason": "better images", "name": "Ada"}}
    answer = prefect.post(f"/flow_runs/{run_id}/resume", approval)
    assert answer["status"] == "ACCEPT", answer
    run = prefect.finished(run_id, 180)
    assert run["state"]["type"] == "COMPLETED", run["state"]["message"]
    assert "approved by Ada" in run["state"]["message"]
    assert mlflow.alias("champion") == mlflow.versions()[0]["version"]


def check_pages_of_results(prefect: Prefect, env: ServiceEnvironment) -> None:
    """Check the pages in a browser if one is installed."""
    if browser_checks.CHROMIUM is None:
        return
    run = [run for run in prefect.runs_of("nightly/nightly") if run["state"]["type"] == "COMPLETED"][-1]
    with browser_checks.chromium() as browser:
        browser_checks.flow_run_page(browser, env, run["id"])
        browser_checks.mlflow_pages(browser, env)


def check_outages(prefect: Prefect, env: ServiceEnvironment) -> None:
    """A run completes although PostgreSQL restarts and Prefect's API stops during a stage."""
    run_id = prefect.start("reproduce/reproduce", overrides=["model.seed=1", "model.pause=25"])
    wait_for("the stage to work", lambda: prefect.has_logged(run_id, "model: did 1 of 8"), 240)
    restart(env, POSTGRES)
    wait_for("the API to answer again", lambda: prefect.run(run_id)["state"]["type"] == "RUNNING", 60)
    assert wait_for("MLflow to answer again", lambda: Mlflow(env).versions() if mlflow_answers(env) else None, 60)
    server = services.supervisor(env).supervisor
    server.stopProcess(PREFECT)
    assert services.state(env, WORKER) == "RUNNING", "the worker outlives the API"
    services.start_one(env, program(env, PREFECT))
    run = prefect.finished(run_id, 300)
    assert run["state"]["type"] == "COMPLETED", run["state"]["message"]
    assert all(healthy for _, healthy in services.status(env).values())


def mlflow_answers(env: ServiceEnvironment) -> bool:
    return Mlflow(env).http.get("/experiments/search", params={"max_results": 1}).is_success


def restart(env: ServiceEnvironment, name: str) -> None:
    services.supervisor(env).supervisor.stopProcess(name)
    services.start_one(env, program(env, name))


def program(env: ServiceEnvironment, name: str) -> ServiceSpec:
    return next(found for found in programs(env) if found.name == name)


def check_concurrent_runs(prefect: Prefect, env: ServiceEnvironment) -> None:
    """Further runs wait in the queue, a run in a shell is refused, and the long run is not marked as crashed."""
    long = prefect.start("reproduce/reproduce", overrides=["model.seed=5", f"model.pause={HEARTBEAT_S * (MAX_MISSED + 1)}"])
    wait_for("the stage to work", lambda: prefect.has_logged(long, "model: did 1 of 8"), 240)
    changes = ["model.seed=6", "model.pause=0.5"]
    same = prefect.start("reproduce/reproduce", overrides=changes)
    night = next(run for run in prefect.runs_of("nightly/nightly") if run["state"]["type"] == "COMPLETED")
    other = prefect.start("train-and-evaluate/train-and-evaluate", seed=7, revision=f"runs/{night['name']}")
    by_hand = run_in_a_shell(env, "reproduce(parameters={'seed': 8, 'wait_minutes': 0}, return_state=True)")
    assert f"run {prefect.run(long)['name']} (PID " in by_hand, by_hand
    assert "wait until it ends, or cancel it" in by_hand
    assert prefect.state(long) == "RUNNING", "the first run was still running"
    assert {prefect.state(same), prefect.state(other)} <= {"SCHEDULED", "PENDING"}
    ended = [prefect.finished(run_id, 400) for run_id in (long, same, other)]
    for run in ended:
        assert run["state"]["type"] == "COMPLETED", run["state"]["message"]
    times = sorted((datetime.fromisoformat(run["start_time"]), datetime.fromisoformat(run["end_time"])) for run in ended)
    assert all(end <= start for (_, end), (start, _) in pairwise(times)), "one run after the other"
    assert times[0][1] - times[0][0] > timedelta(seconds=HEARTBEAT_S * MAX_MISSED), "longer than the automation waits"
    waited = call(env.project, "git", "show", f"runs/{ended[1]['name']}:dvc.lock")
    assert outs(waited) == outs(undisturbed(env, changes))
    assert call(env.project, "git", "status", "--porcelain") == ""
    call(env.project, "git", "fsck", "--strict")


def run_in_a_shell(env: ServiceEnvironment, expression: str) -> str:
    """Final message of a flow that is started in a shell with the lines of `python -m infra.services env`."""
    script = f"from flows.pipeline import *; print('ended:', ({expression}).message)"
    command = "; ".join([*services.environment_lines(env), 'exec python -c "$0"'])
    output = call(env.project, "sh", "-c", command, script)
    return output.rpartition("ended: ")[2]


def check_killed_worker(prefect: Prefect, mlflow: Mlflow, env: ServiceEnvironment) -> None:
    """After `kill -9` of the worker and its children a new worker starts, and the next run gives the same bytes."""
    changes = ["model.seed=2", "model.pause=12"]
    killed = prefect.start("reproduce/reproduce", overrides=changes)
    wait_for("the stage to work", lambda: prefect.has_logged(killed, "model: did 2 of 8"), 240)
    pid = services.supervisor(env).supervisor.getProcessInfo(WORKER)["pid"]
    processes = [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]
    assert len(processes) >= 3, "worker, flow run and stage"
    for process in processes:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=10)
    wait_for("another worker", lambda: services.is_healthy(env, program(env, WORKER)), 90)
    again = prefect.start("reproduce/reproduce", overrides=changes)
    run = prefect.finished(again, 300)
    assert run["state"]["type"] == "COMPLETED", run["state"]["message"]
    assert prefect.state(killed) == "CRASHED", "no run is left in Running"
    recovered = call(env.project, "git", "show", f"runs/{run['name']}:dvc.lock")
    expected = undisturbed(env, changes)
    assert outs(recovered) == outs(expected), "outs are those of an undisturbed run"
    assert not [path for path in (env.project / ".dvc/tmp").glob("rwlock*") if path.read_text().strip() not in {"", "{}"}]
    check_zombie_detection(prefect, env)


def check_zombie_detection(prefect: Prefect, env: ServiceEnvironment) -> None:
    """Without another run the automation marks the dead run after three heartbeats (90 s)."""
    killed = prefect.start("reproduce/reproduce", overrides=["model.seed=3", "model.pause=120"])
    wait_for("a heartbeat and some work", lambda: prefect.has_logged(killed, "model: did 3 of 8"), 240)
    server = services.supervisor(env).supervisor
    pid = server.getProcessInfo(WORKER)["pid"]
    for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
        process.send_signal(signal.SIGKILL)
    assert prefect.state(killed) == "RUNNING"
    wait_for("the automation", lambda: prefect.state(killed) == "CRASHED", 300)
    assert prefect.run(killed)["state"]["message"] == f"No heartbeat for {HEARTBEAT_S * MAX_MISSED} s."
    wait_for("another worker", lambda: services.is_healthy(env, program(env, WORKER)), 90)


def undisturbed(env: ServiceEnvironment, changes: list[str]) -> str:
    """`dvc.lock` of a plain `dvc repro` with the same parameters, in a clone with its own cache."""
    clone = env.folder.parent / f"clone-{changes[0]}"
    call(env.folder.parent, "git", "clone", "--quiet", str(env.project), str(clone))
    text = (clone / "params.yaml").read_text()
    head, _, tail = text.partition("model:\n")
    values = {key.split(".")[1]: value for key, value in (change.split("=") for change in changes)}
    tail = tail.replace("seed: 0", f"seed: {values['seed']}", 1).replace("pause: 0.0", f"pause: {values['pause']}", 1)
    (clone / "params.yaml").write_text(f"{head}model:\n{tail}")
    call(clone, "dvc", "repro", "--quiet")
    return (clone / "dvc.lock").read_text()


def outs(lock: str) -> dict[str, str]:
    from ruamel.yaml import YAML

    stages = YAML(typ="safe").load(lock)["stages"]
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage["outs"] if not out["path"].endswith(".json")}


def ended_runs(prefect: Prefect) -> dict[str, str]:
    """State of ended runs by id; scheduled runs are planned again at each deployment."""
    ended = {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED", "CANCELLED"]}}}
    return {run["id"]: run["state_name"] for run in prefect.post("/flow_runs/filter", {"flow_runs": ended})}


def check_backup(mlflow: Mlflow, prefect: Prefect, env: ServiceEnvironment, folder: Path) -> None:
    """Save, delete databases and artifacts, restore; DVC's cache is restored from its remote."""
    saved = folder / "backup"
    assert backup.save(env, saved) > 10
    champion, versions, runs = mlflow.alias("champion"), mlflow.versions(), ended_runs(prefect)
    assert runs
    remote = folder / "dvc-remote"
    call(env.project, "dvc", "remote", "add", "--local", "--default", "safe", str(remote))
    call(env.project, "dvc", "push", "--quiet", "--all-branches")
    services.stop(env)
    for name in ("postgres", "objects"):
        shutil.rmtree(env.folder / name)
    shutil.rmtree(env.project / ".dvc/cache")
    services.start(env, worker=False)
    assert mlflow.versions() == []
    for name in (DEMO, PREFECT, MLFLOW):
        services.supervisor(env).supervisor.stopProcess(name)
    backup.restore(env, saved)
    services.start(env)
    assert mlflow.alias("champion") == champion
    assert mlflow.versions() == versions
    assert ended_runs(prefect) == runs
    artifact = f"mlflow-artifacts/artifacts/{model_file(mlflow)}"
    content = httpx.get(f"{env.mlflow}/api/2.0/{artifact}", auth=mlflow.http.auth)
    assert content.is_success, artifact
    assert len(content.text) == 64, "the weights' file, through the server, from the restored store"
    call(env.project, "dvc", "fetch", "--quiet", "--all-branches")
    damaged = next(saved.rglob("*.dump"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(services.InfraError, match="damaged"):
        backup.restore(env, saved)


def model_file(mlflow: Mlflow) -> str:
    """Path in the artifact store of the newest version's weights."""
    version: dict[str, Any] = mlflow.versions()[0]
    experiment = mlflow.get("/experiments/get-by-name", experiment_name="seeing-sound")["experiment"]["experiment_id"]
    model = version["source"].removeprefix("models:/")
    return f"{experiment}/models/{model}/artifacts/artifacts/model/weights.txt"


def check_no_leaked_password(env: ServiceEnvironment) -> None:
    """No password in logs, databases (except as a hash), MLflow, Prefect, arguments or git."""
    secrets = {name: passwords.read(env.secrets, name) for name in passwords.GENERATED}
    secrets["prefect-auth"] = passwords.read(env.secrets, "prefect-auth").partition(":")[2]
    secrets.pop("s3-key")  # an id, not a secret; S3 requests contain it
    attempts = "prefect-workspace-attempt-*"  # a run's environment, in files of mode 0600, while it runs
    wait_for("Prefect to tidy up after its runs", lambda: not list((env.folder / "tmp").glob(attempts)), 120)
    dumps = env.folder.parent / "dumps"
    backup.save(env, dumps)
    plain = dumps / "prefect.txt"
    for name in backup.DATABASES:
        with (dumps / f"{name}.txt").open("wb") as output:
            tool = str(services.postgres_tool("pg_restore"))
            subprocess.run([tool, "--file=-", str(dumps / f"{name}.dump")], stdout=output, check=True)
    assert "COPY public.flow_run " in plain.read_text(), "the dump is readable text"
    shutil.rmtree(dumps / "secrets")
    files = [path for root in (dumps, env.folder, env.project) for path in root.rglob("*") if path.is_file()]
    files = [path for path in files if env.secrets not in path.parents and env.data not in path.parents]
    assert len(files) > 100
    for path in files:
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # a temporary file of a running process
            continue
        found = [name for name, word in secrets.items() if word.encode() in content]
        assert not found, f"{found} is in {path}"
    for process in psutil.process_iter(["cmdline"]):
        arguments = " ".join(process.info["cmdline"] or [])
        assert not [name for name, word in secrets.items() if word in arguments], process.pid
    for path in env.secrets.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600, path
    assert env.secrets.stat().st_mode & 0o777 == 0o700
