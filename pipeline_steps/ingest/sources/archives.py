"""Candidates from archives and tables that contain media. Runs in decoding processes, one archive at a time."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pipeline_steps.core.hashing import ID_LENGTH, sha256_bytes
from pipeline_steps.core.safe_paths import (
    UnsafePathError,
    check_encoding,
    display_path,
    open_regular_file,
    validate_relative_path,
)
from pipeline_steps.ingest.candidates import CandidateFile, RejectedFile
from pipeline_steps.ingest.file_signatures import (
    check_format,
    extension,
    has_media_extension,
    is_candidate,
    kind_from_extension,
    read_head,
)
from pipeline_steps.ingest.license_ids import spdx_id
from pipeline_steps.ingest.reason_codes import RejectedItemError
from pipeline_steps.ingest.sources.archive_members import (
    MAX_SIDECAR_BYTES,
    MemberPayload,
    arrow_records,
    parquet_records,
    tar_members,
)
from pipeline_steps.ingest.sources.dataset_layouts import combined_license, infer_split, is_datasets_cache, read_dataset_license
from pipeline_steps.ingest.sources.metadata_table import RowFilter, join_texts, matches_filter

LICENSE = ("license", "licence", "license_url", "licence_url", "license_name")
AUTHOR = ("author", "creator", "uploader", "artist", "photographer", "credit")
SOURCE = ("source", "url", "image_url", "audio_url", "source_url")
STATUS = ("status",)
GROUP = ("group", "group_id", "recording", "recording_id", "src_file", "ytid", "video_id", "youtube_id")
SPLIT = ("split", "subset", "fold")
LABEL = ("label", "labels", "category", "class", "caption", "text", "cls", "txt")
METADATA_KEYS = frozenset((*LICENSE, *AUTHOR, *SOURCE, *GROUP, *SPLIT, *STATUS))
LABEL_KEYS = METADATA_KEYS | frozenset(LABEL)

_LABEL_SEPARATORS = re.compile(r"[/\\\x00]")
"""Separators in the path that a row states; only the part behind the last one is used."""

Payload = MemberPayload | RejectedItemError | None
"""Member with its bytes, the reason why it was rejected, or None for a table cell without bytes."""


class ArchiveJob(NamedTuple):
    """Archive to list in a worker.

    `cards` may name the license of the data set; `pool` and `holdout` filter by `split`; `text` are the keys with words.
    """

    root: str
    relative: str
    cards: tuple[str, ...]
    pool: RowFilter | None
    holdout: RowFilter | None
    max_image_bytes: float
    labels: bool = False
    text: tuple[str, ...] = ()

    @property
    def keys(self) -> frozenset[str]:
        """Keys of a sample's metadata that are read."""
        return (LABEL_KEYS if self.labels else METADATA_KEYS) | set(self.text)


class _Sample(NamedTuple):
    """Media of one sample (name -> payload) and the metadata that applies to all of them."""

    key: str
    metadata: Mapping[str, Any]
    payloads: dict[str, Payload]


def list_archive(job: ArchiveJob) -> dict[str, Any]:
    """Candidates of one archive; runs in a worker.

    Returns:
        {"files": [CandidateFile...], "rejected": [RejectedFile...], "filtered": samples in neither filter, "skipped": kind ->
        members or files that are no data, "labels": rows of ground truth}. A truncated archive is rejected itself, and its
        members before the damage are kept.
    """
    files: list[CandidateFile] = []
    rejected: list[RejectedFile] = []
    labels: list[dict[str, str]] = []
    filtered = 0
    skipped: Counter[str] = Counter()
    displayed = display_path(job.relative)
    license = read_dataset_license(job.root, job.cards)
    try:
        if is_datasets_cache(job.root, job.relative):
            return {"files": [], "rejected": [], "filtered": 0, "skipped": {"cache of datasets": 1}, "labels": []}
        with open_regular_file(Path(job.root), job.relative) as handle:
            for sample in _samples(handle, job, skipped):
                split = _first_non_empty(sample.metadata, SPLIT) or infer_split(job.relative)
                holdout = matches_filter({"split": split}, job.holdout)
                if not holdout and job.pool is not None and not matches_filter({"split": split}, job.pool):
                    filtered += 1
                    continue
                for name, payload in sample.payloads.items():
                    found = _candidate(job, name, payload, sample.metadata, holdout, license)
                    if isinstance(found, RejectedFile):
                        rejected.append(found)
                        continue
                    files.append(found)
                    if job.labels:
                        label = _first_non_empty(sample.metadata, LABEL) or ""
                        kind = "image" if found.kind == "image" else "sound"
                        pair = f"{job.relative}/{sample.key}" if len(sample.payloads) > 1 else ""
                        labels.append({"kind": kind, "file": found.path, "label": label, "split": split, "pair": pair})
    except (RejectedItemError, UnsafePathError) as error:
        rejected.append(RejectedFile(displayed, "unknown", error.code, error.reason))
    except OSError as error:
        rejected.append(RejectedFile(displayed, "unknown", "FILE_UNREADABLE", f"reading failed: {error.strerror or error}"))
    return {"files": files, "rejected": rejected, "filtered": filtered, "skipped": dict(skipped), "labels": labels}


def _candidate(
    job: ArchiveJob, inner: str, payload: Payload, metadata: Mapping[str, Any], holdout: bool, license: str | None
) -> CandidateFile | RejectedFile:
    name = f"{job.relative}/{inner}"
    displayed = display_path(name)
    if payload is None:
        status = _first_non_empty(metadata, STATUS)
        if status and status.lower() not in {"success", "ok"}:
            return RejectedFile(displayed, "unknown", "NOT_DOWNLOADED", f"the row's status is {status}")
        return RejectedFile(displayed, "unknown", "NOT_EMBEDDED", "the row holds no bytes; nothing is downloaded")
    if isinstance(payload, RejectedItemError):
        return RejectedFile(displayed, kind_from_extension(name), payload.code, payload.reason)
    member, content = payload
    digest = sha256_bytes(content)
    try:
        check_encoding(name)
        validate_relative_path(inner.replace("\\", "/"))  # the name is a label, never opened; Windows writes backslashes
        kind, form = check_format(member.name, read_head(io.BytesIO(content)), len(content), job.max_image_bytes)
    except (RejectedItemError, UnsafePathError) as error:
        return RejectedFile(displayed, kind_from_extension(name), error.code, error.reason, len(content), digest[:ID_LENGTH])
    return CandidateFile(
        job.root, job.relative, displayed, digest, len(content), kind, form,
        _row_license(metadata) or license,
        _first_non_empty(metadata, AUTHOR), _first_non_empty(metadata, SOURCE), _first_non_empty(metadata, GROUP),
        holdout, member, join_texts(metadata.get(name) for name in job.text),
    )  # fmt: skip


def _row_license(metadata: Mapping[str, Any]) -> str | None:
    """License of a row; all of several apply."""
    value = next((metadata[name] for name in LICENSE if metadata.get(name)), None)
    return combined_license(value) if isinstance(value, list) else spdx_id(_first_non_empty(metadata, LICENSE))


def _samples(handle: BinaryIO, job: ArchiveJob, skipped: Counter[str]) -> Iterator[_Sample]:
    suffix = extension(job.relative)
    if suffix == "tar":
        yield from _tar_samples(handle, job, skipped)
        return
    read = arrow_records if suffix == "arrow" else parquet_records
    for record in read(handle, job.keys):
        key = f"{record.number:08d}"
        payloads: dict[str, Payload] = {}
        for column, payload in record.payloads.items():
            base = _LABEL_SEPARATORS.split(payload.member.name)[-1].strip() if payload else ""
            payloads[f"{key}/{column}{'/' + base if base not in {'', '.', '..'} else ''}"] = payload
        yield _Sample(key, {name.lower(): value for name, value in record.values.items()}, payloads)


def _tar_samples(handle: BinaryIO, job: ArchiveJob, skipped: Counter[str]) -> Iterator[_Sample]:
    """Samples of a WebDataset tar: consecutive members with the same path up to the first dot of the file name.

    Hidden members are counted in `skipped`; macOS adds one (`._NAME`) for each file.
    """
    sample = _Sample("", {}, {})
    try:
        for name, found in tar_members(handle):
            folder, _, base = name.rpartition("/")
            if base.startswith("."):
                skipped["hidden"] += 1
                continue
            key = f"{folder}/{base.split('.', 1)[0]}" if folder else base.split(".", 1)[0]
            if key != sample.key:
                if sample.payloads:
                    yield sample
                sample = _Sample(key, {}, {})
            if isinstance(found, RejectedItemError):
                sample.payloads[name] = found
            elif has_media_extension(name) or is_candidate(name, read_head(io.BytesIO(found.payload))):
                sample.payloads[name] = found._replace(member=found.member._replace(name=base))
            else:
                sample = sample._replace(metadata={**sample.metadata, **_read_sidecar(name, found.payload, job)})
    except RejectedItemError:
        if sample.payloads:
            yield sample
        raise
    if sample.payloads:
        yield sample


def _read_sidecar(name: str, payload: bytes, job: ArchiveJob) -> dict[str, Any]:
    """Metadata from a text member: keys of a JSON object; a plain text only for ground truth, or if `job.text` names it."""
    suffix = extension(name)
    if len(payload) > MAX_SIDECAR_BYTES:
        return {}
    try:
        if suffix == "json":
            value = json.loads(payload)
            return (
                {key.lower(): inner for key, inner in value.items() if key.lower() in job.keys}
                if isinstance(value, dict)
                else {}
            )
        if suffix in job.text or (job.labels and suffix in {"cls", "txt", "caption", "label"}):
            return {"label" if job.labels else suffix: payload.decode("utf-8").strip()}
    except (ValueError, RecursionError):
        return {}
    return {}


def _first_non_empty(metadata: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """First of the named values that is not empty, as one line."""
    for name in names:
        value = metadata.get(name)
        if isinstance(value, (str, int)) and not isinstance(value, bool) and str(value).strip():
            return " ".join(str(value).split())[:500]
    return None
