"""Stage `fetch`: download the packages of sources.toml with their registry's client and check their sha256."""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

from backbone.config import HERE, data_folder


@dataclass(frozen=True)
class Package:
    """One pinned package."""

    name: str
    client: str
    version: str
    file: str
    sha256: str
    license: str
    author: str


def packages() -> list[Package]:
    """Return the packages of sources.toml."""
    with (HERE / "sources.toml").open("rb") as stream:
        return [Package(**entry) for entry in tomllib.load(stream)["package"]]


def sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _command(package: Package) -> list[str]:
    if package.client == "pip":
        return [sys.executable, "-m", "pip", "download", "--no-deps", "-q", f"{package.name}=={package.version}"]
    if package.client == "npm":
        return ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
    if package.client == "apt":
        return ["apt-get", "download", f"{package.name}={package.version}"]
    raise ValueError(f"sources.toml: client {package.client!r} of {package.name}; one of pip, npm, apt is required")


def fetch(package: Package, folder: Path) -> Path:
    """Download one package unless a file with its sha256 is present.

    Raises:
        ValueError: the downloaded file has another sha256.
    """
    target = folder / package.file
    if target.exists() and sha256(target) == package.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        subprocess.run(_command(package), cwd=scratch, check=True)
        files = [path for path in Path(scratch).iterdir() if path.is_file()]
        if len(files) != 1:
            raise ValueError(f"{package.name}: {len(files)} files downloaded; exactly one is required")
        found = sha256(files[0])
        if found != package.sha256:
            raise ValueError(f"{package.name} {package.version}: sha256 is {found}; {package.sha256} is required")
        shutil.move(files[0], target)
    return target


def main() -> None:
    """Fetch all packages."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    for package in packages():
        path = fetch(package, data_folder() / "downloads")
        print(f"{package.name} {package.version}: {path.stat().st_size / 1e6:.1f} MB, {package.license}")


if __name__ == "__main__":
    main()
