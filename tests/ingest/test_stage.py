"""Stage ingest on demo files: outs, cached results, errors, and resuming after a kill."""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline_steps.core.errors import ConfigError, DataError
from pipeline_steps.core.media_shards import MediaShardReader
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import AUDIO, IMAGES
from pipeline_steps.core.tables import read_table
from pipeline_steps.ingest import stage
from pipeline_steps.ingest.config import DecoderLimitsConfig, ImageConfig, IngestConfig, MetadataColumnsConfig

ORIGIN = ["package", "source"]
CONFIG = IngestConfig(
    root="pool",
    metadata="manifest.csv",
    columns=MetadataColumnsConfig(license="licence", author="author", source=ORIGIN, group=ORIGIN),
    pool={"split": "pool"},
    holdout={"split": "gold"},
    decoder=DecoderLimitsConfig(workers=2),
)
NUM_IMAGES, NUM_CLIPS = 14, 6


def make_pool(demo: Path, folder: Path, images: int, clips: int) -> Path:
    """Copy the first files of the demo pool and one gold pair into a project folder; returns the manifest."""
    pool = folder / "pool"
    shutil.rmtree(pool, ignore_errors=True)
    with (demo / "manifest.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    remaining = {("image", "pool"): images, ("sound", "pool"): clips, ("image", "gold"): 1, ("sound", "gold"): 1}
    chosen = []
    for row in rows:
        key = (row["kind"], row["split"])
        if remaining.get(key, 0):
            remaining[key] -= 1
            chosen.append(row)
            target = pool / row["file"]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(demo / row["file"], target)
    write_manifest(pool / "manifest.csv", chosen)
    return pool / "manifest.csv"


def write_manifest(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_manifest(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def outs(folder: Path) -> dict[str, str]:
    """Path -> sha256 of the outs in a project folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for part in ("data/catalog", "data/media")
        for path in sorted((folder / part).rglob("*"))
    }


@pytest.fixture(scope="module")
def project_folder(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ingest")
    make_pool(demo, folder, NUM_IMAGES, NUM_CLIPS)
    report = stage.run(CONFIG, ProjectPaths(folder))
    assert (report.n_in, report.n_ok, report.cache_misses, report.cache_hits) == (22, 22, 22, 0)
    return folder


@pytest.fixture
def copy(project_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(project_folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_second_run_uses_the_cache_and_writes_the_same_bytes(copy: Path) -> None:
    before = outs(copy)
    shutil.rmtree(copy / "data")
    report = stage.run(CONFIG, ProjectPaths(copy))
    assert (report.cache_misses, report.cache_hits) == (0, 22)
    assert outs(copy) == before


def test_new_image_is_one_decode_and_one_changed_shard(copy: Path) -> None:
    before = outs(copy)
    rows = read_manifest(copy / "pool/manifest.csv")
    Image.fromarray(np.random.default_rng(3).integers(0, 255, (50, 60, 3), np.uint8)).save(copy / "pool/new.png")
    write_manifest(
        copy / "pool/manifest.csv", [*rows, rows[0] | {"file": "new.png", "kind": "image", "split": "pool", "source": "new"}]
    )
    report = stage.run(CONFIG, ProjectPaths(copy))
    assert (report.cache_misses, report.cache_hits, report.metrics["images"]["items"]) == (1, 22, NUM_IMAGES + 2)
    after = outs(copy)
    changed = {name for name in after if before.get(name) != after[name]}
    assert len(changed & {name for name in after if name.endswith(".tar")}) == 1
    assert changed - {name for name in changed if name.endswith(".tar")} == {
        "data/catalog/images.parquet",
        "data/catalog/checksums.sha256",
        "data/media/index.parquet",
        "data/media/checksums.sha256",
    }


def test_shard_of_a_removed_item_is_deleted(copy: Path) -> None:
    for row in read_manifest(copy / "pool/manifest.csv"):
        if row["kind"] == "image" and row["split"] == "pool":
            last = row["file"]
    rows = [row for row in read_manifest(copy / "pool/manifest.csv") if row["file"] != last]
    write_manifest(copy / "pool/manifest.csv", rows)
    stage.run(CONFIG, ProjectPaths(copy))
    reader = MediaShardReader(copy / "data/media")
    shards = {path.name for path in (copy / "data/media").glob("*.tar")}
    assert shards == {f"{kind}-{item[0]}.tar" for kind in ("image", "audio") for item in reader.ids(kind)}
    assert len(reader.ids("image")) == NUM_IMAGES


def test_image_parameter_does_not_invalidate_audio(copy: Path) -> None:
    report = stage.run(CONFIG.model_copy(update={"image": ImageConfig(max_side=64)}), ProjectPaths(copy))
    assert (report.cache_misses, report.cache_hits) == (NUM_IMAGES + 1, NUM_CLIPS + 1)


def test_outs_match_their_schemas_and_decode(project_folder: Path) -> None:
    images = read_table(project_folder / "data/catalog/images.parquet", IMAGES).to_pylist()
    audio = read_table(project_folder / "data/catalog/audio.parquet", AUDIO).to_pylist()
    assert (len(images), len(audio)) == (NUM_IMAGES + 1, NUM_CLIPS + 1)
    assert sum(row["holdout"] for row in images) == sum(row["holdout"] for row in audio) == 1
    assert all(row["license"] and row["author"] and "/" in row["source"] for row in images + audio)
    reader = MediaShardReader(project_folder / "data/media")
    for row in images:
        assert max(reader.image(row["image_id"]).shape) <= 256
        assert hashlib.sha256((project_folder / "pool" / row["path"]).read_bytes()).hexdigest() == row["sha256"]
    for row in audio:
        assert len(reader.sound(row["audio_id"])) / 48_000 == row["duration_s"]
        assert -70 < row["lufs"] < 0


def test_ground_truth_columns_are_never_read(copy: Path) -> None:
    before = outs(copy)
    rows = read_manifest(copy / "pool/manifest.csv")
    write_manifest(
        copy / "pool/manifest.csv",
        [row | {"label": "x", "caption": "y", "group": "z", "pair": "w", "id": "v"} for row in rows],
    )
    stage.run(CONFIG, ProjectPaths(copy))
    assert outs(copy) == before


def test_c3_hostile_paths_of_a_table(copy: Path) -> None:
    rows = read_manifest(copy / "pool/manifest.csv")
    (copy / "pool/out.png").symlink_to("../../secret.png")
    (copy.parent / "secret.png").write_bytes(b"secret")
    hostile = ["../../secret.png", "/etc/passwd", "~/x.png", "..\\x.png", "out.png", "a/../../x.png"]
    write_manifest(copy / "pool/manifest.csv", rows + [rows[0] | {"file": name} for name in [*hostile, "gone.png"]])
    report = stage.run(CONFIG.model_copy(update={"max_failed_fraction": 0.5}), ProjectPaths(copy))
    assert report.metrics["codes"] == {"FILE_MISSING": 1, "PATH_UNSAFE": 6}
    assert report.n_in == 22 + 7


def test_one_file_under_two_spellings_is_one_row(copy: Path) -> None:
    rows = read_manifest(copy / "pool/manifest.csv")
    again = rows[0] | {"file": f"./{rows[0]['file'].replace('/', '//')}"}
    write_manifest(copy / "pool/manifest.csv", [*rows, again])
    assert stage.run(CONFIG, ProjectPaths(copy)).n_in == 22
    write_manifest(copy / "pool/manifest.csv", [*rows, again | {"licence": "CC-BY-NC-4.0"}])
    with pytest.raises(DataError, match=r"rows 1 and 23 of the metadata table both describe .* and differ in license"):
        stage.run(CONFIG, ProjectPaths(copy))


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_name_in_another_normal_form_is_found(copy: Path, form: str) -> None:
    """macOS stores decomposed letters; tables hold composed ones."""
    on_disk, in_table = (
        unicodedata.normalize(form, "caf\u00e9.png"),
        unicodedata.normalize("NFC" if form == "NFD" else "NFD", "caf\u00e9.png"),
    )
    folder = unicodedata.normalize(form, "\u00e9t\u00e9")
    (copy / "pool" / folder).mkdir()
    Image.fromarray(np.random.default_rng(5).integers(0, 255, (50, 60, 3), np.uint8)).save(copy / "pool" / folder / on_disk)
    rows = read_manifest(copy / "pool/manifest.csv")
    write_manifest(copy / "pool/manifest.csv", [*rows, rows[0] | {"file": f"{folder}/{in_table}"}])
    stage.run(CONFIG, ProjectPaths(copy))
    paths = [row["path"] for row in read_table(copy / "data/catalog/images.parquet", IMAGES).to_pylist()]
    assert f"{folder}/{on_disk}" in paths


def test_too_many_failed_files_stop_the_stage_and_write_nothing(copy: Path) -> None:
    before = outs(copy)
    rows = read_manifest(copy / "pool/manifest.csv")
    (copy / "pool/page.jpg").write_bytes(b"<html>")
    bad = ["page.jpg", *(f"gone{number}.png" for number in range(5))]
    write_manifest(copy / "pool/manifest.csv", rows + [rows[0] | {"file": name} for name in bad])
    with pytest.raises(
        DataError, match=r"6 of 28 files failed, and 0.05 accepts 5 \(top: FILE_MISSING 5, NOT_AN_IMAGE 1\)"
    ) as error:
        stage.run(CONFIG, ProjectPaths(copy))
    assert len(error.value.details["examples"]) == 6  # type: ignore[arg-type]
    assert outs(copy) == before


def test_content_held_out_under_one_path_leaves_the_pool(copy: Path) -> None:
    rows = read_manifest(copy / "pool/manifest.csv")
    gold = next(row for row in rows if row["split"] == "gold" and row["kind"] == "image")
    shutil.copyfile(copy / "pool" / gold["file"], copy / "pool/again.webp")
    write_manifest(copy / "pool/manifest.csv", [*rows, rows[0] | {"file": "again.webp", "split": "pool"}])
    report = stage.run(CONFIG, ProjectPaths(copy))
    assert report.n_ok == 23
    assert report.metrics["duplicate_files"] == 1
    assert report.metrics["images"]["pool"] == NUM_IMAGES


def test_damaged_cache_part_is_computed_again(copy: Path) -> None:
    before = outs(copy)
    part = min((copy / ".cache/items").rglob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-7])
    report = stage.run(CONFIG, ProjectPaths(copy))
    assert report.cache_misses > 0
    assert report.cache_misses + report.cache_hits == 22
    assert outs(copy) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"root": "nowhere"}, "ingest.root"),
        ({"metadata": "nowhere.csv"}, "ingest.metadata: nowhere.csv: no such file"),
        ({"metadata": "../manifest.csv"}, "climbs"),
    ],
)
def test_missing_root_or_table(copy: Path, change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stage.run(CONFIG.model_copy(update=change), ProjectPaths(copy))


def test_table_without_a_configured_column(copy: Path) -> None:
    columns = CONFIG.columns.model_copy(update={"license": "license"})
    with pytest.raises(DataError, match=r"manifest\.csv: no column 'license' \(columns\.license; did you mean 'licence'"):
        stage.run(CONFIG.model_copy(update={"columns": columns}), ProjectPaths(copy))


def test_dry_run_writes_nothing(copy: Path) -> None:
    before = sorted(path for path in copy.rglob("*"))
    (copy / "pool/bad.png").write_bytes(b"nothing")
    result = stage.dry_run(copy / "pool")
    assert (len(result.images), len(result.audio)) == (NUM_IMAGES + 1, NUM_CLIPS + 1)
    assert [row["code"] for row in result.quarantine] == ["NOT_AN_IMAGE"]
    assert result.report.metrics["skipped_files"] == {".csv": 1}
    assert sorted(path for path in copy.rglob("*")) == sorted([*before, copy / "pool/bad.png"])


def test_normalize_file(copy: Path) -> None:
    row = read_table(copy / "data/catalog/audio.parquet", AUDIO).to_pylist()[0]
    (copy / "linked").symlink_to(copy / "pool" / row["path"])
    item, kind, payload, measured = stage.normalize_file(copy / "linked")
    assert (item, kind, measured["duration_s"]) == (row["audio_id"], "audio", row["duration_s"])
    assert payload == MediaShardReader(copy / "data/media").payload(item)
    with pytest.raises(DataError, match="FILE_MISSING"):
        stage.normalize_file(copy / "gone.wav")


def children(process: int) -> list[int]:
    """PIDs of the children of a process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "stat").read_text()
        except OSError:
            continue
        if int(status.rsplit(")", 1)[1].split()[1]) == process:
            found.append(int(folder.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_resume_after_kill(demo: Path, tmp_path: Path, project: Path) -> None:
    """A run after `kill -9` reuses cached results and gives the outs of an uninterrupted run."""
    folder = tmp_path / "killed"
    make_pool(demo, folder, 110, 20)
    (folder / "params.yaml").write_text("ingest: {root: pool, decoder: {workers: 2}}\n")
    command = [sys.executable, "-m", "pipeline_steps", "ingest"]
    environment = os.environ | {"PYTHONPATH": str(project)}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while not list(folder.glob(".cache/items/**/*.parquet")):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        workers = children(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert workers
    assert not (folder / "data").exists(), "killed too late: the outs exist"
    while any(Path(f"/proc/{worker}").exists() for worker in workers):  # they die with their parent
        assert time.monotonic() < deadline
        time.sleep(0.05)
    resumed = stage.run(CONFIG, ProjectPaths(folder))
    assert resumed.cache_hits > 0
    assert resumed.cache_misses > 0
    assert resumed.cache_misses + resumed.cache_hits == 132
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    shutil.copytree(folder / "pool", fresh / "pool")
    assert stage.run(CONFIG, ProjectPaths(fresh)).cache_misses == 132
    assert outs(fresh) == outs(folder)


def test_stage_module_imports_no_heavy_packages(project: Path) -> None:
    code = (
        "import sys, pipeline_steps.ingest.stage; print([m for m in ('torch', 'transformers', 'mlflow') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=True).stdout == "[]\n"
    )
