"""Rows A, B and C of the fault matrix: one run of the stage on the corpus, and the result of each file."""

from __future__ import annotations

import csv
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline_steps.core.errors import DataError
from pipeline_steps.core.media_shards import MediaShardReader
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.safe_paths import display_path
from pipeline_steps.core.schemas import AUDIO, IMAGES, QUARANTINE
from pipeline_steps.core.stage_report import StageReport
from pipeline_steps.core.tables import read_table
from pipeline_steps.ingest import stage
from pipeline_steps.ingest.config import DecoderLimitsConfig, IngestConfig
from pipeline_steps.ingest.reason_codes import CODES
from tests.faults.corpus import CASES, OK, Case, build, gradient, put
from tests.faults.hostile_decoders import always_crash

pytestmark = pytest.mark.fault
OPEN = IngestConfig(
    metadata=None, pool=None, holdout=None, max_failed_fraction=1.0, root="root", decoder=DecoderLimitsConfig(workers=2)
)


@dataclass
class Run:
    folder: Path
    report: StageReport
    accepted: dict[str, dict[str, Any]]
    rejected: dict[str, dict[str, Any]]
    before: dict[str, str]


def snapshot(folder: Path) -> dict[str, str]:
    """Name -> mode or hash of everything below a folder; links are not followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder)).encode("utf-8", "surrogateescape").hex()
        plain = path.is_file() and not path.is_symlink()
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if plain else str(path.lstat().st_mode)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("corpus")
    build(folder)
    before = snapshot(folder)
    report = stage.run(OPEN, ProjectPaths(folder))
    report.write(ProjectPaths(folder).report("ingest"), ProjectPaths(folder).runtime("ingest"))
    images = read_table(folder / "data/catalog/images.parquet", IMAGES).to_pylist()
    audio = read_table(folder / "data/catalog/audio.parquet", AUDIO).to_pylist()
    quarantine = read_table(folder / "data/catalog/quarantine.parquet", QUARANTINE).to_pylist()
    accepted = {source: row for row in images + audio for source in row["sources"]}
    return Run(folder, report, accepted, {row["path"]: row for row in quarantine}, before)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_row_of_the_matrix(run: Run, case: Case) -> None:
    name = display_path(case.name)
    if case.expected == OK:
        assert name not in run.rejected, run.rejected[name]
        row = run.accepted[name]
        assert set(case.normalizations) <= set(row["normalizations"])
        for column, value in case.row_values:
            assert row[column] == value, column
    else:
        assert name not in run.accepted
        row = run.rejected[name]
        assert row["code"] == case.expected, row
        assert case.reason in row["reason"]
        assert row["action"] == CODES[case.expected].action


def test_counts_balance_and_inputs_are_unchanged(run: Run) -> None:
    assert run.report.n_in == len(CASES) == len(run.accepted) + len(run.rejected)
    assert run.report.n_abstained == sum(case.expected == "AUD_SILENT" for case in CASES)
    assert run.report.metrics["skipped_files"] == {".txt": 1}
    after = snapshot(run.folder)
    assert {name: after.get(name) for name in run.before} == run.before
    added = {bytes.fromhex(name).decode().split("/")[0] for name in after.keys() - run.before.keys()}
    assert added == {"data", ".cache", "reports"}


def test_c2_names_round_trip_through_csv(run: Run) -> None:
    buffer = io.StringIO()
    csv.writer(buffer).writerows([[path, "x"] for path in run.accepted])
    buffer.seek(0)
    assert [row[0] for row in csv.reader(buffer)] == list(run.accepted)
    assert all(path.isprintable() for path in [*run.accepted, *run.rejected])


def test_c5_and_c7_one_item_per_content(run: Run) -> None:
    names = ["Case.png", "case.png", "caf\u00e9.png", "cafe\u0301.png"]
    assert len({run.accepted[name]["image_id"] for name in names}) == 4
    assert run.accepted["one-content.png"]["sources"] == ["one-content.png", "same-content.png"]


def test_a7_golden_pixels(run: Run) -> None:
    reader = MediaShardReader(run.folder / "data/media")
    pixels = reader.image(run.accepted["rgba.png"]["image_id"]).astype(float)
    alpha = np.tile(np.linspace(0, 255, 96).astype(np.uint8), (64, 1))[..., None] / 255
    assert np.abs(pixels - (gradient() * alpha + 255 * (1 - alpha))).max() <= 1.5
    pixels = reader.image(run.accepted["grey-alpha.png"]["image_id"]).astype(float)
    expected = gradient()[..., :1] * (128 / 255) + 255 * (127 / 255)
    assert np.abs(pixels - expected).max() <= 1.5


def test_a8_deep_grey_is_rescaled(run: Run) -> None:
    pixels = MediaShardReader(run.folder / "data/media").image(run.accepted["deep-grey.png"]["image_id"])
    assert np.array_equal(pixels, np.repeat(gradient()[..., 2:], 3, axis=2))


def test_a10_orientation_applied_and_metadata_removed(run: Run) -> None:
    payload = MediaShardReader(run.folder / "data/media").payload(run.accepted["turned.jpg"]["image_id"])
    assert b"secret" not in payload
    with Image.open(io.BytesIO(payload)) as image:
        assert image.size == (64, 96)
        assert not image.info
        pixels = np.asarray(image).astype(float)
    upright = np.rot90(gradient(), -1).astype(float)  # orientation 6: rotate clockwise
    assert np.abs(pixels - upright).mean() < 5


def test_a11_no_decoder_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    root.mkdir()
    cases = [case for case in CASES if case.row == "A11"]
    for case in cases:
        case.make(root / case.name)
    monkeypatch.setattr(stage, "decode", always_crash)
    result = stage.dry_run(root, OPEN)
    assert sorted(row["code"] for row in result.quarantine) == ["FORMAT_NOT_ALLOWED"] * len(cases)
    put(root / "control.png", (root / "paper.pdf").read_bytes().replace(b"%PDF-1.7\n", b"\x89PNG\r\n\x1a\n"))
    assert "DECODER_CRASH" in {row["code"] for row in stage.dry_run(root, OPEN).quarantine}


def test_c9_empty_pools_and_all_quarantined(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(DataError, match="image pool is empty after ingest: no such file was found"):
        stage.run(OPEN, ProjectPaths(tmp_path))
    for number in range(12):
        (root / f"{number}.jpg").write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"image pool is empty after ingest: 12 quarantined \(top: NOT_AN_IMAGE 12\)") as error:
        stage.run(OPEN, ProjectPaths(tmp_path))
    assert error.value.exit_code == 3
    next(case for case in CASES if case.name == "Case.png").make(root / "good.png")
    with pytest.raises(DataError, match="audio pool is empty"):
        stage.run(OPEN, ProjectPaths(tmp_path))
    assert not (tmp_path / "data").exists()
