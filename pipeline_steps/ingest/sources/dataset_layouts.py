"""Folder layouts of others: which one it is, and what their tables say of the files. The tables are read in decoding processes.

A row says: file, license, author, source, group, split; and label and pair, which leave the process only for ground truth.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline_steps.core.safe_paths import UnsafePathError, open_regular_file, resolve, validate_relative_path
from pipeline_steps.ingest.file_signatures import PICTURE_EXTENSIONS, SOUND_EXTENSIONS, extension
from pipeline_steps.ingest.license_ids import spdx

Row = dict[str, str | None]

PACKED = {"webdataset": ("tar",), "datasets": ("arrow", "parquet"), "parquet": ("parquet",)}
"""Layouts whose media lie inside other files, and the extensions of those."""

MAX_CARD = 4_000_000

_SPLIT = re.compile(
    r"(?:^|[/._-])(train|training|validation|valid|val|dev|test|eval|balanced_train|unbalanced_train)(?=[-_./0-9])"
)


class DatasetFolderJob(NamedTuple):
    """A folder in a foreign layout, to be read inside a decoding process. `names` are the files below it, with `prefix`."""

    root: str
    prefix: str
    layout: str
    names: tuple[str, ...]
    labels: bool = False


CARDS = ("dataset_info.json", "README.md")
"""Files beside a data set's tables that may name its license."""


class DatasetCardJob(NamedTuple):
    """Cards to be read inside a decoding process."""

    root: str
    names: tuple[str, ...]


def read_license(job: DatasetCardJob) -> dict[str, Any]:
    """{"license": SPDX id or None} of a data set: `license` of dataset_info.json, else of the card's YAML head."""
    for wanted in CARDS:
        for name in (name for name in job.names if name.rsplit("/", 1)[-1] == wanted):
            try:
                with open_regular_file(Path(job.root), resolve(Path(job.root), validate_relative_path(name))) as handle:
                    text = handle.read(MAX_CARD).decode("utf-8", "replace")
                if wanted == "README.md":
                    match = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
                    found = re.search(r"^license:\s*(?:-\s*)?[\"']?([\w.+-]+)", match.group(1), re.MULTILINE) if match else None
                    license = spdx(found.group(1)) if found else None
                else:
                    content = json.loads(text)
                    license = spdx(content.get("license")) if isinstance(content, dict) else None
            except (ValueError, RecursionError, UnsafePathError, OSError):
                continue
            if license:
                return {"license": license}
    return {"license": None}


def detect_layout(names: Sequence[str]) -> str | None:
    """Layout of a folder from the names of the files below it; None when it is none that is known."""
    known = set(names)
    if any(re.fullmatch(r"FSD50K\.ground_truth/(dev|eval)\.csv", name) for name in names):
        return "fsd50k"
    if "meta/esc50.csv" in known:
        return "esc50"
    if any(re.fullmatch(r"annotations/(instances|captions|image_info|person_keypoints)_\w+\.json", name) for name in names):
        return "coco"
    if any(re.fullmatch(r"(vggsound\w*|\w+_segments)\.csv", name) for name in names):
        return "audioset"
    if any(extension(name) in PICTURE_EXTENSIONS or extension(name) in SOUND_EXTENSIONS for name in names):
        return None  # loose media: a tar or a table beside them is not what this folder is
    ends = {extension(name) for name in names}
    if "tar" in ends:
        return "webdataset"
    if "arrow" in ends or ("parquet" in ends and any(re.search(r"-\d{5}-of-\d{5}\.parquet$", name) for name in names)):
        return "datasets"
    return "parquet" if "parquet" in ends else None


def detect_layouts(names: Sequence[str]) -> dict[str, str]:
    """Prefix ("" or "folder/") -> layout: of the root if it has one, else of each folder directly below it that has one."""
    whole = detect_layout(names)
    if whole:
        return {"": whole}
    below: dict[str, list[str]] = {}
    for name in names:
        if "/" in name:
            top, inner = name.split("/", 1)
            below.setdefault(f"{top}/", []).append(inner)
    found = {prefix: detect_layout(inner) for prefix, inner in below.items()}
    return {prefix: layout for prefix, layout in sorted(found.items()) if layout}


def infer_split(name: str) -> str:
    """The split that a path names (train, val, test ...), or "" when it names none."""
    found = _SPLIT.findall(name.lower())
    return str(found[-1]) if found else ""


def read_folder(job: DatasetFolderJob) -> dict[str, Any]:
    """Rows of a folder; runs in a decoding process.

    Returns:
        {"rows": [...]} or {"error": text} for tables that cannot be used. Labels and pairs only if the job asks for them.
    """
    reader = {"fsd50k": _fsd50k, "esc50": _esc50, "audioset": _audioset, "coco": _coco}[job.layout]
    try:
        rows = list(reader(_DatasetFolder(job)))
    except (ValueError, csv.Error, KeyError, TypeError, AttributeError, UnsafePathError) as error:
        return {"error": f"{job.prefix}: layout {job.layout}: {type(error).__name__}: {error}"}
    for row in rows:
        row["file"] = f"{job.prefix}{row['file']}"
        if not job.labels:
            row.pop("label", None)
            row.pop("pair", None)
    return {"rows": rows}


class _DatasetFolder:
    def __init__(self, job: DatasetFolderJob) -> None:
        self._job = job
        self.labels = job.labels
        self.names = [name[len(job.prefix) :] for name in job.names]

    def matching(self, pattern: str) -> list[str]:
        return sorted(name for name in self.names if re.fullmatch(pattern, name))

    def media(self) -> Iterator[str]:
        yield from (name for name in self.names if extension(name) in PICTURE_EXTENSIONS | SOUND_EXTENSIONS)

    def read(self, name: str) -> str:
        root = Path(self._job.root)
        with open_regular_file(root, resolve(root, validate_relative_path(f"{self._job.prefix}{name}"))) as handle:
            return handle.read().decode("utf-8-sig")

    def table(self, name: str) -> Iterator[dict[str, str]]:
        reader = csv.DictReader(io.StringIO(self.read(name)), strict=True)
        yield from ({key: value or "" for key, value in row.items() if key is not None} for row in reader)


def _fsd50k(folder: _DatasetFolder) -> Iterator[Row]:
    """FSD50K 1.0: ground_truth/{dev,eval}.csv, metadata/*_clips_info_FSD50K.json with license and uploader of each clip."""
    for part in ("dev", "eval"):
        if not folder.matching(rf"FSD50K\.ground_truth/{part}\.csv") or not folder.matching(rf"FSD50K\.{part}_audio/.*"):
            continue  # a part that was not downloaded
        infos: Mapping[str, Any] = {}
        for name in folder.matching(rf"FSD50K\.metadata/{part}_clips_info_FSD50K\.json"):
            infos = json.loads(folder.read(name))
        for row in folder.table(f"FSD50K.ground_truth/{part}.csv"):
            info = infos.get(row["fname"]) or {}
            uploader = str(info.get("uploader") or "") or None
            yield {
                "file": f"FSD50K.{part}_audio/{row['fname']}.wav",
                "license": spdx(info.get("license")),
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
    """ESC-50: meta/esc50.csv; `src_file` is the recording; LICENSE attributes each clip. As a data set it is non-commercial."""
    credits: dict[str, re.Match[str]] = {}
    for name in folder.matching(r"LICENSE(\.txt)?"):
        for line in folder.read(name).splitlines():
            if match := _ESC50_CLIP.match(line):
                credits[match["clip"]] = match
    for row in folder.table("meta/esc50.csv"):
        stem = row["filename"].rsplit(".", 1)[0].rsplit("-", 1)[0]  # 1-100032-A-0.wav: fold, recording, take, class
        credit = credits.get(stem)
        ten = row.get("esc10", "").strip().lower() == "true"
        yield {
            "file": f"audio/{row['filename']}",
            "license": "CC-BY-3.0" if ten else "CC-BY-NC-3.0",
            "author": credit["author"] if credit else None,
            "source": credit["url"] if credit else f"https://freesound.org/s/{row['src_file']}/",
            "group": f"freesound {row['src_file']}",
            "split": row["fold"],
            "label": row["category"],
        }


_CLIP = re.compile(r"(?:Y)?(?P<video>[\w-]{11})(?:[_.](?P<start>\d+)(?:\.\d+)?(?:_[\d.]+)?)?")


def _audioset(folder: _DatasetFolder) -> Iterator[Row]:
    """VGGSound (video, start, label, split; no header) and AudioSet segments (# comments; video, start, end, labels).

    Clips of one video are one recording. Rows whose clip is not there are left out: videos vanish. The license of a video is
    not in these tables, so it stays unknown.
    """
    rows: dict[tuple[str, int], tuple[str, str]] = {}
    videos: dict[str, tuple[str, str]] = {}
    for name in folder.matching(r"(vggsound\w*|\w+_segments)\.csv"):
        lines = (line for line in folder.read(name).splitlines() if line.strip() and not line.startswith("#"))
        for fields in csv.reader(lines, skipinitialspace=True):
            if fields[0].strip().lower() in {"ytid", "youtube_id", "video"}:
                continue
            segments = name.endswith("_segments.csv")
            label = fields[3] if segments else fields[2]
            split = name.removesuffix("_segments.csv") if segments else fields[3] if len(fields) > 3 else infer_split(name)
            rows[fields[0], int(float(fields[1]))] = videos[fields[0]] = (label, split)
    for file in folder.media():
        stem = file.rsplit("/", 1)[-1].rsplit(".", 1)[0]
        match = _CLIP.fullmatch(stem)
        if not match or match["video"] not in videos:
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
    """COCO: annotations/*_SPLIT.json name the pictures and their licenses; pictures lie in SPLIT/ or images/SPLIT/.

    Of several annotation files of a split the lightest is read; `instances` where labels are asked for. A split of which no
    picture is there was not downloaded and is left out.
    """
    kinds = ("image_info", "captions", "person_keypoints", "instances")
    files: dict[str, list[str]] = {}
    for name in folder.matching(rf"annotations/({'|'.join(kinds)})_\w+\.json"):
        files.setdefault(name.removesuffix(".json").rsplit("_", 1)[-1], []).append(name)
    known = set(folder.names)
    order = kinds[::-1] if folder.labels else kinds
    for split, names in sorted(files.items()):
        if not folder.matching(rf"(images/)?{re.escape(split)}/.*") and not folder.matching(r"images/[^/]+"):
            continue
        chosen = min(names, key=lambda name: next(place for place, kind in enumerate(order) if f"/{kind}_" in name))
        content = json.loads(folder.read(chosen))
        licenses = {entry["id"]: entry.get("url") or entry.get("name") for entry in content.get("licenses", [])}
        labels = _coco_labels(content) if folder.labels else {}
        for image in content["images"]:
            file = str(image["file_name"])
            path = next(
                (place for place in (f"{split}/{file}", f"images/{split}/{file}", f"images/{file}") if place in known), None
            )
            yield {
                "file": path or f"{split}/{file}",
                "license": spdx(licenses.get(image.get("license"))),
                "author": None,
                "source": image.get("flickr_url") or image.get("coco_url"),
                "group": None,
                "split": split,
                "label": ", ".join(sorted(labels.get(image["id"], ()))),
            }


def _coco_labels(content: dict[str, Any]) -> dict[Any, set[str]]:
    names = {entry["id"]: entry["name"] for entry in content.get("categories", [])}
    found: dict[Any, set[str]] = {}
    for entry in content.get("annotations", []):
        if entry.get("category_id") in names:
            found.setdefault(entry["image_id"], set()).add(names[entry["category_id"]])
    return found
