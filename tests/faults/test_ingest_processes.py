"""Rows A6, A13, B8 and B12: decoding processes that hang, die or exhaust memory; mutated files; memory limits."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from soundfile import write

from pipeline_steps.ingest.candidates import CandidateFile
from pipeline_steps.ingest.config import IngestConfig
from pipeline_steps.ingest.decoding.decode import PRELOAD, DecodeJob, decode
from pipeline_steps.ingest.reason_codes import CODES
from pipeline_steps.ingest.sources.file_walk import inspect_file
from pipeline_steps.ingest.stage import build_decode_job
from pipeline_steps.ingest.worker_pool import WorkerLimits, WorkerPool
from tests.faults.corpus import CASES, bit_png, encoded, gradient, noise, three_hours, tone
from tests.faults.hostile_decoders import measured, misbehave

pytestmark = pytest.mark.fault
MEMORY = 2_048_000_000


def job(path: Path) -> DecodeJob:
    file = inspect_file(path.parent, path.name, None, 1e9, walked=False)
    assert isinstance(file, CandidateFile), file
    return build_decode_job(IngestConfig(), file)


def test_a13_only_the_bad_job_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "written"
    monkeypatch.setenv("HOSTILE_TARGET", str(target))
    tasks = ["fine-1", "hang", "fine-2", "crash", "abort", "fine-3", "eat", "leave", "fine-4", "raise", "write", "fine-5"]
    start = time.monotonic()
    with WorkerPool(WorkerLimits(2, 4, 640_000_000), misbehave) as workers:
        answers = dict(workers.map((task, task) for task in tasks))
    assert {task for task in tasks if answers[task]["code"] is None} == {task for task in tasks if task.startswith("fine")}
    assert answers["hang"]["code"] == "DECODER_TIMEOUT"
    assert answers["eat"]["code"] == "DECODER_MEMORY"
    for task in ("crash", "abort", "leave", "raise", "write"):
        assert answers[task]["code"] == "DECODER_CRASH", answers[task]
    assert "SIGSEGV" in answers["crash"]["reason"]
    assert "SIGABRT" in answers["abort"]["reason"]
    assert not target.exists() or target.stat().st_size == 0  # a worker cannot write files
    assert time.monotonic() - start < 60


def test_a6_and_b8_memory_is_bounded(tmp_path: Path) -> None:
    bit_png(20_000)(tmp_path / "bomb-1-bit.png")
    bit_png(12_000)(tmp_path / "bomb-144.png")
    three_hours(tmp_path / "long.flac")
    with WorkerPool(WorkerLimits(1, 60, MEMORY), measured, PRELOAD) as workers:
        answers = dict(workers.map((name, job(tmp_path / name)) for name in ("bomb-1-bit.png", "bomb-144.png", "long.flac")))
    assert [answer["code"] for answer in answers.values()] == ["IMG_BOMB", "IMG_BOMB", "AUD_TOO_LONG"]
    assert max(answer["peak_mb"] for answer in answers.values()) < 300


def test_b8_long_audio_is_read_in_blocks(tmp_path: Path) -> None:
    """The file does not declare its length, so the limit is reached while reading."""
    next(case for case in CASES if case.name == "unknown-length.flac").make(tmp_path / "unknown.flac")
    with WorkerPool(WorkerLimits(1, 60, MEMORY), measured, PRELOAD) as workers:
        _, answer = next(iter(workers.map([("unknown", job(tmp_path / "unknown.flac"))])))
    assert answer["code"] == "AUD_TOO_LONG"
    assert answer["peak_mb"] < 300


def seeds() -> dict[str, bytes]:
    """Twenty complete files of all allowed formats and several subtypes."""

    def clip(form: str, subtype: str | None, number: int) -> bytes:
        buffer = io.BytesIO()
        write(buffer, tone(0.3) if number % 2 else noise(0.3, seed=number), 48_000, format=form, subtype=subtype)
        return buffer.getvalue()

    small = gradient(40, 32)
    files = {
        f"p{number}.{form.lower()}": encoded(small, form)
        for number, form in enumerate(("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"))
    }
    files["p6.jpg"] = encoded(small, "JPEG", "CMYK")
    files["p7.png"] = encoded(small, "PNG", "P")
    files["p8.webp"] = encoded(small, "WEBP", lossless=True)
    files["p9.tiff"] = encoded(small, "TIFF", compression="tiff_lzw")
    forms = [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "ULAW"), ("WAV", "PCM_24"), ("FLAC", "PCM_16"), ("FLAC", "PCM_24"),
             ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None), ("AIFF", "PCM_16")]  # fmt: skip
    files |= {f"s{number}.{form.lower()}": clip(form, subtype, number) for number, (form, subtype) in enumerate(forms)}
    return files


SEEDS = seeds()
EXAMPLES = int(os.environ.get("SONIFY_MUTATIONS", "100"))


@pytest.fixture(scope="module")
def workers() -> Iterator[WorkerPool]:
    with WorkerPool(WorkerLimits(1, 20, MEMORY), decode, PRELOAD) as pool:
        yield pool


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, bytes]:
    """Seed file with bytes changed, removed, repeated or truncated, mostly in the header."""
    name = draw(st.sampled_from(sorted(SEEDS)))
    payload = bytearray(SEEDS[name])
    for _ in range(draw(st.integers(1, 12))):
        reach = draw(st.sampled_from([64, 512, len(payload)]))
        place = draw(st.integers(0, max(0, min(reach, len(payload)) - 1)))
        what = draw(st.sampled_from(["set", "set", "set", "word", "cut", "remove", "repeat"]))
        if what == "set":
            payload[place : place + 1] = bytes([draw(st.integers(0, 255))])
        elif what == "word":
            payload[place : place + 4] = draw(
                st.sampled_from([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"])
            )
        elif what == "cut":
            del payload[max(place, 1) :]
        elif what == "remove":
            del payload[place : place + draw(st.integers(1, 16))]
        else:
            payload[place:place] = payload[place : place + draw(st.integers(1, 64))]
        if not payload:
            payload = bytearray(b"\x00")
    return name, bytes(payload)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES <= 100)
@given(case=mutated())
def test_b12_mutated_files_are_accepted_or_quarantined(
    case: tuple[str, bytes], workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    name, payload = case
    folder = tmp_path_factory.getbasetemp() / "mutated"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(payload)
    file = inspect_file(folder, name, None, 1e9, walked=False)
    if not isinstance(file, CandidateFile):
        assert not isinstance(file, str)
        assert file.code in CODES
        return
    _, answer = next(iter(workers.map([(file.item_id, build_decode_job(IngestConfig(), file))])))
    if answer["code"] is None:
        assert answer["payload"]
    else:
        assert answer["code"] in CODES
        assert answer["reason"]
