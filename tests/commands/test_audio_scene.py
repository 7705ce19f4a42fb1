"""Audio scenes: gains, rooms at equal loudness, sweeps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline_steps.audio.loudness import integrated_loudness
from pipeline_steps.commands.audio_scene import (
    SWEEP_GAINS_DB,
    AudioScene,
    Room,
    SceneSound,
    SweptSetting,
    apply_room,
)
from pipeline_steps.core.media_shards import SAMPLE_RATE as RATE

TONE = (0.1 * np.sin(2 * np.pi * 440 * np.arange(2 * RATE) / RATE)).astype(np.float32)
BURSTS = np.random.default_rng(0).normal(0, 0.05, 2 * RATE).astype(np.float32) * (np.arange(2 * RATE) % RATE < RATE // 4)
ROOMS = [Room.SMALL_ROOM, Room.HALL, Room.CHURCH]


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("samples", [TONE, BURSTS], ids=["tone", "bursts"])
def test_a_room_keeps_the_loudness_and_adds_its_tail(samples: np.ndarray, room: Room) -> None:
    wet = apply_room(samples, room)
    assert wet.dtype == np.float32
    assert len(wet) - len(samples) == round(room.reverberation_seconds * RATE) - 1
    assert integrated_loudness(wet, RATE) == pytest.approx(integrated_loudness(samples, RATE), abs=0.1)
    assert np.abs(wet[len(samples) :]).max() > 0
    assert np.array_equal(wet, apply_room(samples, room)), "the same room at every call"


def test_no_room_changes_nothing_and_silence_stays_silent() -> None:
    assert apply_room(TONE, Room.NONE) is TONE
    assert not apply_room(np.zeros(RATE, np.float32), Room.HALL).any()


def test_gains_are_decibels_and_the_first_sound_determines_the_length() -> None:
    short = SceneSound("noise", BURSTS[:RATE], -6.0)
    mixed = AudioScene((SceneSound("tone", TONE, 0.0), short)).waveform()
    assert len(mixed) == len(TONE)
    assert np.allclose(mixed, TONE + np.tile(BURSTS[:RATE], 2) * 10 ** (-6 / 20), atol=1e-6)
    assert np.abs(AudioScene((SceneSound("tone", TONE, 24.0),)).waveform()).max() == 1.0, "limited to full scale"


def test_the_tracks_are_the_sounds_at_their_gains_and_add_up_to_the_mixture() -> None:
    scene = AudioScene((SceneSound("tone", TONE, -3.0), SceneSound("noise", BURSTS[:RATE], -6.0)), Room.NONE)
    tracks = scene.tracks()
    assert [len(track) for track in tracks] == [len(TONE)] * 2
    assert all(track.dtype == np.float32 for track in tracks)
    assert np.allclose(sum(tracks), scene.waveform(), atol=1e-6)
    assert all(map(np.array_equal, tracks, replace(scene, room=Room.HALL).tracks())), "without the room"


def test_a_sweep_of_gains_changes_the_last_sound_alone() -> None:
    scene = AudioScene((SceneSound("a", TONE, -1.0), SceneSound("b", BURSTS, -6.0)), Room.HALL)
    rows = scene.sweep(SweptSetting.GAIN)
    assert [row.sounds[1].gain_db for _, row in rows] == [gain - 6 for gain in SWEEP_GAINS_DB]
    assert [label for label, _ in rows] == ["-30 dB", "-24 dB", "-18 dB", "-12 dB", "-6 dB", "0 dB"]
    assert all(row.sounds[0] == scene.sounds[0] and row.room is Room.HALL for _, row in rows)


def test_a_sweep_of_rooms_has_them_all() -> None:
    scene = AudioScene((SceneSound("a", TONE),))
    assert [(label, row.room) for label, row in scene.sweep(SweptSetting.ROOM)] == [(room.value, room) for room in Room]
    assert scene.sweep(SweptSetting.ROOM)[0][1] == scene
