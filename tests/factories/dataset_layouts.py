"""Small folders in the layouts of well-known data sets, with real images and audio."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from PIL import Image


def image(seed: int, form: str = "JPEG") -> bytes:
    """Encoded image that depends on the seed."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 255, (6, 8, 3), np.uint8)).resize((64, 48))
    buffer = io.BytesIO()
    coarse.save(buffer, form)
    return buffer.getvalue()


def audio(seed: int, form: str = "WAV") -> bytes:
    """Encoded clip of half a second that depends on the seed."""
    random = np.random.default_rng(1000 + seed)
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.1 * random.standard_normal(8000), 16_000, format=form)
    return buffer.getvalue()


def put(path: Path, payload: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(payload.encode() if isinstance(payload, str) else payload)


def table(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    buffer = io.StringIO()
    csv.writer(buffer).writerows([header, *rows] if header else rows)
    put(path, buffer.getvalue())


def fsd50k(root: Path) -> None:
    table(
        root / "FSD50K.ground_truth/dev.csv", ["fname", "labels", "mids", "split"],
        [["64760", "Bark,Dog", "/m/05tny_", "train"], ["16399", "Rain", "/m/06mb1", "val"], ["16400", "Rain", "", "train"]],
    )  # fmt: skip
    table(root / "FSD50K.ground_truth/eval.csv", ["fname", "labels", "mids"], [["37199", "Bell", "/m/0395lw"]])
    by = "http://creativecommons.org/licenses/by/3.0/"
    clip = {"title": "x", "description": "secret words", "tags": ["y"]}
    dev = {
        "64760": clip | {"license": by, "uploader": "ann"},
        "16399": clip | {"license": "http://creativecommons.org/publicdomain/zero/1.0/", "uploader": "ben"},
        "16400": clip | {"license": "http://creativecommons.org/licenses/sampling+/1.0/", "uploader": "ben"},
    }
    put(root / "FSD50K.metadata/dev_clips_info_FSD50K.json", json.dumps(dev))
    late = {"37199": clip | {"license": "http://creativecommons.org/licenses/by-nc/3.0/", "uploader": "cid"}}
    put(root / "FSD50K.metadata/eval_clips_info_FSD50K.json", json.dumps(late))
    for index, name in enumerate(("64760", "16399", "16400")):
        put(root / f"FSD50K.dev_audio/{name}.wav", audio(index))
    put(root / "FSD50K.eval_audio/37199.wav", audio(9))


def esc50(root: Path) -> None:
    header = ["filename", "fold", "target", "category", "esc10", "src_file", "take"]
    rows = [
        ["1-100032-A-0.wav", 1, 0, "dog", "True", 100032, "A"],
        ["1-59513-A-0.wav", 1, 0, "dog", "True", 59513, "A"],
        ["2-59513-B-0.wav", 2, 0, "dog", "True", 59513, "B"],
        ["5-9032-A-11.wav", 5, 11, "sea_waves", "False", 9032, "A"],
    ]
    table(root / "meta/esc50.csv", header, rows)
    for index, row in enumerate(rows):
        put(root / f"audio/{row[0]}", audio(20 + index))
    put(
        root / "LICENSE",
        "# ESC-50\n101 - Dog:\n- [1-100032-A.ogg]: clip derived from rose (bark).wav "
        "(http://www.freesound.org/people/nfrae/sounds/100032/) by nfrae [CC0]\n",
    )


def vggsound(root: Path) -> None:
    rows = [
        ["--0PQM4-hqg", 30, "waterfall burbling", "train"],
        ["abcdefghijk", 2, "dog barking", "test"],
        ["gonegonegon", 5, "x", "train"],
    ]
    table(root / "vggsound.csv", [], rows)
    for video, start, seed in (("--0PQM4-hqg", "000030", 30), ("--0PQM4-hqg", "000090", 31), ("abcdefghijk", "000002", 32)):
        put(root / f"audio/{video}_{start}.flac", audio(seed, "FLAC"))
        put(root / f"frames/{video}_{start}.jpg", image(seed))
    put(root / "audio/unknownvide_000001.flac", audio(33, "FLAC"))


def audioset(root: Path) -> None:
    put(
        root / "eval_segments.csv",
        "# Segments csv\n# num_ytids=1\n# YTID, start_seconds, end_seconds, positive_labels\n"
        '--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/07q6cd_"\n',
    )
    put(root / "eval/Y--4gqARaEJE.wav", audio(40))


def coco(root: Path) -> None:
    content = {
        "licenses": [{"id": 1, "name": "NC", "url": "http://creativecommons.org/licenses/by-nc-sa/2.0/"},
                     {"id": 7, "name": "none", "url": "http://flickr.com/commons/usage/"}],
        "images": [{"id": 9, "file_name": "000000000009.jpg", "license": 1, "flickr_url": "http://farm1.staticflickr.com/9.jpg"},
                   {"id": 25, "file_name": "000000000025.jpg", "license": 7, "coco_url": "http://images.cocodataset.org/25.jpg"}],
        "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
        "annotations": [{"image_id": 9, "category_id": 18}, {"image_id": 9, "category_id": 3}],
    }  # fmt: skip
    put(root / "annotations/instances_val2017.json", json.dumps(content))
    put(
        root / "annotations/captions_val2017.json", json.dumps(content | {"annotations": [{"image_id": 9, "caption": "a dog"}]})
    )
    put(
        root / "annotations/instances_train2017.json",
        json.dumps(content | {"images": [{"id": 1, "file_name": "1.jpg", "license": 1}]}),
    )
    put(root / "val2017/000000000009.jpg", image(50))
    put(root / "val2017/000000000025.jpg", image(51))


def tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))


def webdataset(root: Path) -> None:
    metadata = {"license": "CC BY 4.0", "author": "Dee", "url": "https://example.org/1", "caption": "secret words"}
    first = [
        ("000000.jpg", image(60)), ("000000.flac", audio(60, "FLAC")), ("000000.json", json.dumps(metadata).encode()),
        ("000000.cls", b"dog"),
        ("000001.jpg", image(61)), ("000001.flac", audio(61, "FLAC")), ("000001.txt", b"secret words"),
    ]  # fmt: skip
    tar(root / "train-000000.tar", first)
    tar(root / "test-000000.tar", [("a/000002.png", image(62, "PNG")), ("a/000002.wav", audio(62))])


def _media_struct() -> pa.DataType:
    return pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])


def _rows(start: int) -> pa.Table:
    count = 3
    return pa.table(
        {
            "image": pa.array([{"bytes": image(start + i), "path": f"{i}.jpg"} for i in range(count)], _media_struct()),
            "audio": pa.array([{"bytes": audio(start + i), "path": f"{i}.wav"} for i in range(count)], _media_struct()),
            "label": pa.array(["dog", "rain", "bell"]),
            "license": pa.array(["cc-by-4.0", None, "cc0"]),
            "creator": pa.array(["Eve", "Eve", None]),
        }
    )


def datasets_parquet(root: Path) -> None:
    """Clone of a hub repository: README with a license, data/SPLIT-*.parquet."""
    put(root / "README.md", "---\nlanguage: en\nlicense: cc-by-sa-4.0\n---\n# set\n")
    (root / "data").mkdir(parents=True)
    pq.write_table(_rows(70), root / "data/train-00000-of-00001.parquet", row_group_size=2)
    pq.write_table(_rows(80), root / "data/test-00000-of-00001.parquet")


def datasets_arrow(root: Path) -> None:
    """Output of `save_to_disk` for a dictionary of splits: Arrow streams."""
    put(root / "dataset_dict.json", json.dumps({"splits": ["train", "test"]}))
    for split, start in (("train", 90), ("test", 95)):
        folder = root / split
        put(folder / "dataset_info.json", json.dumps({"license": "cc-by-sa-4.0", "features": {}}))
        put(folder / "state.json", "{}")
        rows = _rows(start)
        with pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as sink, pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows, max_chunksize=2)


def cc_parquet(root: Path) -> None:
    """Output of img2dataset with output_format=parquet; one row was not downloaded."""
    rows = pa.table(
        {
            "url": [f"https://example.org/{i}.jpg" for i in range(3)],
            "caption": ["secret words"] * 3,
            "status": ["success", "success", "failed_to_download"],
            "jpg": pa.array([image(100), image(101), None], pa.binary()),
        }
    )
    root.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, root / "00000.parquet")
