"""What runs inside a decoding process, one file at a time. Only here, and in `listing`, are untrusted bytes parsed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from pipeline_steps.core.rawfiles import RawFileError, glance, open_plain
from pipeline_steps.ingest.codes import RejectedError
from pipeline_steps.ingest.members import Member, take
from pipeline_steps.ingest.picture import PictureLimits, normalise_picture
from pipeline_steps.ingest.sound import SoundLimits, normalise_sound

VERSION = 1
"""Raise it whenever the normal form or a measurement changes: it is part of the memo's fingerprint."""

PRELOAD = ("pipeline_steps.ingest.decode", "imagehash", "pyloudnorm", "scipy.fftpack")
"""What a decoding process imports before its memory is bounded."""


class Job(NamedTuple):
    """One file to decode. `relative` has no link left in it; `sha256` is what the parent hashed."""

    root: str
    relative: str
    sha256: str
    kind: str
    format: str
    picture: PictureLimits
    sound: SoundLimits
    member: Member | None = None


def decode(job: Job) -> dict[str, Any]:
    """Decode one file into a memo row: `code` is None and the payload there, or `code` and `reason` say why not.

    A MemoryError is let through: it says nothing about the file that would hold on a larger machine.
    """
    try:
        with open_plain(Path(job.root), job.relative) as whole:
            handle = whole if job.member is None else take(whole, job.member, job.relative)
            if glance(handle).sha256 != job.sha256:
                raise RejectedError("FILE_CHANGED", "the bytes changed between hashing and decoding; run again")
            if job.kind == "image":
                row = normalise_picture(handle.read(), job.format, job.picture)
            else:
                row = normalise_sound(handle, job.format, job.sound)
    except (RejectedError, RawFileError) as error:
        return {"code": error.code, "reason": error.reason}
    except OSError as error:
        return {"code": "FILE_UNREADABLE", "reason": f"reading failed: {error.strerror or error}"}
    return {"code": None, "reason": None, **row}
