"""The example of docs/how-to/extend/add-a-dataset-layout.md: ingest reads the table that it writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pipeline_steps.ingest.config import DecoderLimitsConfig, IngestConfig, MetadataColumnsConfig
from pipeline_steps.ingest.sources.resolve import collect_all_candidates
from tests.factories.dataset_layouts import audio, put

SCRIPT = Path(__file__).with_name("toy_manifest.py")


def test_ingest_reads_the_manifest_that_the_example_writes(tmp_path: Path) -> None:
    for number, name in enumerate(["dog/rex_1", "dog/rex_2", "bell/church_1"]):
        put(tmp_path / f"{name}.wav", audio(number))
    subprocess.run([sys.executable, str(SCRIPT), str(tmp_path), "CC0-1.0"], check=True, capture_output=True)
    columns = MetadataColumnsConfig(license="license", author=None, source=None, group="group")
    config = IngestConfig(root=str(tmp_path), metadata="manifest.csv", columns=columns, decoder=DecoderLimitsConfig(workers=1))
    found = collect_all_candidates(config, tmp_path)
    assert {file.path: file.license for file in found.files} == {
        "dog/rex_1.wav": "CC0-1.0", "dog/rex_2.wav": "CC0-1.0", "bell/church_1.wav": "CC0-1.0",
    }  # fmt: skip
    groups = {file.path: file.group for file in found.files}
    assert groups["dog/rex_1.wav"] == groups["dog/rex_2.wav"] != groups["bell/church_1.wav"]
    assert "label" not in repr(found), "the label column is not read"
