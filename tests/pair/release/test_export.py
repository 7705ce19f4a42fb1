"""Export: readable by webdataset, with documentation, without unpublishable pairs."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import DatasetCard

from pipeline_steps.core.checksums import record_checksums
from pipeline_steps.core.errors import ConfigError, DataError
from pipeline_steps.core.escape import escape_csv, escape_markdown
from pipeline_steps.core.hashing import sha256_bytes
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import PAIRS, RELEASE_INDEX
from pipeline_steps.core.tables import read_table, write_table
from pipeline_steps.pair.release.export import export_parquet, export_webdataset
from pipeline_steps.pair.release.selection import select, track_members
from pipeline_steps.pair.stage import PairConfig, run
from tests.pair.synthetic_tables import SyntheticDataset

READER = """
import io, json, sys
import soundfile, webdataset
from PIL import Image
found = {}
for sample in webdataset.WebDataset(sys.argv[1:], shardshuffle=False, empty_check=False):
    meta = json.loads(sample["json"])
    with Image.open(io.BytesIO(sample["png"])) as picture:
        size = picture.size
    samples, rate = soundfile.read(io.BytesIO(sample["flac"]))
    found[sample["__key__"]] = [meta["pair_id"], meta["split"], size, len(samples), rate]
print(json.dumps(found))
"""


STRANGER = """
import io, json, os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
import datasets, soundfile
folder, cache = sys.argv[1:]
assert not any(os.path.isdir(os.path.join(path, "pipeline_steps")) for path in sys.path), sys.path
found = datasets.load_dataset(folder, cache_dir=cache)
rows = {}
for split, part in found.items():
    assert part.features["audio"] == datasets.Audio(sampling_rate=48000) and part.features["image"] == datasets.Image()
    for row in part.cast_column("audio", datasets.Audio(decode=False)):
        samples, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]))
        facts = [row[name] for name in ("phrase", "image_license", "tracks")]
        rows[row["pair_id"]] = [split, row["image"].size, len(samples), rate, *facts]
print(json.dumps(rows))
"""


def in_a_process_without_the_project(code: str, *arguments: str) -> str:
    """Output of code that runs isolated: no PYTHONPATH, no current folder on the path."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, *arguments], capture_output=True, text=True, timeout=300, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def paired(dataset: SyntheticDataset, settings: Callable[..., PairConfig]) -> ProjectPaths:
    dataset.images[0]["license"] = None
    dataset.images[1]["license"] = "CC-BY-ND-4.0"
    dataset.images[2]["author"] = '=HYPERLINK("http://evil.example","click")'
    layout = dataset.write()
    run(settings(), layout)
    return layout


def test_webdataset_reads_the_export(paired: ProjectPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "release"
    release = export_webdataset(paired, folder, pairs_per_shard=20)
    shards = [str(folder / name) for name in release.shards]
    assert len(shards) > 3
    monkeypatch.setenv("WDS_SECURE", "1")
    found = json.loads(in_a_process_without_the_project(READER, *shards))
    pairs = {row["pair_id"]: row for row in read_table(folder / "pairs.parquet", PAIRS).to_pylist()}
    assert set(found) == set(pairs)
    assert len(found) == sum(release.pairs.values())
    for key, (pair_id, split, size, samples, rate) in found.items():
        assert (pair_id, split) == (key, pairs[key]["split"])
        assert (size, samples, rate) == ([16, 16], 2400, 48_000)


def test_the_index_finds_every_member_and_its_hash(paired: ProjectPaths, tmp_path: Path) -> None:
    export_webdataset(paired, tmp_path / "release", pairs_per_shard=30)
    rows = read_table(tmp_path / "release/index.parquet", RELEASE_INDEX).to_pylist()
    members = 0
    for shard in sorted({row["shard"] for row in rows}):
        with tarfile.open(tmp_path / "release" / shard) as tar:
            members += len(tar.getmembers())
            assert all(member.isreg() and member.mtime == 0 and not member.uname for member in tar.getmembers())
    assert members == len(rows)
    for row in rows:
        payload = (tmp_path / "release" / row["shard"]).read_bytes()[row["offset"] : row["offset"] + row["size"]]
        assert sha256_bytes(payload) == row["sha256"]


@pytest.mark.fault
def test_unpublishable_pairs_are_excluded_counted_and_listed(
    paired: ProjectPaths, dataset: SyntheticDataset, tmp_path: Path
) -> None:
    folder = tmp_path / "release"
    release = export_webdataset(paired, folder)
    assert release.left_out == {"LICENSE_FORBIDS": 1, "LICENSE_UNKNOWN": 1}
    kept_back = {dataset.images[0]["image_id"], dataset.images[1]["image_id"]}
    with (folder / "left_out.csv").open(newline="") as handle:
        listed = {row["image_id"]: row["code"] for row in csv.DictReader(handle)}
    assert set(listed) == kept_back
    assert not kept_back & set(read_table(folder / "pairs.parquet", PAIRS)["image_id"].to_pylist())
    assert not any(name.encode() in path.read_bytes() for path in folder.glob("*.tar") for name in kept_back)
    assert "pairs left out for their license | 2" in (folder / "README.md").read_text()


@pytest.mark.fault
def test_no_csv_cell_is_a_formula(paired: ProjectPaths, tmp_path: Path) -> None:
    export_webdataset(paired, tmp_path / "release")
    with (tmp_path / "release/LICENSES.csv").open(newline="") as handle:
        authors = [row["author"] for row in csv.DictReader(handle)]
    assert '\'=HYPERLINK("http://evil.example","click")' in authors
    assert [escape_csv(text) for text in ("=1", "+1", "-1", "@a", "\tb", "\rc", "plain", None)] == [
        "'=1", "'+1", "'-1", "'@a", "'\tb", "'\rc", "plain", "",
    ]  # fmt: skip


def test_only_listed_licenses_are_exported(paired: ProjectPaths, tmp_path: Path) -> None:
    release = export_webdataset(paired, tmp_path / "release", licenses=["CC0-1.0", "MIT"])
    pairs = read_table(tmp_path / "release/pairs.parquet", PAIRS).to_pylist()
    assert {pair[key] for pair in pairs for key in ("image_license", "audio_license")} <= {"CC0-1.0", "MIT"}
    assert release.left_out["LICENSE_NOT_LISTED"] > 0
    with pytest.raises(ConfigError, match=r"CC-BY-ND-4\.0"):
        export_webdataset(paired, tmp_path / "other", licenses=["CC-BY-ND-4.0"])
    with pytest.raises(DataError, match="no pair may be shared"):
        export_webdataset(paired, tmp_path / "other", licenses=["CC-BY-SA-4.0"])


def test_a_folder_that_is_not_empty_is_rejected(paired: ProjectPaths, tmp_path: Path) -> None:
    (tmp_path / "release").mkdir()
    (tmp_path / "release/notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not an empty folder"):
        export_webdataset(paired, tmp_path / "release")
    assert [path.name for path in (tmp_path / "release").iterdir()] == ["notes.txt"]


def test_license_texts_are_copied(paired: ProjectPaths, tmp_path: Path, demo: Path) -> None:
    release = export_webdataset(paired, tmp_path / "release", license_texts=demo / "LICENSES")
    texts = {path.stem for path in (tmp_path / "release/LICENSES").iterdir()}
    assert texts == {"CC0-1.0", "MIT", "GPL-2.0-or-later"}
    assert release.licenses_without_text == ["CC-BY-4.0"]


@pytest.mark.parametrize("export", [export_webdataset, export_parquet])
def test_two_exports_are_the_same_bytes(paired: ProjectPaths, tmp_path: Path, export: Callable[..., object]) -> None:
    for name in ("one", "two"):
        export(paired, tmp_path / name)
    files = [path.relative_to(tmp_path / "one") for path in sorted((tmp_path / "one").rglob("*")) if path.is_file()]
    assert len(files) >= 8
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)


def test_several_tracks_become_several_members(paired: ProjectPaths, tmp_path: Path) -> None:
    pairs = read_table(paired.pairs / "pairs.parquet", PAIRS).to_pylist()
    for pair in pairs:
        pair["tracks"] = [*pair["tracks"], {**pair["tracks"][0], "gain_db": -6.0}]
    with record_checksums("pair", paired.pairs):
        write_table(paired.pairs / "pairs.parquet", PAIRS, pairs)
    assert track_members(pairs[0]) == ["0.flac", "1.flac"]
    release = export_webdataset(paired, tmp_path / "release")
    with tarfile.open(tmp_path / "release" / release.shards[0]) as tar:
        names = tar.getnames()[:4]
        sample = json.load(io.BytesIO(tar.extractfile(names[3]).read()))  # type: ignore[union-attr]
    assert [name.split(".", 1)[1] for name in names] == ["png", "0.flac", "1.flac", "json"]
    assert [track["member"] for track in sample["tracks"]] == ["0.flac", "1.flac"]
    assert sample["tracks"][1]["gain_db"] == -6.0


def test_selection_partitions_the_pairs(paired: ProjectPaths) -> None:
    pairs = read_table(paired.pairs / "pairs.parquet", PAIRS).to_pylist()
    chosen = select(pairs, None)
    assert len(chosen.pairs) + len(chosen.left_out) == len(pairs)


def test_markdown_is_escaped() -> None:
    assert escape_markdown("a|b\n# c ![x](http://h/i.png) <b>") == "a\\|b \\# c \\!\\[x\\]\\(http:\u200b//h/i.png\\) &lt;b&gt;"


def test_datasets_reads_the_parquet_export(paired: ProjectPaths, dataset: SyntheticDataset, tmp_path: Path) -> None:
    folder = tmp_path / "release"
    release = export_parquet(paired, folder)
    found = json.loads(in_a_process_without_the_project(STRANGER, str(folder), str(tmp_path / "cache")))
    pairs = {row["pair_id"]: row for row in read_table(folder / "pairs.parquet", PAIRS).to_pylist()}
    assert set(found) == set(pairs)
    assert len(found) == sum(release.pairs.values())
    for pair_id, (split, size, samples, rate, phrase, license, tracks) in found.items():
        pair = pairs[pair_id]
        assert split == {"val": "validation"}.get(pair["split"], pair["split"])
        assert (size, samples, rate) == ([16, 16], 2400, 48_000)
        assert (phrase, license) == (pair["tracks"][0]["phrase"], pair["image_license"])
        assert [track["audio_id"] for track in tracks] == [track["audio_id"] for track in pair["tracks"]]
    kept_back = {dataset.images[0]["image_id"], dataset.images[1]["image_id"]}
    assert not kept_back & {pair["image_id"] for pair in pairs.values()}


def test_schema_of_the_parquet_export_is_that_of_datasets(paired: ProjectPaths, tmp_path: Path) -> None:
    import datasets
    import pyarrow.parquet as pq

    release = export_parquet(paired, tmp_path / "release")
    stored = pq.read_schema(tmp_path / "release" / release.shards[0])
    features = datasets.Features.from_arrow_schema(stored)
    assert isinstance(features["image"], datasets.Image)
    assert features.arrow_schema.remove_metadata() == stored.remove_metadata()
    assert json.loads(features.arrow_schema.metadata[b"huggingface"]) == json.loads(stored.metadata[b"huggingface"])


def test_further_tracks_are_further_audio_columns(paired: ProjectPaths, tmp_path: Path) -> None:
    import datasets

    from pipeline_steps.pair.release.export import pair_table

    pairs = read_table(paired.pairs / "pairs.parquet", PAIRS).to_pylist()[:3]
    pairs[1]["tracks"] = [*pairs[1]["tracks"], {**pairs[0]["tracks"][0], "gain_db": -6.0}]
    table = pair_table(paired, pairs)
    assert datasets.Features.from_arrow_schema(table.schema)["audio_2"] == datasets.Audio(sampling_rate=48_000)
    second = table["audio_2"].to_pylist()
    assert [value is None for value in second] == [True, False, True]
    assert second[1]["bytes"] == table["audio"].to_pylist()[0]["bytes"]


@pytest.mark.parametrize("export", [export_webdataset, export_parquet])
def test_private_export_has_every_pair_and_a_marked_card(
    paired: ProjectPaths, tmp_path: Path, export: Callable[..., Any]
) -> None:
    release = export(paired, tmp_path / "release", private=True)
    every = read_table(paired.pairs / "pairs.parquet", PAIRS)
    assert sum(release.pairs.values()) == len(every)
    assert not release.left_out
    card = DatasetCard((tmp_path / "release/README.md").read_text())
    assert (card.data["license"], card.data["license_name"]) == ("other", "private")
    assert "Do not publish it" in card.text
    assert "private" in card.data["tags"]
    with pytest.raises(ConfigError, match="takes no list of licenses"):
        export(paired, tmp_path / "other", private=True, licenses=["MIT"])


def test_cards_of_both_forms_name_the_files_and_licenses(paired: ProjectPaths, tmp_path: Path) -> None:
    for export in (export_webdataset, export_parquet):
        folder = tmp_path / export.__name__
        release = export(paired, folder)
        data = DatasetCard((folder / "README.md").read_text()).data
        assert {"cc0-1.0", "mit"} <= set(data["license"])
        patterns = {entry["split"]: entry["path"] for entry in data["configs"][0]["data_files"]}
        files = {path.relative_to(folder).as_posix() for pattern in patterns.values() for path in folder.glob(pattern)}
        assert files == set(release.shards)
        sizes = {split["name"]: split["num_examples"] for split in data["dataset_info"]["splits"]}
        assert sum(sizes.values()) == sum(release.pairs.values())
