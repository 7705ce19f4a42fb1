"""Back up and restore what the services hold: `python -m infra.backup save DIR | restore DIR`.

Saved: the databases (pg_dump, custom format), every object of the artifact store, the secret files, and a
manifest with a sha256 of each file. Not saved: DVC's cache and the memo, which belong to `dvc push` and to the memo's own URL.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra.services import InfraError, postgres_tool, read_environment
from infra.topology import BUCKET, HOST, ServiceEnvironment

DATABASES = ("mlflow", "mlflow_auth", "prefect")
MANIFEST = "manifest.json"


def save(env: ServiceEnvironment, folder: Path) -> int:
    """Write a backup into the empty or missing `folder`; returns the number of files.

    The databases come first and the objects after them, so every artifact that a saved run names is in the backup. pg_dump
    sees one moment of each database; the services may go on working.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise InfraError(f"{folder} is not empty; name a new folder for each backup")
    for name in DATABASES:
        _postgres(env, "pg_dump", "--format=custom", f"--file={folder / name}.dump", name)
    objects = folder / "objects"
    objects.mkdir()
    client = _s3(env)
    for key in _keys(client):
        target_path = objects / key
        target_path.parent.mkdir(parents=True, exist_ok=True)
        client.download_file(BUCKET, key, str(target_path))
    shutil.copytree(env.secrets, folder / "secrets")
    sums = {path.relative_to(folder).as_posix(): _sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    (folder / MANIFEST).write_text(json.dumps({"sha256": sums}, indent=1))
    return len(sums)


def restore(env: ServiceEnvironment, folder: Path) -> int:
    """Put a backup into a running database and store; returns the number of files. Stop worker, MLflow and Prefect first.

    Raises:
        ServiceError: the backup is incomplete or damaged.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise InfraError(f"{folder} holds no {MANIFEST}: not a backup, or one that did not finish")
    described: dict[str, Any] = json.loads(manifest.read_text())
    damaged = [name for name, wanted in described["sha256"].items() if not _matches(folder / name, wanted)]
    if damaged:
        raise InfraError(f"{folder / damaged[0]} is damaged or missing; take another backup (nothing was changed)")
    for name in DATABASES:
        # As the superuser, so that every object goes back to its owner.
        flags = ("--clean", "--if-exists", "--exit-on-error", "--single-transaction")
        _postgres(env, "pg_restore", *flags, f"--dbname={name}", str(folder / f"{name}.dump"))
    objects = [path for path in (folder / "objects").rglob("*") if path.is_file()]
    client = _s3(env)
    if objects and BUCKET not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
        client.create_bucket(Bucket=BUCKET)
    for path in objects:
        client.upload_file(str(path), BUCKET, path.relative_to(folder / "objects").as_posix())
    return len(described["sha256"])


def _postgres(env: ServiceEnvironment, tool: str, *arguments: str) -> None:
    environment = {**os.environ, "PGPASSFILE": str(env.secrets / "pgpass-admin")}
    address = ("--host", HOST, "--port", str(env.ports["POSTGRES_PORT"]), "--username", "postgres", "--no-password")
    done = subprocess.run(
        [str(postgres_tool(tool)), *address, *arguments], check=False, env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise InfraError(f"{tool} failed: {done.stderr.strip()}")


def _s3(env: ServiceEnvironment) -> Any:
    import boto3

    words = dict(line.split(" = ") for line in (env.secrets / "aws-credentials").read_text().splitlines() if " = " in line)
    return boto3.client("s3", endpoint_url=f"http://{HOST}:{env.ports['S3_PORT']}", region_name="us-east-1", **words)


def _keys(client: Any) -> Iterator[str]:
    if BUCKET not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
        return
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        yield from (found["Key"] for found in page.get("Contents", []) if not found["Key"].endswith("/"))


def _matches(path: Path, wanted: str) -> bool:
    return path.is_file() and _sha256(path) == wanted


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.backup", description=__doc__)
    parser.add_argument("action", choices=("save", "restore"))
    parser.add_argument("folder", type=Path)
    given = parser.parse_args(arguments)
    try:
        count = (save if given.action == "save" else restore)(read_environment(), given.folder)
    except InfraError as error:
        print(error, file=sys.stderr)
        return 5
    print(f"{'saved' if given.action == 'save' else 'restored'} {count} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
