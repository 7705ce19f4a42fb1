"""Data sets in the layouts of others, each a tiny folder built here: what is taken, and what stays out."""

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
from pipeline_steps.ingest.config import DecoderLimitsConfig, IngestConfig
from pipeline_steps.ingest.license_ids import spdx
from pipeline_steps.ingest.sources.archives import ArchiveJob, list_archive
from pipeline_steps.ingest.sources.dataset_layouts import DatasetFolderJob, detect_layout, detect_layouts, read_folder
from pipeline_steps.ingest.sources.resolve import collect_candidates
from tests.factories import dataset_layouts as made

CONFIG = IngestConfig(
    root="pool", metadata=None, pool=None, holdout=None, limits=DecoderLimitsConfig(workers=1), max_failed_fraction=0.5
)


class Got:
    """What a layout gives, before anything is decoded."""

    def __init__(self, folder: Path, **update: Any) -> None:
        self.found, self.ignored, self.layouts = collect_candidates(CONFIG.model_copy(update=update), folder)
        self.files = {file.shown: file for file in self.found.files}
        self.refused = {item.shown: item.code for item in self.found.refused}
        self.images = {name: file for name, file in self.files.items() if file.kind == "image"}
        self.audio = {name: file for name, file in self.files.items() if file.kind == "audio"}

    def says(self, word: str) -> bool:
        return word in repr((self.found, self.ignored, self.layouts))


def test_fsd50k(tmp_path: Path) -> None:
    made.fsd50k(tmp_path)
    found = Got(tmp_path, holdout={"split": ["eval"]})
    rows = found.audio
    assert found.layouts == {".": "fsd50k"}
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
    assert not found.says("secret")
    assert not found.says("Bark"), "labels stay out"


def test_esc50(tmp_path: Path) -> None:
    made.esc50(tmp_path)
    found = Got(tmp_path, holdout={"split": ["5"]})
    rows = found.audio
    assert len(rows) == 4
    first = rows["audio/1-100032-A-0.wav"]
    assert (first.license, first.author) == ("CC-BY-3.0", "nfrae")
    assert first.source == "http://www.freesound.org/people/nfrae/sounds/100032/"
    assert rows["audio/5-9032-A-11.wav"].license == "CC-BY-NC-3.0"
    assert rows["audio/5-9032-A-11.wav"].holdout
    assert rows["audio/1-59513-A-0.wav"].group == rows["audio/2-59513-B-0.wav"].group, "takes of one recording"
    assert not found.says("sea_waves")


def test_vggsound_clips_of_one_video_are_one_recording(tmp_path: Path) -> None:
    made.vggsound(tmp_path)
    found = Got(tmp_path)
    sounds, frames = found.audio, found.images
    assert len(sounds) == len(frames) == 3, "a clip without a row stays out, and a row without a clip is no fault"
    assert sounds["audio/--0PQM4-hqg_000030.flac"].group == sounds["audio/--0PQM4-hqg_000090.flac"].group
    assert sounds["audio/abcdefghijk_000002.flac"].source == "https://www.youtube.com/watch?v=abcdefghijk"
    assert sounds["audio/abcdefghijk_000002.flac"].license is None
    assert found.refused == {}
    tests = Got(tmp_path, pool={"split": "test"})
    assert (len(tests.audio), tests.ignored) == (1, 4)


def test_audioset_segments(tmp_path: Path) -> None:
    made.audioset(tmp_path)
    (row,) = Got(tmp_path, holdout={"split": "eval"}).audio.values()
    assert row.source == "https://www.youtube.com/watch?v=--4gqARaEJE"
    assert row.holdout


def test_coco(tmp_path: Path) -> None:
    made.coco(tmp_path)
    found = Got(tmp_path)
    rows = found.images
    assert {path: row.license for path, row in rows.items()} == {
        "val2017/000000000009.jpg": "CC-BY-NC-SA-2.0",
        "val2017/000000000025.jpg": "LicenseRef-Flickr-Commons",
    }
    assert rows["val2017/000000000025.jpg"].source == "http://images.cocodataset.org/25.jpg"
    assert found.refused == {}, "train2017 was not downloaded"


def test_webdataset(tmp_path: Path) -> None:
    made.webdataset(tmp_path)
    found = Got(tmp_path, holdout={"split": "test"})
    images, audio = found.images, found.audio
    assert set(images) == {"train-000000.tar/000000.jpg", "train-000000.tar/000001.jpg", "test-000000.tar/a/000002.png"}
    first = audio["train-000000.tar/000000.flac"]
    assert (first.license, first.author, first.source) == ("CC-BY-4.0", "Dee", "https://example.org/1")
    assert audio["train-000000.tar/000001.flac"].license is None
    assert [path for path, row in images.items() if row.holdout] == ["test-000000.tar/a/000002.png"]
    assert not found.says("secret")


@pytest.mark.parametrize("make", [made.datasets_parquet, made.datasets_arrow])
def test_datasets_folders(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path)
    found = Got(tmp_path, holdout={"split": "test"})
    assert (len(found.images), len(found.audio)) == (6, 6)
    train = [file for _, file in sorted(found.audio.items()) if not file.holdout]
    assert [row.license for row in train] == ["CC-BY-4.0", "CC-BY-SA-4.0", "CC0-1.0"], "the set's license fills the gaps"
    assert [row.author for row in train] == ["Eve", "Eve", None]
    assert train[0].shown.endswith("00000000/audio/0.wav")
    assert not found.says("bell")


def test_cc_parquet_downloads_nothing_and_says_so(tmp_path: Path) -> None:
    made.cc_parquet(tmp_path)
    found = Got(tmp_path)
    assert found.layouts == {".": "parquet"}
    assert {row.source for row in found.images.values()} == {"https://example.org/0.jpg", "https://example.org/1.jpg"}
    assert found.refused == {"00000.parquet/00000002/jpg": "NOT_EMBEDDED"}
    assert not found.says("secret")


def test_pictures_of_one_set_and_sounds_of_another_make_a_catalog(tmp_path: Path) -> None:
    made.coco(tmp_path / "pool/pictures")
    made.webdataset(tmp_path / "pool/shards")
    made.esc50(tmp_path / "pool/sounds")
    made.datasets_parquet(tmp_path / "pool/tables")
    made.datasets_arrow(tmp_path / "pool/arrows")
    made.put(tmp_path / "pool/own/mine.png", made.picture(7, "PNG"))
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
    assert (again.computed, again.reused) == (0, 37)
    assert {path: path.read_bytes() for path in before} == before


def test_a_metadata_table_or_the_word_files_keeps_the_old_ways(tmp_path: Path) -> None:
    made.esc50(tmp_path)
    plain = Got(tmp_path, layout="files")
    assert len(plain.audio) == 4
    assert all(file.license is None for file in plain.audio.values())
    assert plain.layouts == {}
    columns = {"file": "filename", "license": None, "author": None, "source": None, "group": None}
    listed = Got(tmp_path, metadata="meta/esc50.csv", columns=CONFIG.columns.model_copy(update=columns))
    assert set(listed.refused.values()) == {"FILE_MISSING"}, "the table alone says where files are"
    with pytest.raises(ConfigError, match=r"ingest\.metadata is null"):
        Got(tmp_path, layout="table")
    with pytest.raises(ConfigError, match="split alone"):
        Got(tmp_path, pool={"fold": "1"})


def test_a_named_layout_that_is_not_there(tmp_path: Path) -> None:
    made.put(tmp_path / "a.png", made.picture(1, "PNG"))
    with pytest.raises(DataError, match="holds no tar file"):
        Got(tmp_path, layout="webdataset")
    with pytest.raises(DataError, match="layout esc50"):
        Got(tmp_path, layout="esc50")


def test_loose_media_beside_an_archive_are_no_layout() -> None:
    assert detect_layout(["a.jpg", "old.tar"]) is None
    assert detect_layout(["a/000.tar", "a/001.tar", "readme.txt"]) == "webdataset"
    assert detect_layouts(["x/a.jpg", "y/meta/esc50.csv", "z.txt"]) == {"y/": "esc50"}


# Archives of strangers.


def job(folder: Path, name: str) -> ArchiveJob:
    return ArchiveJob(str(folder), name, None, None, None, 1e8)


@pytest.mark.fault
def test_members_of_a_hostile_tar_are_refused_one_by_one(tmp_path: Path) -> None:
    import io
    import tarfile

    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        names = ["ok.png", "../up.png", "/abs.png", "ok.png"]
        for name, payload in [
            *((name, made.picture(seed, "PNG")) for seed, name in enumerate(names)),
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
    assert [file.shown for file in answer["files"]] == ["x.tar/ok.png"]
    assert {item.shown: item.code for item in answer["refused"]} == {
        "x.tar/../up.png": "PATH_UNSAFE", "x.tar//abs.png": "PATH_UNSAFE", "x.tar/ok.png": "ARCHIVE_DUPLICATE",
        "x.tar/evil.jpg": "FORMAT_NOT_ALLOWED", "x.tar/link.png": "NOT_A_FILE", "x.tar/dev.wav": "NOT_A_FILE",
    }  # fmt: skip


@pytest.mark.fault
def test_a_cut_tar_keeps_what_came_before(tmp_path: Path) -> None:
    made.webdataset(tmp_path)
    whole = (tmp_path / "train-000000.tar").read_bytes()
    second = whole.index(b"000001.flac")
    made.put(tmp_path / "cut.tar", whole[: second + 2000])
    answer = list_archive(job(tmp_path, "cut.tar"))
    assert len(answer["files"]) == 3
    assert {item.code for item in answer["refused"]} == {"ARCHIVE_CORRUPT"}


@pytest.mark.fault
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda raw, at: raw[: at + 150] + bytes([raw[at + 150] ^ 1]) + raw[at + 151 :], "the header at byte"),
        (lambda raw, at: raw[: at + 200], "without its end marker"),
        (lambda raw, at: raw[:at], "without its end marker"),
        (lambda raw, at: raw[:at] + bytes(512) + raw[at + 512 :], "goes on after its end marker"),
        (lambda raw, at: raw + raw, "goes on after its end marker"),
    ],
    ids=["one bit of a header", "cut in a header", "cut between members", "a header of zeros", "two tars"],
)
def test_a_damaged_tar_says_so_and_keeps_what_came_before(
    tmp_path: Path, damage: Callable[[bytes, int], bytes], reason: str
) -> None:
    made.webdataset(tmp_path)
    raw = (tmp_path / "train-000000.tar").read_bytes()
    made.put(tmp_path / "x.tar", damage(raw, raw.index(b"000001.jpg")))
    answer = list_archive(job(tmp_path, "x.tar"))
    assert {file.shown for file in answer["files"]} >= {"x.tar/000000.jpg", "x.tar/000000.flac"}
    (refused,) = answer["refused"]
    assert (refused.shown, refused.code, reason in refused.reason) == ("x.tar", "ARCHIVE_CORRUPT", True), refused.reason


@pytest.mark.fault
@pytest.mark.parametrize("name", ["x.tar", "x.parquet", "x.arrow"])
def test_rubbish_is_a_corrupt_archive(tmp_path: Path, name: str) -> None:
    made.put(tmp_path / name, b"\x1f\x8b rubbish " * 300)
    answer = list_archive(job(tmp_path, name))
    assert answer["files"] == []
    assert [item.code for item in answer["refused"]] == ["ARCHIVE_CORRUPT"]


@pytest.mark.fault
def test_tables_without_media_or_with_compression_name_the_reason(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "t.parquet")
    (refused,) = list_archive(job(tmp_path, "t.parquet"))["refused"]
    assert (refused.code, "it has text" in refused.reason) == ("ARCHIVE_NO_MEDIA", True)
    rows = pa.table({"jpg": pa.array([made.picture(1)], pa.binary())})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(tmp_path / "z.arrow"), "wb") as sink, pa.ipc.new_stream(sink, rows.schema, options=options) as writer:
        writer.write_table(rows)
    (refused,) = list_archive(job(tmp_path, "z.arrow"))["refused"]
    assert "compressed" in refused.reason


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.binary()), ("path", pa.string())])])
def test_an_arrow_batch_without_bytes_is_not_embedded_and_the_next_ones_stay(tmp_path: Path, kind: pa.DataType) -> None:
    def value(payload: bytes | None) -> Any:
        return {"bytes": payload, "path": "a.png"} if pa.types.is_struct(kind) else payload

    schema = pa.schema([("image", kind)])
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in ([made.picture(1)], [None, None], [], [b""], [None, made.picture(2)]):
            writer.write_batch(pa.record_batch([pa.array([value(payload) for payload in batch], kind)], schema=schema))
    answer = list_archive(job(tmp_path, "x.arrow"))
    assert [file.shown.split("/")[1] for file in answer["files"]] == ["00000000", "00000005"]
    codes = ["NOT_EMBEDDED", "NOT_EMBEDDED", "EMPTY_FILE", "NOT_EMBEDDED"]
    assert [item.code for item in answer["refused"]] == codes


def test_labels_leave_the_process_only_for_ground_truth(tmp_path: Path) -> None:
    made.esc50(tmp_path)
    names = ("meta/esc50.csv", "LICENSE")
    silent = read_folder(DatasetFolderJob(str(tmp_path), "", "esc50", names))["rows"]
    told = read_folder(DatasetFolderJob(str(tmp_path), "", "esc50", names, labels=True))["rows"]
    assert not any("label" in row or "pair" in row for row in silent)
    assert {row["label"] for row in told} == {"dog", "sea_waves"}


def test_check_says_what_it_read(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from pipeline_steps.cli import app

    made.audioset(tmp_path / "set")
    made.cc_parquet(tmp_path / "web")
    done = CliRunner().invoke(app, ["-C", str(tmp_path), "check", str(tmp_path), "--json"])
    told = json.loads(done.output)
    assert told["layouts"] == {"set": "audioset", "web": "parquet"}
    assert (told["pictures"], told["sounds"], told["codes"]) == (2, 1, {"NOT_EMBEDDED": 1})


def test_the_labels_command_writes_what_evaluate_reads(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from pipeline_steps.cli import app
    from pipeline_steps.evaluate.ground_truth import match, parse_manifest

    pool, out = tmp_path / "pool", tmp_path / "labels.csv"
    made.webdataset(pool / "shards")
    made.esc50(pool / "sounds")
    refused = CliRunner().invoke(app, ["labels", str(pool), "--out", str(pool / "labels.csv")])
    assert refused.exit_code == 2
    done = CliRunner().invoke(app, ["labels", str(pool), "--out", str(out), "--gold", "train"])
    assert done.exit_code == 0, done.output
    rows = parse_manifest(out.read_text(), "labels.csv")
    assert {row["label"] for row in rows} == {"dog", "sea_waves", "secret words", ""}
    files = Got(pool).files
    images = [{"image_id": file.item, "sources": [name]} for name, file in files.items() if file.kind == "image"]
    audio = [{"audio_id": file.item, "sources": [name]} for name, file in files.items() if file.kind == "audio"]
    truth = match(rows, images, audio)
    assert truth.unmatched == 0
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
    assert spdx(text) == wanted


def test_pairing_knows_public_domain_as_ingest_and_the_demo_spell_it() -> None:
    from pipeline_steps.pair.release.dataset_card import license_url
    from pipeline_steps.pair.release.license_terms import terms

    for text in ("Public Domain", "https://creativecommons.org/publicdomain/mark/1.0/", "LicenseRef-Public-Domain"):
        license = spdx(text)
        assert license == "LicenseRef-Public-Domain"
        assert (terms(license).publishable, terms(license).obligations) == (True, set())
        assert license_url(license).startswith("https://")
