"""Decoder functions for tests: they run inside the decoding processes in place of the real one."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import Any

from pipeline_steps.ingest.decoding.decode import DecodeJob, decode


def misbehave(task: str) -> dict[str, Any]:
    """Do what `task` says."""
    if task == "hang":
        time.sleep(3600)
    if task == "crash":
        ctypes.string_at(0)
    if task == "abort":
        os.abort()
    if task == "leave":
        os._exit(3)
    if task == "eat":
        held = [bytearray(64_000_000) for _ in range(1000)]
        return {"code": None, "reason": str(len(held))}
    if task == "raise":
        raise RuntimeError("a defect")
    if task == "write":
        with Path(os.environ["HOSTILE_TARGET"]).open("wb") as handle:
            handle.write(b"x" * 100_000)
            handle.flush()
    return {"code": None, "reason": task}


def measured(job: DecodeJob) -> dict[str, Any]:
    """The real decoder, and the largest resident size of this process so far in MB."""
    answer = dict(decode(job))
    answer["peak_mb"] = peak_mb()
    return answer


def peak_mb() -> float:
    """Largest resident size of this process so far in MB. getrusage would answer the parent's: exec does not reset it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def never(job: object) -> dict[str, Any]:
    """Answers every file with a code no real decoder gives for it, which proves that it was called."""
    return {"code": "DECODER_CRASH", "reason": "the decoder was called"}
