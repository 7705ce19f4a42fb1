"""Tests of deployments, forms, the automation and the report server."""

from __future__ import annotations

import http.client
import socket
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML

PROJECT = Path(__file__).resolve().parents[2]


def registered() -> dict[str, dict[str, Any]]:
    text = YAML(typ="safe").load((PROJECT / "infra/prefect.yaml").read_text())
    return {item["name"]: item for item in text["deployments"]}


@pytest.mark.usefixtures("prefect_api")
def test_served_and_registered_deployments_are_equal() -> None:
    from flows.serve import deployments

    served = {item.name: item for item in deployments(PROJECT)}
    assert set(served) == set(registered()) == {"reproduce", "refresh-data", "train-and-evaluate", "promote", "nightly"}
    for name, expected in registered().items():
        item = served[name]
        assert item.entrypoint == expected["entrypoint"]
        assert item.description == expected["description"]
        assert set(item.tags) == set(expected["tags"])
        assert item.concurrency_limit == expected["concurrency_limit"]["limit"] == 1
        assert item.concurrency_options is not None
        assert (
            item.concurrency_options.collision_strategy.value
            == expected["concurrency_limit"]["collision_strategy"]
            == "ENQUEUE"
        )
        assert [each.schedule.cron for each in item.schedules] == [each["cron"] for each in expected.get("schedules", [])]  # type: ignore[union-attr]
    assert not deployments(PROJECT, schedule=False)[-1].schedules


@pytest.mark.parametrize(
    ("value", "zone"),
    [
        (None, "UTC"), ("", "UTC"), ("Europe/Berlin", "Europe/Berlin"), (":Europe/Berlin", "Europe/Berlin"), ("UTC", "UTC"),
        ("CET-1CEST,M3.5.0,M10.5.0/3", "UTC"), ("<+03>-3", "UTC"), (":/etc/no-such-file", "UTC"), ("../etc/passwd", "UTC"),
        ("/usr/share/zoneinfo/Asia/Tokyo", "Asia/Tokyo"),
    ],
)  # fmt: skip
def test_time_zone_of_schedules_is_an_iana_name(value: str | None, zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.serve import time_zone

    monkeypatch.delenv("TZ", raising=False)
    if value is not None:
        monkeypatch.setenv("TZ", value)
    if value and value.startswith("/usr") and not Path(value).exists():
        pytest.skip("the system has no zoneinfo files")
    assert time_zone() == zone


def test_forms_are_flat_and_described() -> None:
    from flows.flow_parameters import NightlyParameters, PromoteParameters, ReproduceParameters, RunParameters

    forms: tuple[type[BaseModel], ...] = (ReproduceParameters, RunParameters, PromoteParameters, NightlyParameters)
    for form in forms:
        schema = form.model_json_schema()
        assert schema["additionalProperties"] is False
        for name, field in schema["properties"].items():
            assert "anyOf" not in field, f"{name}: the UI shows a union as raw JSON"
            assert field.get("type") != "object", f"{name} is not flat"
            assert field.get("description"), f"{name} has no description"
        for definition in schema.get("$defs", {}).values():
            assert len(definition["enum"]) > 1, "the UI shows a single choice as raw JSON"
        assert form() == form.model_validate(form().model_dump(mode="json"))


@pytest.mark.parametrize(
    "values",
    [
        {"stage": []},
        {"stages": ["no-such"]},
        {"seed": -2},
        {"preset": "nope"},
        {"revision": "--upload-pack=x"},
        {"revision": "a b"},
        {"wait_minutes": -1},
    ],
)
def test_forms_refuse_invalid_values(values: dict[str, Any]) -> None:
    from flows.flow_parameters import ReproduceParameters

    with pytest.raises(ValidationError):
        ReproduceParameters.model_validate(values)


@pytest.mark.usefixtures("prefect_api")
def test_automation_is_created_once_and_updated() -> None:
    from prefect.automations import Automation

    from flows import automations

    assert automations.ensure_automation() == "created"
    assert automations.ensure_automation(40) == "updated"
    found: Any = Automation.read(name=automations.NAME)
    assert found.enabled
    trigger = found.trigger
    assert trigger.within.total_seconds() == 120
    assert trigger.posture.value == "Proactive"
    waiting = {f"prefect.flow-run.{state}" for state in ("Suspended", "Paused", "Completed", "Cancelled")}
    assert waiting <= set(trigger.expect), "a run that waits for an answer sends no heartbeat"
    assert found.actions[0].state.value == "CRASHED"


def test_only_reports_are_served(tmp_path: Path) -> None:
    from flows.report_server import serve_reports

    for name in ("reports", ".runs/reports/bold-owl"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "index.html").write_text(name)
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "reports/link.txt").symlink_to(tmp_path / "secret.txt")
    server = serve_reports(tmp_path, 0)
    try:
        port = server.server_address[1]

        def get(path: str, host: str = f"127.0.0.1:{port}") -> tuple[int, str]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", path, headers={"Host": host})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

        assert get("/current/index.html") == (200, "reports")
        assert get("/runs/bold-owl/index.html") == (200, ".runs/reports/bold-owl")
        for path in ("/", "/runs/", "/secret.txt", "/runs/../../secret.txt", "/current/%2e%2e/secret.txt", "/current/link.txt"):
            assert get(path)[0] == 404, path
        assert get("/current/index.html", "evil.example")[0] == 421
    finally:
        server.shutdown()
        server.server_close()


def test_port_of_the_reports_is_movable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.serve import start_report_server
    from pipeline_steps.core.errors import ConfigError

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} cannot be used"):
            start_report_server(tmp_path, port)
        monkeypatch.setenv("SONIFY_REPORTS_URL", f"http://127.0.0.1:{port}")
        free = start_report_server(tmp_path, None)
        assert free.server_address[1] != port
        free.shutdown()
        free.server_close()
