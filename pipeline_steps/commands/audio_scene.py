"""Audio scene: sounds mixed with their gains in a room. Numpy is imported inside the functions, as in all commands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline_steps.core.array_types import FloatArray

MIN_GAIN_DB, MAX_GAIN_DB = -60.0, 24.0
SWEEP_GAINS_DB = (-24.0, -18.0, -12.0, -6.0, 0.0, 6.0)
"""Gains of a sweep, relative to the gain of the last sound."""


class Room(StrEnum):
    """Simulated rooms."""

    NONE = "none"
    SMALL_ROOM = "small-room"
    HALL = "hall"
    CHURCH = "church"

    @property
    def reverberation_seconds(self) -> float:
        """T60: time in which the tail decays by 60 dB; 0 without a room."""
        from pipeline_steps.audio.reverb import REVERBERATION_SECONDS

        return REVERBERATION_SECONDS.get(self.value.replace("-", " "), 0.0)


class SweptSetting(StrEnum):
    """Setting of a scene that a sheet varies from row to row."""

    GAIN = "gain"
    ROOM = "room"


@dataclass(frozen=True, slots=True)
class SceneSound:
    """One sound of a scene.

    Attributes:
        name: shown in labels; may be untrusted.
        samples: mono float32 [T] at 48 kHz, not normalized.
        gain_db: gain in the mixture.
    """

    name: str
    samples: FloatArray
    gain_db: float = 0.0


@dataclass(frozen=True, slots=True)
class AudioScene:
    """Sounds in a room. The first sound determines the length, shorter ones are repeated."""

    sounds: tuple[SceneSound, ...]
    room: Room = Room.NONE

    def waveform(self) -> FloatArray:
        """Mono float32 [T] at 48 kHz: the mixture, in the room at the loudness that it has without."""
        from pipeline_steps.audio.mixing import mix_tracks

        return apply_room(mix_tracks([(sound.samples, sound.gain_db) for sound in self.sounds]), self.room)

    def tracks(self) -> list[FloatArray]:
        """Each sound [T] alone, at its gain, without the room."""
        import numpy as np

        length = len(self.sounds[0].samples)
        return [np.resize(sound.samples, length) * np.float32(10.0 ** (sound.gain_db / 20.0)) for sound in self.sounds]

    def sweep(self, setting: SweptSetting) -> list[tuple[str, AudioScene]]:
        """Labels and scenes with every room, or with the last sound at each of the gains `SWEEP_GAINS_DB`."""
        if setting is SweptSetting.ROOM:
            return [(room.value, replace(self, room=room)) for room in Room]
        *others, last = self.sounds
        gains = [last.gain_db + gain for gain in SWEEP_GAINS_DB]
        return [(gain_label(gain), replace(self, sounds=(*others, replace(last, gain_db=gain)))) for gain in gains]


def gain_label(gain_db: float) -> str:
    """Gain with its sign and unit."""
    return f"{gain_db:+g} dB" if gain_db else "0 dB"


def scene_notes(scene: AudioScene, waveforms: Sequence[FloatArray], max_seconds: float) -> list[str]:
    """What the user should know about the audio [T] of images from a scene, of which the model uses `max_seconds`."""
    import numpy as np

    from pipeline_steps.core.media_shards import SAMPLE_RATE

    def limited(samples: FloatArray) -> float:
        return float(np.mean(np.abs(samples) >= 1.0))

    notes = []
    if len(scene.sounds[0].samples) > max_seconds * SAMPLE_RATE:
        notes.append(f"the model uses the first {max_seconds:g} s of the sound")
    if max(map(limited, waveforms)) > max(limited(sound.samples) for sound in scene.sounds):
        notes.append("the mixture exceeds full scale and is limited; lower gains avoid this")
    return notes


def apply_room(samples: FloatArray, room: Room) -> FloatArray:
    """Clip [T] in a room, followed by the tail of the room, at equal integrated loudness.

    Samples beyond full scale are limited to it.
    """
    import numpy as np

    from pipeline_steps.audio.loudness import integrated_loudness
    from pipeline_steps.audio.reverb import apply_reverb, decaying_noise_response
    from pipeline_steps.core.media_shards import SAMPLE_RATE
    from pipeline_steps.core.seeding import seeded_rng

    if room is Room.NONE:
        return samples
    # The noise has a fixed seed, so that a room is always the same one.
    impulse = decaying_noise_response(room.reverberation_seconds, SAMPLE_RATE, seeded_rng(0, "room"))
    wet = apply_reverb(np.pad(samples, (0, len(impulse) - 1)), impulse)
    loudness = [integrated_loudness(clip, SAMPLE_RATE) for clip in (samples, wet)]
    if np.isfinite(loudness).all():
        wet *= 10.0 ** ((loudness[0] - loudness[1]) / 20.0)
    return np.clip(wet, -1.0, 1.0).astype(np.float32)
