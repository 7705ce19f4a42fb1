"""Data set layouts: detection by file names, and the rows of their tables. Tables are read in decoding processes.

A row holds file, license, author, source, group, split, label, pair and caption. Label and pair are used for ground truth only.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline_steps.core.safe_paths import UnsafePathError, open_regular_file, resolve, validate_relative_path
from pipeline_steps.ingest.file_signatures import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, extension
from pipeline_steps.ingest.license_ids import spdx_id
from pipeline_steps.ingest.sources.metadata_table import MetadataQuery, filter_rows

Row = dict[str, str | None]

ARCHIVE_EXTENSIONS = {"webdataset": ("tar",), "datasets": ("arrow", "parquet"), "parquet": ("parquet",)}
"""Extensions of the archives of each layout whose media are inside archives."""

CARD_FILES = ("dataset_info.json", "README.md")
"""Files of a data set that may name its license, in order of precedence."""

STATE_FILE = "state.json"
"""File of `save_to_disk` that lists the Arrow files of a data set."""

_CACHE_NAME = re.compile(r"(cache-[0-9a-f]+.*|tmp\w+)\.arrow")

MAX_CARD_BYTES = 4_000_000

_FSD50K_TABLE = r"FSD50K\.ground_truth/(dev|eval)\.csv"
_ESC50_TABLE = "meta/esc50.csv"
_AUDIOSET_TABLE = r"(vggsound\w*|\w+_segments)\.csv"
_COCO_KINDS = ("image_info", "captions", "person_keypoints", "instances")
_COCO_TABLE = rf"annotations/({'|'.join(_COCO_KINDS)})_\w+\.json"
_TABLES = {"fsd50k": _FSD50K_TABLE, "esc50": re.escape(_ESC50_TABLE), "coco": _COCO_TABLE, "audioset": _AUDIOSET_TABLE}
"""Layout -> pattern of the tables by which it is detected."""

_SPLIT = re.compile(
    r"(?:^|[/._-])(train|training|validation|valid|val|dev|test|eval|balanced_train|unbalanced_train)(?=[-_./0-9])"
)


class DatasetFolderJob(NamedTuple):
    """Data set folder to read in a worker. `names` are the files below it, with `prefix`."""

    root: str
    prefix: str
    layout: str
    names: tuple[str, ...]
    query: MetadataQuery | None


def read_dataset_license(root: str, cards: Sequence[str]) -> str | None:
    """SPDX id of a data set from `license` of dataset_info.json, else of the card's YAML head; runs in a worker."""
    for name in sorted(cards, key=lambda name: CARD_FILES.index(name.rsplit("/", 1)[-1])):
        try:
            text = _read(root, name, MAX_CARD_BYTES).decode("utf-8", "replace")
            license = _yaml_license(text) if name.endswith("README.md") else _json_license(text)
        except (ValueError, RecursionError, YAMLError, UnsafePathError, OSError):
            continue
        if license:
            return license
    return None


def _read(root: str, name: str, limit: int = -1) -> bytes:
    with open_regular_file(Path(root), resolve(Path(root), validate_relative_path(name))) as handle:
        return handle.read(limit)


def _yaml_license(text: str) -> str | None:
    head = re.match(r"\ufeff?---\s*\n(.*?)\n---", text, re.DOTALL)
    content = YAML(typ="safe", pure=True).load(head.group(1)) if head else None
    return _card_license(content)


def _json_license(text: str) -> str | None:
    return _card_license(json.loads(text))


def _card_license(content: Any) -> str | None:
    """License of a card's mapping: `license`, or `license_name` if that is "other"."""
    if not isinstance(content, dict):
        return None
    return combined_license(content.get("license")) or spdx_id(content.get("license_name"))


def combined_license(value: Any) -> str | None:
    """SPDX expression of a license or a list of licenses, all of which apply; None if one of them is unknown."""
    if not isinstance(value, list):
        return spdx_id(value)
    licenses = [spdx_id(one) for one in value]
    return " AND ".join(sorted({one for one in licenses if one})) or None if all(licenses) else None


def is_datasets_cache(root: str, relative: str) -> bool:
    """Whether an Arrow file is a cache of `datasets` (of map, filter or shuffle) and no data; runs in a worker.

    state.json beside saved data lists the files that hold it.
    """
    folder, _, base = relative.rpartition("/")
    if extension(base) != "arrow":
        return False
    try:
        state = json.loads(_read(root, f"{folder}/{STATE_FILE}" if folder else STATE_FILE, MAX_CARD_BYTES))
        listed = [str(entry["filename"]) for entry in state["_data_files"]]
    except (ValueError, RecursionError, KeyError, TypeError, UnsafePathError, OSError):
        return bool(_CACHE_NAME.fullmatch(base))
    return base not in listed


def detect_layout(names: Sequence[str]) -> str | None:
    """Layout of a folder by the names of the files below it, or None."""
    for layout, pattern in _TABLES.items():
        if any(re.fullmatch(pattern, name) for name in names):
            return layout
    extensions = {extension(name) for name in names}
    if extensions & (IMAGE_EXTENSIONS.keys() | AUDIO_EXTENSIONS.keys()):
        return None  # a folder of loose media; archives beside them do not define it
    if "tar" in extensions:
        return "webdataset"
    if "arrow" in extensions or any(re.search(r"-\d{5}-of-\d{5}\.parquet$", name) for name in names):
        return "datasets"
    return "parquet" if "parquet" in extensions else None


def detect_layouts(names: Sequence[str]) -> dict[str, str]:
    """Prefix ("" or "folder/") -> layout: of the root if it has one, else of each folder directly below it that has one."""
    layout = detect_layout(names)
    if layout:
        return {"": layout}
    folders: dict[str, list[str]] = {}
    for name in names:
        top, separator, inner = name.partition("/")
        if separator:
            folders.setdefault(f"{top}/", []).append(inner)
    found = {prefix: detect_layout(inner) for prefix, inner in folders.items()}
    return {prefix: layout for prefix, layout in sorted(found.items()) if layout}


def infer_split(name: str) -> str:
    """Split that a path names (train, val, test ...), or an empty string."""
    found = _SPLIT.findall(name.lower())
    return str(found[-1]) if found else ""


def read_dataset_folder(job: DatasetFolderJob) -> dict[str, Any]:
    """Rows of a data set folder; runs in a worker.

    Returns:
        {"rows": [MetadataRow...], "filtered": rows in neither filter}; without a query {"rows": [Row...]}, with labels and
        pairs; or {"error": text} for unusable tables.
    """
    reader = {"fsd50k": _fsd50k, "esc50": _esc50, "audioset": _audioset, "coco": _coco}[job.layout]
    try:
        rows = list(reader(_DatasetFolder(job)))
    except (ValueError, csv.Error, KeyError, TypeError, AttributeError, UnsafePathError) as error:
        return {"error": f"{job.prefix}: layout {job.layout}: {type(error).__name__}: {error}"}
    for row in rows:
        row["file"] = f"{job.prefix}{row['file']}"
    if job.query is None:
        return {"rows": rows}
    selected, filtered = filter_rows(({name: value or "" for name, value in row.items()} for row in rows), job.query)
    return {"rows": selected, "filtered": filtered}


class _DatasetFolder:
    """Names and tables of a data set folder, relative to the folder."""

    def __init__(self, job: DatasetFolderJob) -> None:
        self._job = job
        self.labels = job.query is None
        self.captions = job.query is not None and bool(job.query.text)
        self.names = [name.removeprefix(job.prefix) for name in job.names]

    def matching(self, pattern: str) -> list[str]:
        return sorted(name for name in self.names if re.fullmatch(pattern, name))

    def read(self, name: str) -> str:
        return _read(self._job.root, f"{self._job.prefix}{name}").decode("utf-8-sig")

    def table(self, name: str) -> Iterator[dict[str, str]]:
        for row in csv.DictReader(io.StringIO(self.read(name)), strict=True):
            yield {key: value or "" for key, value in row.items() if key is not None}


def _fsd50k(folder: _DatasetFolder) -> Iterator[Row]:
    """FSD50K 1.0: clips of ground_truth/{dev,eval}.csv, license and uploader from metadata/*_clips_info_FSD50K.json."""
    for part in ("dev", "eval"):
        if not folder.matching(rf"FSD50K\.ground_truth/{part}\.csv") or not folder.matching(rf"FSD50K\.{part}_audio/.*"):
            continue  # this part was not downloaded
        name = f"FSD50K.metadata/{part}_clips_info_FSD50K.json"
        infos: Mapping[str, Any] = json.loads(folder.read(name)) if name in folder.names else {}
        for row in folder.table(f"FSD50K.ground_truth/{part}.csv"):
            info = infos.get(row["fname"]) or {}
            uploader = str(info.get("uploader") or "") or None
            yield {
                "file": f"FSD50K.{part}_audio/{row['fname']}.wav",
                "license": spdx_id(info.get("license")),
                "author": uploader,
                "source": f"https://freesound.org/s/{row['fname']}/",
                "group": f"freesound uploader {uploader}" if uploader else None,
                "split": row.get("split") or part,
                "label": row["labels"],
            }


_ESC50_CLIP = re.compile(
    r"- \[(?P<clip>\S+)\.ogg\]:\s+clip derived from .*\((?P<url>\S+)\) by (?P<author>.*) \[(?P<license>[^\]]+)\]"
)


def _esc50(folder: _DatasetFolder) -> Iterator[Row]:
    """ESC-50: meta/esc50.csv, where `src_file` is the recording; LICENSE names the author of each clip.

    The data set is licensed for non-commercial use; its subset ESC-10 is CC BY.
    """
    lines = [line for name in folder.matching(r"LICENSE(\.txt)?") for line in folder.read(name).splitlines()]
    credits = {match["clip"]: match for match in map(_ESC50_CLIP.match, lines) if match}
    for row in folder.table(_ESC50_TABLE):
        stem = row["filename"].rsplit(".", 1)[0].rsplit("-", 1)[0]  # 1-100032-A-0.wav: fold, recording, take, class
        credit = credits.get(stem)
        esc10 = row.get("esc10", "").strip().lower() == "true"
        yield {
            "file": f"audio/{row['filename']}",
            "license": "CC-BY-3.0" if esc10 else "CC-BY-NC-3.0",
            "author": credit["author"] if credit else None,
            "source": credit["url"] if credit else f"https://freesound.org/s/{row['src_file']}/",
            "group": f"freesound {row['src_file']}",
            "split": row["fold"],
            "label": row["category"],
        }


_CLIP = re.compile(r"(?:Y)?(?P<video>[\w-]{11})(?:[_.](?P<start>\d+)(?:\.\d+)?(?:_[\d.]+)?)?")


def _audioset(folder: _DatasetFolder) -> Iterator[Row]:
    """VGGSound (video, start, label, split; no header) and AudioSet segments (# comments; video, start, end, labels).

    All clips of a video have the same group. Rows without a clip are left out, because videos disappear from the site. The
    tables do not contain licenses.
    """
    media = IMAGE_EXTENSIONS.keys() | AUDIO_EXTENSIONS.keys()
    rows: dict[tuple[str, int], tuple[str, str]] = {}
    videos: dict[str, tuple[str, str]] = {}
    for name in folder.matching(_AUDIOSET_TABLE):
        lines = (line for line in folder.read(name).splitlines() if line.strip() and not line.startswith("#"))
        for fields in csv.reader(lines, skipinitialspace=True):
            if fields[0].strip().lower() in {"ytid", "youtube_id", "video"}:
                continue
            segments = name.endswith("_segments.csv")
            label = fields[3] if segments else fields[2]
            split = name.removesuffix("_segments.csv") if segments else fields[3] if len(fields) > 3 else infer_split(name)
            rows[fields[0], int(float(fields[1]))] = videos[fields[0]] = (label, split)
    for file in folder.names:
        stem = file.rsplit("/", 1)[-1].rsplit(".", 1)[0]
        match = _CLIP.fullmatch(stem)
        if extension(file) not in media or not match or match["video"] not in videos:
            continue
        video, start = match["video"], match["start"]
        seconds = int(start) if start else 0
        label, split = next((rows[key] for key in ((video, seconds), (video, seconds // 1000)) if key in rows), videos[video])
        yield {
            "file": file,
            "license": None,
            "author": None,
            "source": f"https://www.youtube.com/watch?v={video}",
            "group": f"youtube {video}",
            "split": split,
            "label": label,
            "pair": f"{video}_{seconds}",
        }


def _coco(folder: _DatasetFolder) -> Iterator[Row]:
    """COCO: annotations/*_SPLIT.json name the images and their licenses; images are in SPLIT/, images/SPLIT/ or images/.

    Of several annotation files of a split the smallest kind is read, `instances` for labels, or `captions` for captions. A
    split without any image was not downloaded and is left out.
    """
    files: dict[str, list[str]] = {}
    for name in folder.matching(_COCO_TABLE):
        files.setdefault(name.removesuffix(".json").rsplit("_", 1)[-1], []).append(name)
    present = set(folder.names)
    order = _COCO_KINDS[::-1] if folder.labels else ("captions", *_COCO_KINDS) if folder.captions else _COCO_KINDS
    for split, names in sorted(files.items()):
        if not folder.matching(rf"(images/)?{re.escape(split)}/.*") and not folder.matching(r"images/[^/]+"):
            continue
        chosen = min(names, key=lambda name: next(rank for rank, kind in enumerate(order) if f"/{kind}_" in name))
        content = json.loads(folder.read(chosen))
        licenses = {entry["id"]: entry.get("url") or entry.get("name") for entry in content.get("licenses", [])}
        labels = _coco_labels(content) if folder.labels else {}
        captions: dict[Any, list[str]] = {}
        for entry in content.get("annotations", []) if folder.captions else ():
            captions.setdefault(entry["image_id"], []).append(str(entry.get("caption", "")))
        for image in content["images"]:
            file = str(image["file_name"])
            paths = (f"{split}/{file}", f"images/{split}/{file}", f"images/{file}")
            yield {
                "file": next((path for path in paths if path in present), paths[0]),
                "license": spdx_id(licenses.get(image.get("license"))),
                "author": None,
                "source": image.get("flickr_url") or image.get("coco_url"),
                "group": None,
                "split": split,
                "label": ", ".join(sorted(labels.get(image["id"], ()))),
                "caption": "; ".join(captions.get(image["id"], ())) or None,
            }


def _coco_labels(content: dict[str, Any]) -> dict[Any, set[str]]:
    """Image id -> names of the categories annotated in it."""
    names = {entry["id"]: entry["name"] for entry in content.get("categories", [])}
    found: dict[Any, set[str]] = {}
    for entry in content.get("annotations", []):
        if entry.get("category_id") in names:
            found.setdefault(entry["image_id"], set()).add(names[entry["category_id"]])
    return found
