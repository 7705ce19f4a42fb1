"""Decoding job of one file. Only workers run it; here and in `sources` they are the only code that parses untrusted bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from pipeline_steps.core.safe_paths import UnsafePathError, digest_file, open_regular_file
from pipeline_steps.ingest.candidates import ArchiveMember
from pipeline_steps.ingest.decoding.audio import AudioLimits, normalize_audio
from pipeline_steps.ingest.decoding.image import ImageLimits, normalize_image
from pipeline_steps.ingest.reason_codes import RejectedItemError
from pipeline_steps.ingest.sources.archive_members import open_member

VERSION = 2
"""Part of the cache fingerprint; raise it whenever the normal form or a measurement changes."""

PRELOAD = ("pipeline_steps.ingest.decoding.decode", "imagehash", "pyloudnorm", "scipy.fftpack")
"""Modules that a worker imports before its memory is limited."""


class DecodeJob(NamedTuple):
    """File to decode. `relative` contains no links; `sha256` is the hash at discovery."""

    root: str
    relative: str
    sha256: str
    format: str
    limits: ImageLimits | AudioLimits
    member: ArchiveMember | None = None


def decode(job: DecodeJob) -> dict[str, Any]:
    """Decode one file into a cache row: payload and measurements with `code` None, or `code` and `reason` of its rejection.

    Raises:
        MemoryError: the limit was reached. It does not reject the file, because a larger limit may suffice.
    """
    try:
        with open_regular_file(Path(job.root), job.relative) as file:
            handle = file if job.member is None else open_member(file, job.member, job.relative)
            if digest_file(handle).sha256 != job.sha256:
                raise RejectedItemError("FILE_CHANGED", "the bytes changed between hashing and decoding; run again")
            if isinstance(job.limits, ImageLimits):
                row = normalize_image(handle.read(), job.format, job.limits)
            else:
                row = normalize_audio(handle, job.format, job.limits)
    except (RejectedItemError, UnsafePathError) as error:
        return {"code": error.code, "reason": error.reason}
    except OSError as error:
        return {"code": "FILE_UNREADABLE", "reason": f"reading failed: {error.strerror or error}"}
    return {"code": None, "reason": None, **row}
