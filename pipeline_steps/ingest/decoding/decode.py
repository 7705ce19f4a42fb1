"""What runs inside a decoding process, one file at a time. Only here, and in `listing`, are untrusted bytes parsed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from pipeline_steps.core.safe_paths import UnsafePathError, digest_file, open_regular_file
from pipeline_steps.ingest.catalog import ArchiveMember
from pipeline_steps.ingest.decoding.audio import AudioLimits, normalise_sound
from pipeline_steps.ingest.decoding.image import ImageLimits, normalise_picture
from pipeline_steps.ingest.reason_codes import RejectedItemError
from pipeline_steps.ingest.sources.archive_members import open_member

VERSION = 1
"""Raise it whenever the normal form or a measurement changes: it is part of the memo's fingerprint."""

PRELOAD = ("pipeline_steps.ingest.decoding.decode", "imagehash", "pyloudnorm", "scipy.fftpack")
"""What a decoding process imports before its memory is bounded."""


class DecodeJob(NamedTuple):
    """One file to decode. `relative` has no link left in it; `sha256` is what the parent hashed."""

    root: str
    relative: str
    sha256: str
    kind: str
    format: str
    picture: ImageLimits
    sound: AudioLimits
    member: ArchiveMember | None = None


def decode(job: DecodeJob) -> dict[str, Any]:
    """Decode one file into a memo row: `code` is None and the payload there, or `code` and `reason` say why not.

    A MemoryError is let through: it says nothing about the file that would hold on a larger machine.
    """
    try:
        with open_regular_file(Path(job.root), job.relative) as whole:
            handle = whole if job.member is None else open_member(whole, job.member, job.relative)
            if digest_file(handle).sha256 != job.sha256:
                raise RejectedItemError("FILE_CHANGED", "the bytes changed between hashing and decoding; run again")
            if job.kind == "image":
                row = normalise_picture(handle.read(), job.format, job.picture)
            else:
                row = normalise_sound(handle, job.format, job.sound)
    except (RejectedItemError, UnsafePathError) as error:
        return {"code": error.code, "reason": error.reason}
    except OSError as error:
        return {"code": "FILE_UNREADABLE", "reason": f"reading failed: {error.strerror or error}"}
    return {"code": None, "reason": None, **row}
