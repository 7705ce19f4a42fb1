"""Decoder functions for tests, run in workers in place of the real one."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import Any

from pipeline_steps.ingest.decoding.decode import DecodeJob, decode


def misbehave(task: str) -> dict[str, Any]:
    """Misbehave in the way that `task` names."""
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
    """Result of the real decoder, with the peak resident size of this process in MB."""
    return {**decode(job), "peak_mb": peak_mb()}


def peak_mb() -> float:
    """Peak resident size of this process in MB. getrusage would return the parent's, because exec does not reset it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def always_crash(job: object) -> dict[str, Any]:
    """Return a code that no real decoder returns, which shows that a decoder was called."""
    return {"code": "DECODER_CRASH", "reason": "the decoder was called"}
