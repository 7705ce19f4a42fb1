"""HTTP clients of the services, with the passwords from files."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import httpx

from infra import passwords
from infra.topology import ServiceEnvironment

Value = TypeVar("Value")

FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


def wait_for(event: str, poll: Callable[[], Value | None], seconds: float = 120.0) -> Value:
    """Poll until the result is neither None nor False; returns the result."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            found = poll()
        except httpx.TransportError:
            found = None
        if found is not None and found is not False:
            return found
        time.sleep(0.5)
    raise AssertionError(f"waited {seconds:g} s for {event}")


class Prefect:
    """Prefect's REST API with auth string and CSRF token."""

    def __init__(self, env: ServiceEnvironment) -> None:
        user, _, word = passwords.read(env.secrets, "prefect-auth").partition(":")
        self.http = httpx.Client(base_url=env.prefect_api, auth=(user, word), timeout=30)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        client = "services-test"
        token = self.http.get("/csrf-token", params={"client": client}).raise_for_status().json()["token"]
        answer = self.http.post(path, json=body, headers={"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": client})
        assert answer.is_success, (path, answer.status_code, answer.text[:1000])
        return answer.json() if answer.content else None

    def deployment(self, name: str) -> dict[str, Any]:
        return dict(self.http.get(f"/deployments/name/{name}").raise_for_status().json())

    def start(self, name: str, **parameters: Any) -> str:
        """Start a run of a deployment with form fields; returns the run's id."""
        body = {"parameters": {"parameters": parameters}, "state": {"type": "SCHEDULED"}}
        return str(self.post(f"/deployments/{self.deployment(name)['id']}/create_flow_run", body)["id"])

    def run(self, run_id: str) -> dict[str, Any]:
        return dict(self.http.get(f"/flow_runs/{run_id}").raise_for_status().json())

    def state(self, run_id: str) -> str:
        return str(self.run(run_id)["state"]["type"])

    def finished(self, run_id: str, seconds: float = 180.0) -> dict[str, Any]:
        """Wait for the end of a run; returns the run."""

        def ended() -> dict[str, Any] | None:
            found = self.run(run_id)
            return found if found["state"]["type"] in FINAL else None

        return wait_for(f"the end of run {run_id} ({self.state(run_id)})", ended, seconds)

    def runs_of(self, deployment: str) -> list[dict[str, Any]]:
        body = {"deployments": {"id": {"any_": [self.deployment(deployment)["id"]]}}, "sort": "START_TIME_DESC"}
        return list(self.post("/flow_runs/filter", body))

    def artifacts(self, run_id: str) -> dict[str, Any]:
        found = self.post("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run_id]}}})
        return {artifact["key"]: artifact for artifact in found}

    def has_logged(self, run_id: str, text: str) -> bool:
        """Whether a line of the run's log contains the text."""
        logs = self.post("/logs/filter", {"logs": {"flow_run_id": {"any_": [run_id]}}, "sort": "TIMESTAMP_ASC"})
        return any(text in line["message"] for line in logs)


class Mlflow:
    """MLflow's REST API with basic auth."""

    def __init__(self, env: ServiceEnvironment) -> None:
        self.http = httpx.Client(
            base_url=f"{env.mlflow}/api/2.0/mlflow",
            auth=("admin", passwords.read(env.secrets, "mlflow-password")),
            timeout=30,
        )

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        return dict(self.http.get(path, params=query).raise_for_status().json())

    def versions(self) -> list[dict[str, Any]]:
        answer = self.http.get("/model-versions/search", params={"filter": "name = 'audio2image'"})
        return list(answer.raise_for_status().json().get("model_versions", []))

    def alias(self, name: str) -> str | None:
        """Version with an alias."""
        answer = self.http.get("/registered-models/alias", params={"name": "audio2image", "alias": name})
        return str(answer.json()["model_version"]["version"]) if answer.is_success else None

    def runs(self) -> list[dict[str, Any]]:
        experiment = self.get("/experiments/get-by-name", experiment_name="seeing-sound")["experiment"]["experiment_id"]
        return list(
            self.http.post("/runs/search", json={"experiment_ids": [experiment]}).raise_for_status().json().get("runs", [])
        )
