"""Tests of `assets.toml`: errors are found before anything is downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline_steps.assets.convert import CONVERTERS
from pipeline_steps.assets.manifest import parse_manifest, select
from pipeline_steps.core.errors import ConfigError

ENTRY = """
[[asset]]
name = "labels"
package = "carrier"
version = "1.0"
wheel = "carrier-1.0-py3-none-any.whl"
sha256 = "{digest}"
family = "vocabulary"
license = "Apache-2.0"
provenance = "made for this test"
converter = "label_list"
outputs = ["labels.txt"]
[asset.members.labels]
path = "carrier/labels.txt"
sha256 = "{digest}"
bytes = 10
"""


def entry(**changes: str) -> str:
    text = ENTRY.format(digest="0" * 64)
    for key, value in changes.items():
        lines = [f"{key} = {value}" if line.startswith(f"{key} =") else line for line in text.splitlines()]
        text = "\n".join(lines) + "\n"
    return text


def test_the_project_file_is_valid_and_complete(project: Path) -> None:
    assets = parse_manifest((project / "assets.toml").read_text(encoding="utf-8"))
    assert {asset.converter for asset in assets} == set(CONVERTERS)
    assert {"yamnet", "minilm", "efficientnet_lite0", "ssd_mobilenet_v2"} <= {asset.name for asset in assets}
    assert [asset.name for asset in assets] == sorted(asset.name for asset in assets)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"sha256": '"abc"'}, "sha256"),
        ({"package": '"--index-url=http://example.org"'}, "package"),
        ({"package": '"https://example.org/x.whl"'}, "package"),
        ({"version": '"1.0 --pre"'}, "version"),
        ({"wheel": '"../../x.whl"'}, "wheel"),
        ({"wheel": '"carrier-1.0.tar.gz"'}, "wheel"),
        ({"outputs": '["../labels.txt"]'}, "outputs"),
        ({"outputs": "[]"}, "outputs"),
        ({"bytes": "-1"}, "bytes"),
        ({"license": '""'}, "license"),
        ({"license": '"MIT"\nlicence = "MIT"'}, "licence"),
        ({"family": '"vocabulary"\nfolder = "weights"'}, "either package"),
        ({"family": '"vocabulary"\nfolder = "../weights"'}, "folder"),
    ],
)
def test_invalid_values_are_errors_with_their_key(changes: dict[str, str], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        parse_manifest(entry(**changes))


def test_invalid_toml_and_repeated_names_are_errors() -> None:
    with pytest.raises(ConfigError, match="not valid TOML"):
        parse_manifest("[[asset]\n")
    with pytest.raises(ConfigError, match="'labels' occurs twice"):
        parse_manifest(entry() + entry())
    with pytest.raises(ConfigError, match=r"output 'labels\.txt' occurs twice"):
        parse_manifest(entry() + entry(name='"other"'))


def test_select_names() -> None:
    assets = parse_manifest(entry() + entry(name='"other"', outputs='["other.txt"]'))
    assert [asset.name for asset in select(assets, [])] == ["labels", "other"]
    assert [asset.name for asset in select(assets, ["other"])] == ["other"]
    with pytest.raises(ConfigError, match="'lables' is not in"):
        select(assets, ["lables"])
