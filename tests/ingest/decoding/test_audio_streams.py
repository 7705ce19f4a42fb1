"""Odd audio files: all that can be decoded is decoded, what is left out is marked, what is not supported is not corrupt."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile

from pipeline_steps.ingest.decoding.audio import AudioLimits, normalize_audio
from pipeline_steps.ingest.file_signatures import check_format, read_head
from pipeline_steps.ingest.reason_codes import RejectedItemError
from tests.factories import odd_audio
from tests.factories.audio_streams import encode, flac, mp3, noise
from tests.factories.odd_audio import OddAudio

LIMITS = AudioLimits(min_seconds=0.1, max_seconds=60, min_lufs=-70)


def normalized(name: str, payload: bytes) -> dict:
    _, form = check_format(name, read_head(io.BytesIO(payload)), len(payload))
    return normalize_audio(io.BytesIO(payload), form, LIMITS)


@pytest.mark.parametrize("case", odd_audio.CASES, ids=lambda case: case.name)
def test_odd_audio(case: OddAudio) -> None:
    payload = case.build()
    if case.code:
        with pytest.raises(RejectedItemError) as error:
            normalized(case.name, payload)
        assert error.value.code == case.code, error.value
        return
    row = normalized(case.name, payload)
    assert row["duration_s"] == pytest.approx(case.seconds, abs=0.1)
    assert set(row["normalizations"]) == case.marks
    samples, _ = soundfile.read(io.BytesIO(row["payload"]))
    tail = samples[-round(0.4 * 48_000) : -round(0.15 * 48_000)]
    assert np.sqrt(np.mean(tail**2)) > 0.02, "the end of the recording is part of the samples"


def test_names_are_unique() -> None:
    names = [case.name for case in odd_audio.CASES]
    assert len(names) == len(set(names))
    assert len(names) > 100


def test_counted_frames_decode_to_the_samples_of_the_ordinary_file() -> None:
    """The same frames with and without an Info frame differ by the encoder's delay alone."""
    wave = noise(2)
    with_info, _ = soundfile.read(io.BytesIO(normalized("a.mp3", mp3(wave))["payload"]))
    without, _ = soundfile.read(io.BytesIO(normalized("a.mp3", mp3(wave, info=False))["payload"]))
    delay = 1105
    assert np.abs(without[delay : delay + len(with_info)] - with_info).max() < 2**-13


def test_flac_from_a_pipe_has_the_samples_of_the_finished_file() -> None:
    wave = noise(1)
    assert normalized("a.flac", flac(wave, 24, declared=0))["payload"] == normalized("a.flac", flac(wave, 24))["payload"]


def test_unfinished_header_has_the_samples_of_the_finished_file() -> None:
    payload = encode(noise(1), "WAV", "PCM_16")
    unfinished = odd_audio.patched(payload, (4, 0), (payload.find(b"data") + 4, 0))
    assert normalized("a.wav", unfinished)["payload"] == normalized("a.wav", payload)["payload"]


@pytest.mark.parametrize("name", ["x.webp", "x.jpg"])
def test_random_bytes_named_as_an_image_are_no_mp3(name: str) -> None:
    payload = b"\xff\xfb\x90\x64" + np.random.default_rng(0).bytes(500)
    with pytest.raises(RejectedItemError, match=f"NOT_AN_IMAGE: named .{name[2:]}, content is unknown"):
        check_format(name, payload, len(payload))
