"""Archives and tables full of media -> candidates for the catalog. Runs in decoding processes, one archive at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline_steps.core.hashing import sha256_bytes
from pipeline_steps.core.safe_paths import (
    UnsafePathError,
    check_encoding,
    display_path,
    open_regular_file,
    validate_relative_path,
)
from pipeline_steps.ingest.catalog import ArchiveMember, CandidateFile, RejectedFile
from pipeline_steps.ingest.file_signatures import check_format, extension, has_media_name, is_candidate, kind_of_name
from pipeline_steps.ingest.license_ids import spdx
from pipeline_steps.ingest.reason_codes import RejectedItemError
from pipeline_steps.ingest.sources.archive_members import SIDE_CAR, MemberPayload, arrow_records, parquet_records, tar_members
from pipeline_steps.ingest.sources.dataset_layouts import infer_split
from pipeline_steps.ingest.sources.metadata_table import matches_filter

LICENSE = ("license", "licence", "license_url", "licence_url", "license_name")
AUTHOR = ("author", "creator", "uploader", "artist", "photographer", "credit")
SOURCE = ("source", "url", "image_url", "audio_url", "source_url")
GROUP = ("group", "group_id", "recording", "recording_id", "src_file", "ytid", "video_id", "youtube_id")
SPLIT = ("split", "subset", "fold")
LABEL = ("label", "labels", "category", "class", "caption", "text", "cls", "txt")
ABOUT = frozenset((*LICENSE, *AUTHOR, *SOURCE, *GROUP, *SPLIT))


class ArchiveJob(NamedTuple):
    """An archive to list. `license` is that of the whole data set; `pool` and `holdout` are filters on `split`."""

    root: str
    relative: str
    license: str | None
    pool: dict[str, tuple[str, ...]] | None
    holdout: dict[str, tuple[str, ...]] | None
    max_picture_bytes: float
    labels: bool = False


class _Sample(NamedTuple):
    key: str
    about: Mapping[str, Any]
    parts: dict[str, MemberPayload | RejectedItemError | None]


def list_archive(job: ArchiveJob) -> dict[str, Any]:
    """Candidates of one archive; runs in a decoding process.

    Returns:
        {"files": [File...], "refused": [Refused...], "ignored": rows in neither filter, "labels": rows of ground truth}.
        An archive that breaks off is refused by itself; what came before it is kept.
    """
    files: list[CandidateFile] = []
    refused: list[RejectedFile] = []
    labels: list[dict[str, str]] = []
    ignored = 0
    shown = display_path(job.relative)
    try:
        with open_regular_file(Path(job.root), job.relative) as handle:
            for sample in _samples(handle, job):
                split = _first_non_empty(sample.about, SPLIT) or infer_split(job.relative)
                holdout = matches_filter({"split": split}, job.holdout)
                if not holdout and job.pool is not None and not matches_filter({"split": split}, job.pool):
                    ignored += 1
                    continue
                for name, part in sample.parts.items():
                    found = _candidate(job, name, part, sample.about, holdout)
                    (files if isinstance(found, CandidateFile) else refused).append(found)  # type: ignore[arg-type]
                    if job.labels and isinstance(found, CandidateFile):
                        label = _first_non_empty(sample.about, LABEL) or ""
                        kind = "image" if found.kind == "image" else "sound"
                        pair = f"{job.relative}/{sample.key}" if len(sample.parts) > 1 else ""
                        labels.append({"kind": kind, "file": found.shown, "label": label, "split": split, "pair": pair})
    except RejectedItemError as error:
        refused.append(RejectedFile(shown, "unknown", error.code, error.reason))
    except UnsafePathError as error:
        refused.append(RejectedFile(shown, "unknown", error.code, error.reason))
    except OSError as error:
        refused.append(RejectedFile(shown, "unknown", "FILE_UNREADABLE", f"reading failed: {error.strerror or error}"))
    return {"files": files, "refused": refused, "ignored": ignored, "labels": labels}


def _candidate(
    job: ArchiveJob, inner: str, part: MemberPayload | RejectedItemError | None, about: Mapping[str, Any], holdout: bool
) -> CandidateFile | RejectedFile:
    name = f"{job.relative}/{inner}"
    shown = display_path(name)
    if part is None:
        return RejectedFile(shown, "unknown", "NOT_EMBEDDED", "the row holds no bytes; nothing is downloaded")
    if isinstance(part, RejectedItemError):
        return RejectedFile(shown, kind_of_name(name), part.code, part.reason)
    digest = sha256_bytes(part.payload)
    try:
        check_encoding(name)
        validate_relative_path(inner)
        kind, form = check_format(part.member.name, part.payload[:512], len(part.payload))
        if kind == "image" and len(part.payload) > job.max_picture_bytes:
            size, limit = len(part.payload) / 1e6, job.max_picture_bytes / 1e6
            raise RejectedItemError("FILE_TOO_LARGE", f"{size:.1f} MB, limit {limit:g} MB")
    except (RejectedItemError, UnsafePathError) as error:
        return RejectedFile(shown, kind_of_name(name), error.code, error.reason, len(part.payload), digest[:32])
    return CandidateFile(
        job.relative, shown, digest, len(part.payload), kind, form,
        spdx(_first_non_empty(about, LICENSE)) or job.license,
        _first_non_empty(about, AUTHOR), _first_non_empty(about, SOURCE), _first_non_empty(about, GROUP),
        holdout, part.member,
    )  # fmt: skip


def _samples(handle: Any, job: ArchiveJob) -> Iterator[_Sample]:
    suffix = extension(job.relative)
    if suffix == "tar":
        yield from _tar_samples(handle, job.labels)
        return
    others = frozenset(ABOUT | frozenset(LABEL)) if job.labels else ABOUT
    read = arrow_records if suffix == "arrow" else parquet_records
    for record in read(handle, others):
        about = {name.lower(): value for name, value in record.values.items()}
        parts: dict[str, MemberPayload | RejectedItemError | None] = {}
        for column, part in record.parts.items():
            inner = part.member.name.rsplit("/", 1)[-1] if part else ""
            parts[f"{record.number:08d}/{column}{'/' + inner if inner else ''}"] = part
        yield _Sample(f"{record.number:08d}", about, parts)


def _tar_samples(handle: Any, labels: bool) -> Iterator[_Sample]:
    """Samples of a WebDataset tar: members that share the name up to the first dot of its last part, one after the other."""
    current = ""
    about: dict[str, Any] = {}
    parts: dict[str, MemberPayload | RejectedItemError | None] = {}

    def sample() -> _Sample:
        return _Sample(current, dict(about), dict(parts))

    try:
        for name, found in tar_members(handle):
            folder, _, base = name.rpartition("/")
            key = f"{folder}/{base.split('.', 1)[0]}" if folder else base.split(".", 1)[0]
            if key != current:
                if parts:
                    yield sample()
                current, about, parts = key, {}, {}
            if isinstance(found, RejectedItemError):
                parts[name] = found
            elif has_media_name(name) or is_candidate(name, found.payload[:512]):
                parts[name] = found._replace(member=ArchiveMember(base, found.member.offset, found.member.size))
            else:
                about.update(_side_car(name, found.payload, labels))
    except RejectedItemError:
        if parts:
            yield sample()
        raise
    if parts:
        yield sample()


def _side_car(name: str, payload: bytes, labels: bool) -> dict[str, Any]:
    """What a text beside the media says: a JSON object's known keys; label and caption only for ground truth."""
    suffix = extension(name)
    if len(payload) > SIDE_CAR:
        return {}
    try:
        if suffix == "json":
            value = json.loads(payload)
            wanted = ABOUT | frozenset(LABEL) if labels else ABOUT
            return (
                {key.lower(): inner for key, inner in value.items() if key.lower() in wanted} if isinstance(value, dict) else {}
            )
        if labels and suffix in {"cls", "txt", "caption", "label"}:
            return {"label": payload.decode("utf-8").strip()}
    except (ValueError, RecursionError):
        return {}
    return {}


def _first_non_empty(about: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The first of the named values that says something, as one line."""
    for name in names:
        value = about.get(name)
        if isinstance(value, (str, int)) and not isinstance(value, bool) and str(value).strip():
            return " ".join(str(value).split())[:500]
    return None
