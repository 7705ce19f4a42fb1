"""Access checks: requests without a valid password, from another origin or with another host name are refused."""

from __future__ import annotations

import json

import httpx
import psutil
import psycopg2
import pytest
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.sync.client import connect

from infra import passwords
from infra.topology import BUCKET, HOST, ServiceEnvironment
from tests.services.clients import Mlflow, Prefect


def check_prefect_api(env: ServiceEnvironment) -> None:
    """All routes except the health check need the auth string; changes also need a CSRF token of the client."""
    prefect, flows = Prefect(env), f"{env.prefect_api}/flows/filter"
    assert httpx.get(f"{env.prefect_api}/health").status_code == 200
    for wrong in (None, ("admin", "admin"), ("admin", "")):
        assert httpx.get(f"{env.prefect_api}/deployments/name/nightly/nightly", auth=wrong).status_code == 401
        assert httpx.post(flows, json={}, auth=wrong).status_code in {401, 403}
    assert prefect.http.post("/flows/filter", json={}).status_code == 403, "a change needs a CSRF token"
    for forged in ({"Prefect-Csrf-Token": "0" * 64, "Prefect-Csrf-Client": "services-test"}, {"Prefect-Csrf-Token": "0" * 64}):
        assert prefect.http.post("/flows/filter", json={}, headers=forged).status_code == 403, "a token of another client"
    assert prefect.post("/flows/filter", {}), "a token of this client"
    settings = prefect.http.get("/admin/settings").json()["server"]
    assert settings["api"]["csrf_protection_enabled"] is True
    assert settings["analytics_enabled"] is False
    word = passwords.read(env.secrets, "prefect-auth").partition(":")[2]
    assert word not in prefect.http.get("/admin/settings").text


def check_prefect_websockets(env: ServiceEnvironment) -> None:
    """Websockets of events and logs need the auth string; earlier releases did not check it (CVE-2026-7723)."""
    address = env.prefect_api.replace("http://", "ws://")
    for path in ("events/in", "events/out", "logs/out"):
        with pytest.raises(InvalidStatus), connect(f"{address}/{path}"):
            pass
        with connect(f"{address}/{path}", subprotocols=["prefect"]) as socket:  # type: ignore[list-item]
            socket.send(json.dumps({"type": "auth", "token": "admin:admin"}))
            with pytest.raises(ConnectionClosedError) as refused:
                socket.recv(timeout=20)
            assert refused.value.rcvd is not None
            assert refused.value.rcvd.code == 1008, path


def check_mlflow(env: ServiceEnvironment) -> None:
    """MLflow requires basic auth, its own host name and its own origin, and denies frames."""
    search = f"{env.mlflow}/api/2.0/mlflow/experiments/search?max_results=1"
    word = passwords.read(env.secrets, "mlflow-password")
    right = ("admin", word)
    for wrong in (None, ("admin", "password1234"), ("admin", ""), ("nobody", word)):  # the second is MLflow's default
        assert httpx.get(search, auth=wrong).status_code == 401
    for path in ("/", "/get-artifact?path=a&run_uuid=b", "/ajax-api/2.0/mlflow/experiments/search?max_results=1", "/graphql"):
        assert httpx.get(env.mlflow + path).status_code in {401, 403, 404, 405}, path
    for path in ("/api/2.0/mlflow-artifacts/artifacts", "/ajax-api/2.0/mlflow/users/current"):
        assert httpx.get(env.mlflow + path).status_code in {401, 403, 404}, path
    answer = Mlflow(env).http.get("/experiments/search", params={"max_results": 1})
    assert answer.status_code == 200
    assert answer.headers["x-frame-options"] == "DENY"
    for host in ("elsewhere.example", f"elsewhere.example:{env.ports['MLFLOW_PORT']}", "127.0.0.1"):
        assert httpx.get(search, auth=right, headers={"Host": host}).status_code == 403, host
    create = f"{env.mlflow}/api/2.0/mlflow/experiments/create"
    headers = {"Origin": "https://elsewhere.example"}
    assert httpx.post(create, json={"name": "foreign"}, auth=right, headers=headers).status_code == 403
    found = Mlflow(env).http.get("/experiments/get-by-name", params={"experiment_name": "foreign"})
    assert found.status_code == 404, "nothing was created"


def check_stores(env: ServiceEnvironment) -> None:
    """PostgreSQL requires the password of the role, the object store its keys."""
    address = {"host": HOST, "port": env.ports["POSTGRES_PORT"], "connect_timeout": 10}
    word = passwords.read(env.secrets, "postgres-mlflow")
    psycopg2.connect(**address, user="mlflow", dbname="mlflow", password=word).close()
    for user, database, message in (
        ("mlflow", "prefect", "permission denied"),
        ("prefect", "mlflow", "password authentication"),
    ):
        with pytest.raises(psycopg2.OperationalError, match=message):
            psycopg2.connect(**address, user=user, dbname=database, password=word)
    with pytest.raises(psycopg2.OperationalError, match="password"):
        psycopg2.connect(**address, user="postgres", dbname="postgres", password="postgres")
    for path in ("/", f"/{BUCKET}", f"/{BUCKET}/artifacts"):
        assert httpx.get(f"http://{HOST}:{env.ports['S3_PORT']}{path}").status_code == 403, path


def check_artifact_access(env: ServiceEnvironment, path: str) -> None:
    """An artifact is served by MLflow with its password, and not by the object store without a key."""
    port = env.ports["S3_PORT"]
    served = f"{env.mlflow}/api/2.0/mlflow-artifacts/artifacts/{path}"
    assert httpx.get(served, auth=("admin", passwords.read(env.secrets, "mlflow-password"))).status_code == 200
    assert httpx.get(served).status_code == 401
    assert httpx.get(f"http://{HOST}:{port}/{BUCKET}/artifacts/{path}").status_code == 403
    filer = f"http://{HOST}:{port + 5}/buckets/{BUCKET}/artifacts/{path}"
    assert httpx.get(filer).status_code == 404, "the filer's HTTP interface, which needs no key, is closed"


def check_report_page(env: ServiceEnvironment) -> None:
    """The report page serves reports only."""
    assert httpx.get(f"{env.reports}/current/index.html", headers={"Host": "elsewhere.example"}).status_code == 421
    for path in ("/current/../../params.yaml", "/runs/%2e%2e/%2e%2e/params.yaml", "/current/", "/params.yaml"):
        assert httpx.get(env.reports + path).status_code == 404, path


def check_listeners(env: ServiceEnvironment) -> None:
    """All services listen on loopback only."""
    supervisor = psutil.Process(int((env.folder / "supervisord.pid").read_text()))
    ours = {process.pid for process in supervisor.children(recursive=True)}
    sockets = [entry for entry in psutil.net_connections("tcp") if entry.status == "LISTEN" and entry.pid in ours]
    assert {entry.laddr.ip for entry in sockets} == {"127.0.0.1"}
