"""Tests of compose.yaml and Dockerfile: schemas, hardening, and agreement with topology.py."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from infra import passwords
from infra.topology import INFRA, PORTS, ServiceEnvironment, constants, programs

COMPOSE = INFRA / "compose.yaml"
PAIRS = {
    "object-store": "object-store",
    "mlflow": "mlflow",
    "prefect": "prefect",
    "reports": "reports",
    "demo": "demo",
    "worker": "worker",
}
"""Service of compose.yaml -> program of topology.py. The official image of PostgreSQL is checked separately."""


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The file as Compose reads it without variables."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", COMPOSE.read_text())
    assert "${" not in text, "every variable has a default"
    return dict(YAML(typ="safe").load(text))


@pytest.fixture
def env(tmp_path: Path) -> ServiceEnvironment:
    return ServiceEnvironment(tmp_path, dict(PORTS), tmp_path)


def tool(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def test_compose_file_follows_the_compose_specification(tmp_path: Path) -> None:
    command = [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, str(COMPOSE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    broken = tmp_path / "compose.yaml"
    broken.write_text(COMPOSE.read_text().replace("healthcheck:", "helthcheck:", 1))
    assert subprocess.run([*command, str(broken)], capture_output=True, check=False).returncode == 1, "the check can fail"


def test_dockerfile_passes_the_linter() -> None:
    done = subprocess.run([tool("hadolint"), str(INFRA / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_dockerfile_has_both_targets_pinned_and_unprivileged() -> None:
    text = (INFRA / "Dockerfile").read_text()
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", text, re.MULTILINE)
    names = {name for _, name in stages}
    assert {"cpu", "gpu"} <= names
    for image, _ in stages:
        assert image in names or re.search(r":\d+\.\d+\.\d+-", image), f"{image} is not pinned to an exact version"
    assert "USER 1000:1000" in text
    for line in re.findall(r"pip install .*", text):
        assert "--constraint constraints.txt" in line, line
    assert not re.search(r"(ARG|ENV)[^\n]*(PASSWORD|TOKEN|SECRET|KEY=)", text), "no secret in the image"


def test_image_excludes_data_and_secrets() -> None:
    lines = (INFRA / "Dockerfile.dockerignore").read_text().split()
    assert lines[0] == "*", "everything else is excluded"
    assert not {"!data", "!.runs", "!.git", "!.env", "!."} & set(lines)


def test_every_service_is_hardened(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["user"] == "1000:1000", name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["deploy"]["resources"]["limits"].keys() >= {"cpus", "memory", "pids"}, name
        assert "privileged" not in service, name
        assert "network_mode" not in service, name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} publishes {port} beyond this machine"
        if name != "deploy":
            assert "healthcheck" in service, name


def test_images_are_pinned_or_built_here(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        if "build" in service:
            assert service["build"]["dockerfile"] == "infra/Dockerfile", name
        else:
            assert re.search(r":\d+\.\d+-\w+(@sha256:[0-9a-f]{64})?$", service["image"]), service["image"]


def test_secrets_are_the_files_of_passwords(compose: dict[str, Any], tmp_path: Path) -> None:
    passwords.create(tmp_path / "secrets")
    created = {path.name for path in (tmp_path / "secrets").iterdir()}
    assert compose["secrets"].keys() <= created
    for secret in compose["secrets"].values():
        assert secret.keys() == {"file"}
    for name, service in compose["services"].items():
        assert set(service.get("secrets", [])) <= compose["secrets"].keys(), name
        for key, value in service.get("environment", {}).items():
            secret = re.search(r"PASSWORD|SECRET|TOKEN|AUTH_STRING|://\w+:\w+@", f"{key}={value}")
            assert secret is None or str(value).startswith("/run/secrets"), f"{name}: {key} contains a secret"


def test_each_service_gets_only_the_secrets_it_reads(compose: dict[str, Any]) -> None:
    scripts = {
        name: (INFRA / "bin" / name).read_text()
        for name in ("mlflow-server", "prefect-server", "with-clients", "object-store", "demo-page")
    }
    for service, script in (
        ("mlflow", "mlflow-server"),
        ("prefect", "prefect-server"),
        ("worker", "with-clients"),
        ("object-store",) * 2,
        ("demo", "demo-page"),
    ):
        named = set(re.findall(r"SERVICES_SECRETS/([\w.-]+)", scripts[script])) | set(
            re.findall(r"\(secret ([\w-]+)\)", scripts[script])
        )
        assert set(compose["services"][service]["secrets"]) == named, service


@pytest.mark.parametrize("service", sorted(PAIRS))
def test_container_and_process_have_the_same_settings(service: str, compose: dict[str, Any], env: ServiceEnvironment) -> None:
    described = compose["services"][service]
    program = next(found for found in programs(env) if found.name == PAIRS[service])
    assert Path(described["command"][0]).name == Path(program.command[0]).name, "the same start script"
    names = [Path(name).stem for name in described["env_file"]]
    inside = {**constants(*names), **{key: str(value) for key, value in described["environment"].items()}}
    only_process = {"PATH", "PGHOST", "PGPORT", "TMPDIR"} | {"PREFECT_HOME"}
    if service == "reports":
        only_process |= {"SERVICES_SECRETS"}  # the page needs no secret
    assert inside.keys() - only_process == program.environment.keys() - only_process
    for key in constants(*names):
        assert inside[key] == program.environment[key], key
    path = program.health.split("/", 3)[3]
    assert described["healthcheck"]["test"][-1].endswith(path), "the same health check"


def test_postgres_requires_passwords_in_both_setups(compose: dict[str, Any], env: ServiceEnvironment) -> None:
    described = compose["services"]["postgres"]
    assert "--auth-host=scram-sha-256 --auth-local=scram-sha-256" in described["environment"]["POSTGRES_INITDB_ARGS"]
    assert "./roles.sql:/docker-entrypoint-initdb.d/roles.sql:ro" in described["volumes"]
    command = " ".join(programs(env)[0].command)
    for setting in ("password_encryption=scram-sha-256", "log_statement=none"):
        assert setting in command
        assert setting in " ".join(described["command"])


def test_postgres_owns_its_data_folder(compose: dict[str, Any]) -> None:
    """The volume belongs to the image's user (mode 1777); another user can create a folder in it but not change its mode."""
    described = compose["services"]["postgres"]
    (mount,) = [Path(volume.split(":")[1]) for volume in described["volumes"] if volume.startswith("postgres:")]
    assert mount in Path(described["environment"]["PGDATA"]).parents


def test_internal_networks_have_no_route_out(compose: dict[str, Any]) -> None:
    networks = compose["networks"]
    assert all((networks[name] or {}).get("internal") for name in ("databases", "objects", "services"))
    assert compose["services"]["postgres"]["networks"] == ["databases"]
    assert compose["services"]["object-store"]["networks"] == ["objects"]


def test_telemetry_is_off_everywhere(compose: dict[str, Any], env: ServiceEnvironment) -> None:
    common = constants("common")
    assert common["DO_NOT_TRACK"] == "1"
    assert common["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert common["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert common["DVC_NO_ANALYTICS"] == "1"
    assert "-master.telemetry=false" in (INFRA / "bin/object-store").read_text()
    for name, service in compose["services"].items():
        assert name == "postgres" or "env/common.env" in service["env_file"], name
    for program in programs(env):
        assert program.name == "postgres" or program.environment.items() >= common.items(), program.name
