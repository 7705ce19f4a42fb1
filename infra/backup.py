"""Backup and restore of the services: `python -m infra.backup save DIR | restore DIR`.

Saved are the databases (pg_dump, custom format), all objects of the artifact store, the secret files, and a manifest with a
sha256 of each file. DVC's cache (use `dvc push`) and the result cache are not saved.
"""

from __future__ import annotations

import argparse
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
from pipeline_steps.core.hashing import sha256_file

DATABASES = ("mlflow", "mlflow_auth", "prefect")
MANIFEST = "manifest.json"


def save(env: ServiceEnvironment, folder: Path) -> int:
    """Write a backup into an empty or new `folder`; returns the number of files. The services can run meanwhile.

    The databases are saved before the objects, so that every artifact of a saved run is in the backup.

    Raises:
        InfraError: the folder is not empty, or pg_dump failed.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise InfraError(f"{folder} is not empty; use a new folder for each backup")
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
    digests = {path.relative_to(folder).as_posix(): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    (folder / MANIFEST).write_text(json.dumps({"sha256": digests}, indent=1))
    return len(digests)


def restore(env: ServiceEnvironment, folder: Path) -> int:
    """Restore a backup into a running database and store; returns the number of files. Stop worker, MLflow and Prefect first.

    Raises:
        InfraError: the backup is incomplete or damaged, or pg_restore failed.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise InfraError(f"{folder} contains no {MANIFEST}: it is not a backup or is incomplete; use another backup")
    digests: dict[str, str] = json.loads(manifest.read_text())["sha256"]
    damaged = [name for name, digest in digests.items() if not (path := folder / name).is_file() or sha256_file(path) != digest]
    if damaged:
        raise InfraError(f"{folder / damaged[0]} is damaged or missing; use another backup (nothing was changed)")
    for name in DATABASES:
        # The superuser restores, so that every object keeps its owner.
        flags = ("--clean", "--if-exists", "--exit-on-error", "--single-transaction")
        _postgres(env, "pg_restore", *flags, f"--dbname={name}", str(folder / f"{name}.dump"))
    objects = [path for path in (folder / "objects").rglob("*") if path.is_file()]
    client = _s3(env)
    if objects and BUCKET not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
        client.create_bucket(Bucket=BUCKET)
    for path in objects:
        client.upload_file(str(path), BUCKET, path.relative_to(folder / "objects").as_posix())
    return len(digests)


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

    lines = (env.secrets / "aws-credentials").read_text().splitlines()
    credentials = dict(line.split(" = ") for line in lines if " = " in line)
    return boto3.client("s3", endpoint_url=f"http://{HOST}:{env.ports['S3_PORT']}", region_name="us-east-1", **credentials)


def _keys(client: Any) -> Iterator[str]:
    if BUCKET not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
        return
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        yield from (found["Key"] for found in page.get("Contents", []) if not found["Key"].endswith("/"))


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
