"""Passwords of the services: generated once, one file each, readable by the owner only."""

from __future__ import annotations

import json
import os
import secrets
import sys
from pathlib import Path

GENERATED = (
    "postgres-admin",
    "postgres-mlflow",
    "postgres-prefect",
    "mlflow-password",
    "mlflow-flask-key",
    "s3-key",
    "s3-secret",
)
"""Files with one random password each; the other files are derived from them."""


def create(folder: Path) -> None:
    """Create missing files (mode 0600) in `folder` (mode 0700); files that exist stay unchanged."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    for name in GENERATED:
        write(folder / name, secrets.token_urlsafe(24))
    write(folder / "prefect-auth", f"admin:{secrets.token_urlsafe(24)}")
    for role, name in (("postgres", "admin"), ("mlflow", "mlflow"), ("prefect", "prefect")):
        write(folder / f"pgpass-{name}", f"*:*:*:{role}:{read(folder, f'postgres-{name}')}\n")
    # libpq reads host and port from PGHOST and PGPORT and the password from PGPASSFILE.
    database = "postgresql+psycopg2://mlflow@/mlflow_auth"
    # A password check is slow, and an upload makes one per file; a valid password is therefore cached for 30 seconds.
    settings = f"default_permission = READ\ndatabase_uri = {database}\nauth_cache_ttl_seconds = 30\n"
    write(folder / "mlflow-auth.ini", f"[mlflow]\n{settings}")
    key, secret = read(folder, "s3-key"), read(folder, "s3-secret")
    write(folder / "aws-credentials", f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
    identity = {"name": "mlflow", "credentials": [{"accessKey": key, "secretKey": secret}], "actions": ["Admin"]}
    write(folder / "s3.json", json.dumps({"identities": [identity]}))


def read(folder: Path, name: str) -> str:
    """Content of a secret file."""
    return (folder / name).read_text(encoding="ascii").strip()


def write(path: Path, text: str) -> None:
    """Create `path` with mode 0600 atomically; the content of an existing file stays unchanged."""
    if path.exists():
        path.chmod(0o600)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as handle:
        handle.write(text)
    temporary.rename(path)


if __name__ == "__main__":
    create(Path(sys.argv[1]))
