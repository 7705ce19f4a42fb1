"""A day in the life of the services, with real servers: everything that a team relies on, and everything that goes wrong."""

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
"""`make services-test` drives everything (13 min); `make services-check`, a part of CI, what a calm day holds."""


def test_a_day_with_the_services(env: ServiceEnvironment, services_folder: Path) -> None:
    """One test, because each part goes on where the one before ended; the order is that of a day."""
    prefect, mlflow = Prefect(env), Mlflow(env)
    doors_are_shut(env)
    pages_are_served(env)
    one_run_at_a_time_is_what_was_deployed(prefect, env)
    scheduled_run_fires_and_finishes(prefect, mlflow, env)
    access_checks.artifact_is_handed_out_by_mlflow_alone(env, model_file(mlflow))
    model_is_approved_through_the_api(prefect, mlflow)
    if WHOLE:
        pages_show_it(prefect, env)
        outages_in_mid_run(prefect, env)
        two_runs_at_once(prefect, env)
        worker_is_killed_in_mid_stage(prefect, mlflow, env)
        backup_is_restored(mlflow, prefect, env, services_folder)
    no_password_is_written_down(env)


def doors_are_shut(env: ServiceEnvironment) -> None:
    """Without a password, from another origin, under another host name: no."""
    access_checks.prefect_wants_the_auth_string_and_a_token(env)
    access_checks.prefect_wants_it_on_sockets_too(env)
    access_checks.mlflow_wants_a_password_and_its_own_name(env)
    access_checks.stores_want_passwords(env)
    access_checks.reports_are_all_that_the_demo_page_shows(env)
    access_checks.nothing_listens_beyond_this_machine(env)


def pages_are_served(env: ServiceEnvironment) -> None:
    """Prefect answers its API even when it could not prepare its pages."""
    login = httpx.get(f"{env.prefect_api.removesuffix('/api')}/login", headers={"Accept": "text/html"})
    assert login.status_code == 200
    assert "<title>Prefect" in login.text
    front = httpx.get(env.mlflow, auth=Mlflow(env).http.auth)
    assert front.status_code == 200
    assert "<title>MLflow" in front.text
    assert (env.folder / "prefect-server/ui").is_dir(), "beside the data, not in the installed package"


def one_run_at_a_time_is_what_was_deployed(prefect: Prefect, env: ServiceEnvironment) -> None:
    """Limits and the automation for dead runs stand on the server, once, however often somebody deploys."""
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


def scheduled_run_fires_and_finishes(prefect: Prefect, mlflow: Mlflow, env: ServiceEnvironment) -> None:
    """A schedule fires without anybody; the model is registered through the server, its files lie in the object store."""
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


def model_is_approved_through_the_api(prefect: Prefect, mlflow: Mlflow) -> None:
    """The nightly run started a promotion, which waits; a person's answer makes the champion."""

    def waiting() -> str | None:
        found = [run for run in prefect.runs_of("promote/promote") if run["state"]["type"] == "PAUSED"]
        return str(found[0]["id"]) if found else None

    run_id = wait_for("the promotion to ask", waiting, 240)
    assert mlflow.alias("champion") is None
    wrong = {"run_input": {"decision": "perhaps", "reason": "x", "name": ""}}
    answer = prefect.post(f"/flow_runs/{run_id}/resume", wrong)
    assert answer["status"] == "REJECT", "an answer outside the form is refused"
    given = {"run_input": {"decision": "approve", "reason": "sounds right to me", "name": "Ada"}}
    answer = prefect.post(f"/flow_runs/{run_id}/resume", given)
    assert answer["status"] == "ACCEPT", answer
    run = prefect.finished(run_id, 180)
    assert run["state"]["type"] == "COMPLETED", run["state"]["message"]
    assert "approved by Ada" in run["state"]["message"]
    assert mlflow.alias("champion") == mlflow.versions()[0]["version"]


def pages_show_it(prefect: Prefect, env: ServiceEnvironment) -> None:
    """In a real browser, where one is installed."""
    if browser_checks.CHROMIUM is None:
        return
    run = [run for run in prefect.runs_of("nightly/nightly") if run["state"]["type"] == "COMPLETED"][-1]
    with browser_checks.chromium() as browser:
        browser_checks.flow_run_page(browser, env, run["id"])
        browser_checks.mlflow_pages(browser, env)


def outages_in_mid_run(prefect: Prefect, env: ServiceEnvironment) -> None:
    """PostgreSQL restarts and Prefect's API goes away while a stage works: the run ends as if nothing had happened."""
    run_id = prefect.start("reproduce/reproduce", overrides=["model.seed=1", "model.pause=25"])
    wait_for("the stage to work", lambda: prefect.said(run_id, "model: did 1 of 8"), 240)
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


def two_runs_at_once(prefect: Prefect, env: ServiceEnvironment) -> None:
    """The same deployment and another one wait in the queue, a shell is refused; the long run is not taken for dead."""
    long = prefect.start("reproduce/reproduce", overrides=["model.seed=5", f"model.pause={HEARTBEAT_S * (MAX_MISSED + 1)}"])
    wait_for("the stage to work", lambda: prefect.said(long, "model: did 1 of 8"), 240)
    changes = ["model.seed=6", "model.pause=0.5"]
    same = prefect.start("reproduce/reproduce", overrides=changes)
    night = next(run for run in prefect.runs_of("nightly/nightly") if run["state"]["type"] == "COMPLETED")
    other = prefect.start("train-and-evaluate/train-and-evaluate", seed=7, revision=f"runs/{night['name']}")
    by_hand = run_in_a_shell(env, "reproduce(parameters={'seed': 8, 'wait_minutes': 0}, return_state=True)")
    assert f"run {prefect.run(long)['name']} (PID " in by_hand, by_hand
    assert "start this one when it has ended, or cancel it" in by_hand
    assert prefect.state(long) == "RUNNING", "all that was while the first one worked"
    assert {prefect.state(same), prefect.state(other)} <= {"SCHEDULED", "PENDING"}
    ended = [prefect.finished(run_id, 400) for run_id in (long, same, other)]
    for run in ended:
        assert run["state"]["type"] == "COMPLETED", run["state"]["message"]
    times = sorted((datetime.fromisoformat(run["start_time"]), datetime.fromisoformat(run["end_time"])) for run in ended)
    assert all(end <= start for (_, end), (start, _) in pairwise(times)), "one after the other"
    assert times[0][1] - times[0][0] > timedelta(seconds=HEARTBEAT_S * MAX_MISSED), (
        "long enough to be marked, had it been silent"
    )
    waited = call(env.project, "git", "show", f"runs/{ended[1]['name']}:dvc.lock")
    assert outs(waited) == outs(undisturbed(env, changes))
    assert call(env.project, "git", "status", "--porcelain") == ""
    call(env.project, "git", "fsck", "--strict")


def run_in_a_shell(env: ServiceEnvironment, expression: str) -> str:
    """What a flow started by hand says at its end, in a shell that `python -m infra.services env` made a client."""
    script = f"from flows.pipeline import *; print('ended:', ({expression}).message)"
    command = "; ".join([*services.environment_lines(env), 'exec python -c "$0"'])
    output = call(env.project, "sh", "-c", command, script)
    return output.rpartition("ended: ")[2]


def worker_is_killed_in_mid_stage(prefect: Prefect, mlflow: Mlflow, env: ServiceEnvironment) -> None:
    """kill -9 of the worker with everything below it: it is started again, the next run takes over, bytes as undisturbed."""
    changes = ["model.seed=2", "model.pause=12"]
    killed = prefect.start("reproduce/reproduce", overrides=changes)
    wait_for("the stage to work", lambda: prefect.said(killed, "model: did 2 of 8"), 240)
    pid = services.supervisor(env).supervisor.getProcessInfo(WORKER)["pid"]
    doomed = [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]
    assert len(doomed) >= 3, "worker, flow run and stage"
    for process in doomed:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(doomed, timeout=10)
    wait_for("another worker", lambda: services.is_healthy(env, program(env, WORKER)), 90)
    again = prefect.start("reproduce/reproduce", overrides=changes)
    run = prefect.finished(again, 300)
    assert run["state"]["type"] == "COMPLETED", run["state"]["message"]
    assert prefect.state(killed) == "CRASHED", "no run is left in Running"
    recovered = call(env.project, "git", "show", f"runs/{run['name']}:dvc.lock")
    calm = undisturbed(env, changes)
    assert outs(recovered) == outs(calm), "outs are those of an undisturbed run"
    assert not [path for path in (env.project / ".dvc/tmp").glob("rwlock*") if path.read_text().strip() not in {"", "{}"}]
    abandoned_run_is_found(prefect, env)


def abandoned_run_is_found(prefect: Prefect, env: ServiceEnvironment) -> None:
    """With nobody left to start another run, the automation marks the dead one within three heartbeats (90 s)."""
    killed = prefect.start("reproduce/reproduce", overrides=["model.seed=3", "model.pause=120"])
    wait_for("a heartbeat and some work", lambda: prefect.said(killed, "model: did 3 of 8"), 240)
    server = services.supervisor(env).supervisor
    pid = server.getProcessInfo(WORKER)["pid"]
    for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
        process.send_signal(signal.SIGKILL)
    assert prefect.state(killed) == "RUNNING"
    wait_for("the automation", lambda: prefect.state(killed) == "CRASHED", 300)
    assert prefect.run(killed)["state"]["message"] == f"No heartbeat for {HEARTBEAT_S * MAX_MISSED} s."
    wait_for("another worker", lambda: services.is_healthy(env, program(env, WORKER)), 90)


def undisturbed(env: ServiceEnvironment, changes: list[str]) -> str:
    """`dvc.lock` of the same parameters by plain `dvc repro`, in a clone with a cache of its own."""
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
    """State by id; those to come are planned anew whenever the schedules are deployed."""
    ended = {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED", "CANCELLED"]}}}
    return {run["id"]: run["state_name"] for run in prefect.post("/flow_runs/filter", {"flow_runs": ended})}


def backup_is_restored(mlflow: Mlflow, prefect: Prefect, env: ServiceEnvironment, folder: Path) -> None:
    """Save; lose the databases and the artifacts; restore; everything is back, and DVC's cache comes from its remote."""
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


def no_password_is_written_down(env: ServiceEnvironment) -> None:
    """Not in a log, not in a database (but as a hash), not in MLflow or Prefect, not in an argument, not in git."""
    words = {name: passwords.read(env.secrets, name) for name in passwords.GENERATED}
    words["prefect-auth"] = passwords.read(env.secrets, "prefect-auth").partition(":")[2]
    words.pop("s3-key")  # a name, not a secret; S3 shows it in requests
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
    looked = [path for root in (dumps, env.folder, env.project) for path in root.rglob("*") if path.is_file()]
    looked = [path for path in looked if env.secrets not in path.parents and env.data not in path.parents]
    assert len(looked) > 100
    for path in looked:
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # a temporary file of a process at work
            continue
        found = [name for name, word in words.items() if word.encode() in content]
        assert not found, f"{found} stands in {path}"
    for process in psutil.process_iter(["cmdline"]):
        arguments = " ".join(process.info["cmdline"] or [])
        assert not [name for name, word in words.items() if word in arguments], process.pid
    for path in env.secrets.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600, path
    assert env.secrets.stat().st_mode & 0o777 == 0o700
