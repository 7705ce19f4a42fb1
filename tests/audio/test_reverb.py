"""Rooms, and sounds in them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyroomacoustics import parameters

from pipeline_steps.audio.reverb import apply_reverb, decaying_noise_response, simulate_room_impulse_responses

RATE = 16_000
ROOMS = simulate_room_impulse_responses(4, RATE, 3)


def test_rooms_are_a_function_of_seed_and_number() -> None:
    again = simulate_room_impulse_responses(2, RATE, 3)
    assert all(np.array_equal(a, b) for a, b in zip(ROOMS, again, strict=False))
    other = simulate_room_impulse_responses(1, RATE, 4)[0]
    assert other.shape != ROOMS[0].shape or not np.array_equal(other, ROOMS[0])
    assert len({len(room) for room in ROOMS}) > 1


@pytest.mark.parametrize("threads", [1, 3])
def test_rooms_do_not_depend_on_the_number_of_cores(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(parameters._constants, "num_threads", threads)
    assert all(np.array_equal(a, b) for a, b in zip(ROOMS, simulate_room_impulse_responses(2, RATE, 3), strict=False))
    assert parameters.constants.get("num_threads") == threads, "as it was"


@pytest.mark.parametrize("number", range(4))
def test_a_room_begins_with_its_direct_path_and_dies_away(number: int) -> None:
    room = ROOMS[number].astype(np.float64)
    assert np.isfinite(room).all()
    assert room[0] == 1.0 == np.abs(room).max()
    tenths = [float((part**2).sum()) for part in np.array_split(room, 10)]
    assert all(later < earlier for earlier, later in itertools.pairwise(tenths))
    assert tenths[-1] < 1e-3 * tenths[0]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3), st.integers(0, 6000), st.floats(1e-3, 1.0))
def test_the_onset_stays_and_so_does_the_level(number: int, onset: int, level: float) -> None:
    dry = np.zeros(16_000)
    dry[onset] = level
    wet = apply_reverb(dry, ROOMS[number])
    assert len(wet) == len(dry)
    assert np.isfinite(wet).all()
    assert int(np.abs(wet).argmax()) == onset
    assert np.abs(wet[:onset]).max(initial=0.0) < 1e-9 * level
    assert np.dot(wet, wet) == pytest.approx(np.dot(dry, dry))
    assert np.count_nonzero(np.abs(wet) > 1e-6 * level) > 500, "there is a tail"


def test_silence_stays_silence() -> None:
    assert not apply_reverb(np.zeros(100), ROOMS[0]).any()


@pytest.mark.parametrize("t60", [0.3, 1.2, 3.0])
def test_noise_decays_by_60_db_in_its_time(t60: float) -> None:
    response = decaying_noise_response(t60, RATE, np.random.default_rng(0)).astype(np.float64)
    assert response[0] == 1.0
    decay = 10 * np.log10(np.cumsum(response[:0:-1] ** 2)[::-1])  # Schroeder 1965
    early, late = np.searchsorted(decay[0] - decay, [5.0, 25.0])
    assert 3 * (late - early) / RATE == pytest.approx(t60, rel=0.05), "T20"
    assert (response[1:] ** 2).sum() == pytest.approx(t60, rel=1e-3)
