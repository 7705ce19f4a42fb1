"""Data sets in known layouts: candidates, metadata, labels, and hostile archives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline_steps.core.errors import ConfigError, DataError
from pipeline_steps.core.media_shards import MediaShardReader
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.ingest import stage
from pipeline_steps.ingest.config import DecoderLimitsConfig, IngestConfig, MetadataColumnsConfig
from pipeline_steps.ingest.license_ids import spdx_id
from pipeline_steps.ingest.sources.archives import ArchiveJob, list_archive
from pipeline_steps.ingest.sources.dataset_layouts import DatasetFolderJob, detect_layout, detect_layouts, read_dataset_folder
from pipeline_steps.ingest.sources.metadata_table import MetadataQuery
from pipeline_steps.ingest.sources.resolve import collect_all_candidates
from tests.factories import dataset_layouts as layouts

CONFIG = IngestConfig(
    root="pool", metadata=None, pool=None, holdout=None, decoder=DecoderLimitsConfig(workers=1), max_failed_fraction=0.5
)


class Candidates:
    """Candidates of a folder, before decoding."""

    def __init__(self, folder: Path, **update: Any) -> None:
        self.found = collect_all_candidates(CONFIG.model_copy(update={"root": str(folder), **update}), folder)
        self.files = {file.path: file for file in self.found.files}
        self.rejected = {item.path: item.code for item in self.found.rejected}
        self.images = {name: file for name, file in self.files.items() if file.kind == "image"}
        self.audio = {name: file for name, file in self.files.items() if file.kind == "audio"}

    def contain(self, word: str) -> bool:
        return word in repr(self.found)


def test_fsd50k(tmp_path: Path) -> None:
    layouts.fsd50k(tmp_path)
    found = Candidates(tmp_path, holdout={"split": ["eval"]})
    rows = found.audio
    assert found.found.layouts == {".": "fsd50k"}
    assert {path: row.license for path, row in rows.items()} == {
        "FSD50K.dev_audio/64760.wav": "CC-BY-3.0",
        "FSD50K.dev_audio/16399.wav": "CC0-1.0",
        "FSD50K.dev_audio/16400.wav": "LicenseRef-CC-Sampling-Plus-1.0",
        "FSD50K.eval_audio/37199.wav": "CC-BY-NC-3.0",
    }
    assert {row.author for row in rows.values()} == {"ann", "ben", "cid"}
    assert rows["FSD50K.dev_audio/16399.wav"].group == rows["FSD50K.dev_audio/16400.wav"].group, "one uploader"
    assert len({row.group for row in rows.values()}) == 3
    assert [path for path, row in rows.items() if row.holdout] == ["FSD50K.eval_audio/37199.wav"]
    assert not found.contain("secret")
    assert not found.contain("Bark"), "labels are not read"


def test_esc50(tmp_path: Path) -> None:
    layouts.esc50(tmp_path)
    found = Candidates(tmp_path, holdout={"split": ["5"]})
    rows = found.audio
    assert len(rows) == 4
    first = rows["audio/1-100032-A-0.wav"]
    assert (first.license, first.author) == ("CC-BY-3.0", "nfrae")
    assert first.source == "http://www.freesound.org/people/nfrae/sounds/100032/"
    assert rows["audio/5-9032-A-11.wav"].license == "CC-BY-NC-3.0"
    assert rows["audio/5-9032-A-11.wav"].holdout
    assert rows["audio/1-59513-A-0.wav"].group == rows["audio/2-59513-B-0.wav"].group, "takes of one recording"
    assert not found.contain("sea_waves")


def test_vggsound_clips_of_one_video_are_one_group(tmp_path: Path) -> None:
    layouts.vggsound(tmp_path)
    found = Candidates(tmp_path)
    clips, frames = found.audio, found.images
    assert len(clips) == len(frames) == 3, "clips without a row and rows without a clip are left out"
    assert clips["audio/--0PQM4-hqg_000030.flac"].group == clips["audio/--0PQM4-hqg_000090.flac"].group
    assert clips["audio/abcdefghijk_000002.flac"].source == "https://www.youtube.com/watch?v=abcdefghijk"
    assert clips["audio/abcdefghijk_000002.flac"].license is None
    assert found.rejected == {}
    test = Candidates(tmp_path, pool={"split": "test"})
    assert (len(test.audio), test.found.filtered_rows) == (1, 4)


def test_audioset_segments(tmp_path: Path) -> None:
    layouts.audioset(tmp_path)
    (row,) = Candidates(tmp_path, holdout={"split": "eval"}).audio.values()
    assert row.source == "https://www.youtube.com/watch?v=--4gqARaEJE"
    assert row.holdout


def test_coco(tmp_path: Path) -> None:
    layouts.coco(tmp_path)
    found = Candidates(tmp_path)
    rows = found.images
    assert {path: row.license for path, row in rows.items()} == {
        "val2017/000000000009.jpg": "CC-BY-NC-SA-2.0",
        "val2017/000000000025.jpg": "LicenseRef-Flickr-Commons",
    }
    assert rows["val2017/000000000025.jpg"].source == "http://images.cocodataset.org/25.jpg"
    assert found.rejected == {}, "train2017 was not downloaded"


def test_webdataset(tmp_path: Path) -> None:
    layouts.webdataset(tmp_path)
    found = Candidates(tmp_path, holdout={"split": "test"})
    images, audio = found.images, found.audio
    assert set(images) == {"train-000000.tar/000000.jpg", "train-000000.tar/000001.jpg", "test-000000.tar/a/000002.png"}
    first = audio["train-000000.tar/000000.flac"]
    assert (first.license, first.author, first.source) == ("CC-BY-4.0", "Dee", "https://example.org/1")
    assert audio["train-000000.tar/000001.flac"].license is None
    assert [path for path, row in images.items() if row.holdout] == ["test-000000.tar/a/000002.png"]
    assert not found.contain("secret")


@pytest.mark.parametrize("make", [layouts.datasets_parquet, layouts.datasets_arrow])
def test_datasets_folders(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path)
    found = Candidates(tmp_path, holdout={"split": "test"})
    assert (len(found.images), len(found.audio)) == (6, 6)
    train = [file for _, file in sorted(found.audio.items()) if not file.holdout]
    assert [row.license for row in train] == ["CC-BY-4.0", "CC-BY-SA-4.0", "CC0-1.0"], "the set's license fills the gaps"
    assert [row.author for row in train] == ["Eve", "Eve", None]
    assert train[0].path.endswith("00000000/audio/0.wav")
    assert not found.contain("bell")


def test_cc_parquet_row_of_a_failed_download_abstains(tmp_path: Path) -> None:
    layouts.cc_parquet(tmp_path)
    found = Candidates(tmp_path)
    assert found.found.layouts == {".": "parquet"}
    assert {row.source for row in found.images.values()} == {"https://example.org/0.jpg", "https://example.org/1.jpg"}
    assert found.rejected == {"00000.parquet/00000002/jpg": "NOT_DOWNLOADED"}
    assert found.found.rejected[0].abstained
    assert not found.contain("secret")


@pytest.mark.parametrize(
    ("make", "names", "texts"),
    [
        (layouts.webdataset, ["title", "Caption", "txt"], ["secret words", "secret words", None]),
        (layouts.datasets_parquet, "label", ["dog", "rain", "bell"] * 2),
        (layouts.datasets_arrow, "label", ["dog", "rain", "bell"] * 2),
        (layouts.cc_parquet, ["caption", "url"], [f"secret words; https://example.org/{i}.jpg" for i in range(2)]),
        (layouts.coco, "caption", ["a dog", None]),
        (layouts.coco, "title", [None, None]),
    ],
)
def test_words_that_come_with_images(
    tmp_path: Path, make: Callable[[Path], None], names: str | list[str], texts: list[str | None]
) -> None:
    make(tmp_path)
    found = Candidates(tmp_path, columns=MetadataColumnsConfig(text=names)).images
    assert sorted((file.text for file in found.values()), key=str) == sorted(texts, key=str)


def test_hostile_words_are_one_short_line(tmp_path: Path) -> None:
    words = {"tags": ["a\u202eb", 7, {"x": "y"}, ["c"]], "title": "=1\n\x00" + "word " * 1000}
    layouts.tar(tmp_path / "a.tar", [("0.jpg", layouts.image(1)), ("0.json", json.dumps(words).encode())])
    (file,) = Candidates(tmp_path, columns=MetadataColumnsConfig(text=["tags", "title"])).images.values()
    assert file.text is not None
    assert file.text.startswith("ab, 7, c; 1 word word")
    assert len(file.text) <= 1000


def arrow_file(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("state", [{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}, None])
def test_cache_files_of_datasets_are_no_data(tmp_path: Path, state: dict | None) -> None:
    """`map`, `filter` and `shuffle` leave their results beside the data."""
    rows = layouts._rows(40)
    arrow_file(tmp_path / "data-00000-of-00001.arrow", rows)
    arrow_file(tmp_path / "cache-77aa02b78a30b761.arrow", layouts._rows(50))
    arrow_file(tmp_path / "cache-2d0a802b78a30b76_00001_of_00004.arrow", pa.table({"indices": [2, 0, 1]}))
    if state:
        layouts.put(tmp_path / "state.json", json.dumps(state))
    found = Candidates(tmp_path)
    assert len(found.files) == 2 * rows.num_rows
    assert not found.rejected
    assert found.found.skipped_files["cache of datasets"] == 2


def test_archive_that_is_not_listed_by_the_state_of_another_folder_is_read(tmp_path: Path) -> None:
    arrow_file(tmp_path / "train/cached-lessons.arrow", layouts._rows(40))
    assert len(Candidates(tmp_path).files) == 6


@pytest.mark.parametrize(
    "path",
    [
        r"C:\data\0.jpg",
        r"..\0.jpg",
        "C:/data/0.jpg",
        "/data/0.jpg",
        "..",
        "a/..",
        "https://x.org/0.jpg?size=1",
        "a\x00b.jpg",
        ".",
    ],
)
def test_path_of_an_embedded_item_is_only_a_label(tmp_path: Path, path: str) -> None:
    media = pa.array([{"bytes": layouts.image(1), "path": path}], layouts._media_struct())
    arrow_file(tmp_path / "data.arrow", pa.table({"image": media}))
    found = Candidates(tmp_path)
    assert not found.rejected
    (name,) = found.files
    assert name.startswith("data.arrow/00000000/image")
    assert name.count("/") <= 3


def test_hidden_members_of_a_tar_are_skipped(tmp_path: Path) -> None:
    """macOS adds `._NAME` to each file; its content is no media, and its key would split the sample."""
    double = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(60)
    members = [("._0.jpg", double), ("0.jpg", layouts.image(1)), ("._0.json", double), ("0.json", b'{"license": "cc0"}')]
    layouts.tar(
        tmp_path / "x.tar", [*members, ("a/._1.jpg", double), ("a/1.jpg", layouts.image(2)), ("a\\2.jpg", layouts.image(3))]
    )
    layouts.put(tmp_path / "._x.tar", double)
    found = Candidates(tmp_path)
    assert sorted(file.license or "" for file in found.files.values()) == ["", "", "CC0-1.0"]
    assert not found.rejected
    assert found.found.skipped_files["hidden"] == 3


@pytest.mark.parametrize(
    ("head", "wanted"),
    [
        ("license: mit", "MIT"),
        ("license: 'cc-by-4.0'  # see below", "CC-BY-4.0"),
        ("license:\n- cc-by-4.0\n- cc-by-nc-4.0", "CC-BY-4.0 AND CC-BY-NC-4.0"),
        ("license: [mit, cc0-1.0]", "CC0-1.0 AND MIT"),
        ("license: [mit, unknown]", None),
        ("license: other\nlicense_name: house-terms", "house-terms"),
        ("license: other", None),
        ("license: [", None),
        ("title: x", None),
    ],
)
def test_licenses_of_a_card_all_apply(tmp_path: Path, head: str, wanted: str | None) -> None:
    layouts.datasets_parquet(tmp_path)
    layouts.put(tmp_path / "README.md", f"---\nlanguage: en\n{head}\n---\n# set\n")
    licenses = {file.license for file in Candidates(tmp_path).files.values()}
    assert licenses == {"CC-BY-4.0", "CC0-1.0", wanted}


def test_several_licenses_of_a_row_all_apply(tmp_path: Path) -> None:
    media = pa.array([{"bytes": layouts.image(1), "path": "0.jpg"}], layouts._media_struct())
    arrow_file(tmp_path / "data.arrow", pa.table({"image": media, "license": [["cc-by-4.0", "cc-by-nc-4.0"]]}))
    (file,) = Candidates(tmp_path).files.values()
    assert file.license == "CC-BY-4.0 AND CC-BY-NC-4.0"


def test_snapshot_of_links_is_refused_for_the_true_reason(tmp_path: Path) -> None:
    """The cache of the hub keeps contents in blobs/ and links in snapshots/."""
    layouts.datasets_parquet(tmp_path / "made")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "made/data/train-00000-of-00001.parquet").rename(tmp_path / "blobs/abc")
    link = tmp_path / "snapshots/1/data/train-00000-of-00001.parquet"
    link.parent.mkdir(parents=True)
    link.symlink_to("../../../blobs/abc")
    found = Candidates(tmp_path / "snapshots/1")
    assert found.rejected == {"data/train-00000-of-00001.parquet": "PATH_UNSAFE"}
    assert "replace it by a copy" in found.found.rejected[0].reason


def test_catalog_of_several_data_sets(tmp_path: Path) -> None:
    layouts.coco(tmp_path / "pool/pictures")
    layouts.webdataset(tmp_path / "pool/shards")
    layouts.esc50(tmp_path / "pool/sounds")
    layouts.datasets_parquet(tmp_path / "pool/tables")
    layouts.datasets_arrow(tmp_path / "pool/arrows")
    layouts.put(tmp_path / "pool/own/mine.png", layouts.image(7, "PNG"))
    report = stage.run(CONFIG, ProjectPaths(tmp_path))
    assert report.metrics["layouts"] == {
        "arrows": "datasets", "pictures": "coco", "shards": "webdataset", "sounds": "esc50", "tables": "datasets",
    }  # fmt: skip
    assert (report.metrics["images"]["items"], report.metrics["sounds"]["items"]) == (18, 19)
    assert report.n_quarantined == 0
    reader = MediaShardReader(tmp_path / "data/media")
    assert {reader.image(item).shape for item in reader.ids("image")} == {(48, 64, 3)}
    before = {path: path.read_bytes() for path in sorted((tmp_path / "data").rglob("*")) if path.is_file()}
    again = stage.run(CONFIG, ProjectPaths(tmp_path))
    assert (again.cache_misses, again.cache_hits) == (0, 37)
    assert {path: path.read_bytes() for path in before} == before


def test_layouts_files_and_table(tmp_path: Path) -> None:
    layouts.esc50(tmp_path)
    plain = Candidates(tmp_path, layout="files")
    assert len(plain.audio) == 4
    assert all(file.license is None for file in plain.audio.values())
    assert plain.found.layouts == {}
    columns = {"file": "filename", "license": None, "author": None, "source": None, "group": None}
    listed = Candidates(tmp_path, metadata="meta/esc50.csv", columns=CONFIG.columns.model_copy(update=columns))
    assert set(listed.rejected.values()) == {"FILE_MISSING"}, "only the table names files"
    with pytest.raises(ConfigError, match=r"ingest\.metadata is null"):
        Candidates(tmp_path, layout="table")
    with pytest.raises(ConfigError, match="filter by `split` only"):
        Candidates(tmp_path, pool={"fold": "1"})


def test_named_layout_without_its_files(tmp_path: Path) -> None:
    layouts.put(tmp_path / "a.png", layouts.image(1, "PNG"))
    with pytest.raises(DataError, match="holds no tar file"):
        Candidates(tmp_path, layout="webdataset")
    with pytest.raises(DataError, match="layout esc50"):
        Candidates(tmp_path, layout="esc50")


def test_loose_media_beside_an_archive_have_no_layout() -> None:
    assert detect_layout(["a.jpg", "old.tar"]) is None
    assert detect_layout(["a/000.tar", "a/001.tar", "readme.txt"]) == "webdataset"
    assert detect_layouts(["x/a.jpg", "y/meta/esc50.csv", "z.txt"]) == {"y/": "esc50"}


# Hostile archives.


def job(folder: Path, name: str) -> ArchiveJob:
    return ArchiveJob(str(folder), name, (), None, None, 1e8)


@pytest.mark.fault
def test_members_of_a_hostile_tar_are_rejected_separately(tmp_path: Path) -> None:
    import io
    import tarfile

    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        names = ["ok.png", "../up.png", "/abs.png", "ok.png"]
        for name, payload in [
            *((name, layouts.image(seed, "PNG")) for seed, name in enumerate(names)),
            ("evil.jpg", b"%PDF-1.4"),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        device = tarfile.TarInfo("dev.wav")
        device.type = tarfile.CHRTYPE
        archive.addfile(device)
    answer = list_archive(job(tmp_path, "x.tar"))
    assert [file.path for file in answer["files"]] == ["x.tar/ok.png"]
    assert {item.path: item.code for item in answer["rejected"]} == {
        "x.tar/../up.png": "PATH_UNSAFE", "x.tar//abs.png": "PATH_UNSAFE", "x.tar/ok.png": "ARCHIVE_DUPLICATE",
        "x.tar/evil.jpg": "FORMAT_NOT_ALLOWED", "x.tar/link.png": "NOT_A_FILE", "x.tar/dev.wav": "NOT_A_FILE",
    }  # fmt: skip


@pytest.mark.fault
def test_truncated_tar_keeps_earlier_members(tmp_path: Path) -> None:
    layouts.webdataset(tmp_path)
    whole = (tmp_path / "train-000000.tar").read_bytes()
    second = whole.index(b"000001.flac")
    layouts.put(tmp_path / "cut.tar", whole[: second + 2000])
    answer = list_archive(job(tmp_path, "cut.tar"))
    assert len(answer["files"]) == 3
    assert {item.code for item in answer["rejected"]} == {"ARCHIVE_CORRUPT"}


@pytest.mark.fault
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda raw, at: raw[: at + 150] + bytes([raw[at + 150] ^ 1]) + raw[at + 151 :], "the header at byte"),
        (lambda raw, at: raw[: at + 200], "without its end marker"),
        (lambda raw, at: raw[:at], "without its end marker"),
        (lambda raw, at: raw[:at] + bytes(512) + raw[at + 512 :], "continues after its end marker"),
        (lambda raw, at: raw + raw, "continues after its end marker"),
    ],
    ids=["one bit of a header", "cut in a header", "cut between members", "a header of zeros", "two tars"],
)
def test_damaged_tar_is_rejected_and_keeps_earlier_members(
    tmp_path: Path, damage: Callable[[bytes, int], bytes], reason: str
) -> None:
    layouts.webdataset(tmp_path)
    raw = (tmp_path / "train-000000.tar").read_bytes()
    layouts.put(tmp_path / "x.tar", damage(raw, raw.index(b"000001.jpg")))
    answer = list_archive(job(tmp_path, "x.tar"))
    assert {file.path for file in answer["files"]} >= {"x.tar/000000.jpg", "x.tar/000000.flac"}
    (rejected,) = answer["rejected"]
    assert (rejected.path, rejected.code, reason in rejected.reason) == ("x.tar", "ARCHIVE_CORRUPT", True), rejected.reason


@pytest.mark.fault
@pytest.mark.parametrize("name", ["x.tar", "x.parquet", "x.arrow"])
def test_other_content_is_a_corrupt_archive(tmp_path: Path, name: str) -> None:
    layouts.put(tmp_path / name, b"\x1f\x8b rubbish " * 300)
    answer = list_archive(job(tmp_path, name))
    assert answer["files"] == []
    assert [item.code for item in answer["rejected"]] == ["ARCHIVE_CORRUPT"]


@pytest.mark.fault
def test_table_without_media_and_compressed_table(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "t.parquet")
    (rejected,) = list_archive(job(tmp_path, "t.parquet"))["rejected"]
    assert (rejected.code, "it has text" in rejected.reason) == ("ARCHIVE_NO_MEDIA", True)
    rows = pa.table({"jpg": pa.array([layouts.image(1)], pa.binary())})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(tmp_path / "z.arrow"), "wb") as sink, pa.ipc.new_stream(sink, rows.schema, options=options) as writer:
        writer.write_table(rows)
    (rejected,) = list_archive(job(tmp_path, "z.arrow"))["rejected"]
    assert "compressed" in rejected.reason


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.binary()), ("path", pa.string())])])
def test_arrow_batch_without_bytes_is_not_embedded(tmp_path: Path, kind: pa.DataType) -> None:
    def value(payload: bytes | None) -> Any:
        return {"bytes": payload, "path": "a.png"} if pa.types.is_struct(kind) else payload

    schema = pa.schema([("image", kind)])
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in ([layouts.image(1)], [None, None], [], [b""], [None, layouts.image(2)]):
            writer.write_batch(pa.record_batch([pa.array([value(payload) for payload in batch], kind)], schema=schema))
    answer = list_archive(job(tmp_path, "x.arrow"))
    assert [file.path.split("/")[1] for file in answer["files"]] == ["00000000", "00000005"]
    codes = ["NOT_EMBEDDED", "NOT_EMBEDDED", "EMPTY_FILE", "NOT_EMBEDDED"]
    assert [item.code for item in answer["rejected"]] == codes


def test_labels_are_returned_only_for_ground_truth(tmp_path: Path) -> None:
    layouts.esc50(tmp_path)
    names = ("meta/esc50.csv", "LICENSE")
    query = MetadataQuery("file", "license", "author", ("source",), ("group",), None, None)
    plain = read_dataset_folder(DatasetFolderJob(str(tmp_path), "", "esc50", names, query))["rows"]
    labelled = read_dataset_folder(DatasetFolderJob(str(tmp_path), "", "esc50", names, None))["rows"]
    assert len(plain) == len(labelled)
    assert not {"label", "pair"} & {field for row in plain for field in row._fields}
    assert not {"dog", "sea_waves"} & {value for row in plain for value in row}
    assert {row["label"] for row in labelled} == {"dog", "sea_waves"}


def test_check_command_reports_layouts(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from pipeline_steps.cli import app

    layouts.audioset(tmp_path / "set")
    layouts.cc_parquet(tmp_path / "web")
    done = CliRunner().invoke(app, ["-C", str(tmp_path), "check", str(tmp_path), "--json"])
    report = json.loads(done.output)
    assert report["layouts"] == {"set": "audioset", "web": "parquet"}
    assert (report["images"], report["audio"], report["codes"]) == (2, 1, {"NOT_DOWNLOADED": 1})


def test_labels_command_writes_the_table_of_evaluate(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from pipeline_steps.cli import app
    from pipeline_steps.evaluate.ground_truth import match, parse_manifest

    pool, out = tmp_path / "pool", tmp_path / "labels.csv"
    layouts.webdataset(pool / "shards")
    layouts.esc50(pool / "sounds")
    rejected = CliRunner().invoke(app, ["labels", str(pool), "--out", str(pool / "labels.csv")])
    assert rejected.exit_code == 2
    done = CliRunner().invoke(app, ["labels", str(pool), "--out", str(out), "--gold", "train"])
    assert done.exit_code == 0, done.output
    rows = parse_manifest(out.read_text(), "labels.csv")
    assert {row["label"] for row in rows} == {"dog", "sea_waves", "secret words", ""}
    files = Candidates(pool).files
    images = [{"image_id": file.item_id, "sources": [name]} for name, file in files.items() if file.kind == "image"]
    audio = [{"audio_id": file.item_id, "sources": [name]} for name, file in files.items() if file.kind == "audio"]
    truth = match(rows, images, audio)
    assert truth.num_unmatched == 0
    assert [pair.label for pair in truth.pairs] == ["dog", "secret words"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("http://creativecommons.org/licenses/by-nc-nd/2.0/", "CC-BY-NC-ND-2.0"),
        ("https://creativecommons.org/licenses/by/4.0/deed.en", "CC-BY-4.0"),
        ("CC BY-SA 3.0", "CC-BY-SA-3.0"),
        ("cc0", "CC0-1.0"),
        ("My own terms", "My own terms"),
        ("unknown", None),
        ("  ", None),
        (None, None),
        (7, None),
    ],
)
def test_spdx(text: object, wanted: str | None) -> None:
    assert spdx_id(text) == wanted


def test_public_domain_is_spelled_equally_in_ingest_and_pair() -> None:
    from pipeline_steps.pair.release.dataset_card import license_url
    from pipeline_steps.pair.release.license_terms import terms

    for text in ("Public Domain", "https://creativecommons.org/publicdomain/mark/1.0/", "LicenseRef-Public-Domain"):
        license = spdx_id(text)
        assert license == "LicenseRef-Public-Domain"
        assert (terms(license).publishable, terms(license).obligations) == (True, set())
        assert license_url(license).startswith("https://")
