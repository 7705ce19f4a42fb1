"""Tests of services.py, topology.py, passwords.py and backup.py without starting a server."""

from __future__ import annotations

import configparser
import os
import stat
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import backup, passwords, services
from infra.topology import PORTS, ServiceEnvironment, find_postgres, programs, unprivileged_user


@pytest.fixture
def env(tmp_path: Path) -> ServiceEnvironment:
    return ServiceEnvironment(tmp_path, dict(PORTS), tmp_path)


def test_passwords_are_private_stable_and_different(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    passwords.create(folder)
    first = {path.name: path.read_text() for path in folder.iterdir()}
    passwords.create(folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == first, "a second call keeps them"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    words = [first[name] for name in passwords.GENERATED]
    assert len(set(words)) == len(words)
    assert all(len(word) >= 32 for word in words)
    assert first["prefect-auth"].startswith("admin:")


def test_modes_of_password_files_are_corrected(tmp_path: Path) -> None:
    passwords.create(tmp_path)
    (tmp_path / "mlflow-password").chmod(0o644)
    passwords.create(tmp_path)
    assert stat.S_IMODE((tmp_path / "mlflow-password").stat().st_mode) == 0o600


def test_supervisor_configuration_contains_no_secret(env: ServiceEnvironment, tmp_path: Path) -> None:
    passwords.create(env.secrets)
    env.logs.mkdir()
    services._write_supervisor_config(env)
    text = (tmp_path / "supervisord.conf").read_text()
    words = [passwords.read(env.secrets, name) for name in passwords.GENERATED]
    assert not [word for word in words if word in text]
    assert len(programs(env)) == 7


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30))
def test_quoted_values_are_read_back(text: str) -> None:
    """Supervisor expands percent signs and splits like a shell."""
    import shlex

    from supervisor.options import expand

    quoted = services._quoted(text)
    if "\\" in text:
        return
    assert shlex.split(expand(quoted, {}, "test")) == [text]


def test_configuration_restarts_programs_and_stops_groups(env: ServiceEnvironment) -> None:
    env.logs.mkdir()
    services._write_supervisor_config(env)
    config = configparser.RawConfigParser()
    config.read(env.folder / "supervisord.conf")
    for name in config.sections():
        if name.startswith("program:"):
            assert config[name]["autorestart"] == "true"
            assert config[name]["autostart"] == "false", "services.start decides the order"
            assert config[name]["stopasgroup"] == ("false" if name.endswith("postgres") else "true")
    assert config["unix_http_server"]["chmod"] == "0700"


def test_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    env = ServiceEnvironment(tmp_path / ("x" * 100), dict(PORTS), tmp_path)
    with pytest.raises(services.InfraError, match="SERVICES_DIR"):
        services.start(env)


needs_postgres = pytest.mark.skipif(find_postgres() is None, reason="no PostgreSQL that the server's user can access")
only_root = pytest.mark.skipif(not unprivileged_user(), reason="only root runs PostgreSQL as another user")


def test_without_postgresql_nothing_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("SERVICES_POSTGRES", str(tmp_path / "bin"))
    monkeypatch.setenv("SERVICES_DIR", str(tmp_path / "services"))
    assert services.main(["start"]) == 5
    output = capsys.readouterr().err
    assert "no PostgreSQL found" in output
    assert "SERVICES_POSTGRES" in output
    assert not (tmp_path / "services").exists()


@only_root
@needs_postgres
def test_inaccessible_postgresql_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example a wheel below /root, where initdb fails with "Permission denied"."""
    real = find_postgres()
    assert real is not None
    with tempfile.TemporaryDirectory(prefix="closed-") as closed:
        folder = Path(closed) / "bin"
        folder.mkdir()
        for path in real.iterdir():
            (folder / path.name).symlink_to(path)
        monkeypatch.setenv("SERVICES_POSTGRES", str(folder))
        assert find_postgres() is None
        Path(closed).chmod(0o755)
        assert find_postgres() == folder


@only_root
@needs_postgres
def test_inaccessible_services_folder_is_refused(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="closed-") as closed:  # mode 0700, and short enough for a socket
        env = ServiceEnvironment(Path(closed) / "services", dict(PORTS), tmp_path)
        with pytest.raises(services.InfraError, match="cannot access"):
            services.start(env)


@needs_postgres
def test_only_sockets_of_other_users_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, env: ServiceEnvironment
) -> None:
    """SeaweedFS would start and wait forever."""
    monkeypatch.setattr(services, "SOCKETS", tmp_path)
    (tmp_path / "seaweedfs-s3-9999.sock").touch()
    assert services._stale_sockets(env) == []
    left = tmp_path / f"seaweedfs-master-grpc-{PORTS['S3_PORT'] + 2}.sock"
    left.touch()
    assert services._stale_sockets(env) == [left]
    monkeypatch.setattr(os, "geteuid", lambda: left.stat().st_uid + 1)
    with pytest.raises(services.InfraError, match=f"{left.name} belongs to another user"):
        services.start(env)


def test_backup_refuses_invalid_folders(env: ServiceEnvironment, tmp_path: Path) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "file").write_text("x")
    with pytest.raises(services.InfraError, match="not empty"):
        backup.save(env, used)
    with pytest.raises(services.InfraError, match="is not a backup"):
        backup.restore(env, used)


def test_status_of_stopped_services_is_not_healthy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SERVICES_DIR", str(tmp_path))
    assert services.main(["status"]) == 1
    assert "not healthy" in capsys.readouterr().out


def test_unknown_service_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SERVICES_DIR", str(tmp_path))
    assert services.main(["restart", "prefct"]) == 5
    assert "prefect" in capsys.readouterr().err


def test_restart_of_stopped_services_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SERVICES_DIR", str(tmp_path))
    assert services.main(["restart", "mlflow"]) == 5
    assert "mlflow cannot be restarted: the services do not run" in capsys.readouterr().err


def test_environment_lines_contain_no_password(env: ServiceEnvironment) -> None:
    passwords.create(env.secrets)
    text = "\n".join(services.environment_lines(env))
    assert passwords.read(env.secrets, "mlflow-password") not in text
    assert f"$(cat '{env.secrets}/mlflow-password')" in text
    assert f"export PREFECT_API_URL='http://127.0.0.1:{PORTS['PREFECT_PORT']}/api'" in text
