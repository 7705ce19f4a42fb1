"""Rooms: impulse responses of shoebox rooms by the image-source method (Allen and Berkley 1979) as pyroomacoustics has it
(Scheibler et al. 2018, arXiv 1710.04196), and clips convolved with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.signal import fftconvolve

from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.core.errors import ConfigError
from pipeline_steps.core.seeding import seeded_rng

ROOMS_VERSION = 2
"""Raised whenever the simulated rooms or the reverberation change: part of the fingerprint of cached features."""
MAX_ORDER = 20
"""Reflections that are followed."""
REVERBERATION_SECONDS = {"small room": 0.4, "hall": 1.9, "church": 5.0}
"""T60 of spaces: time in which the tail decays by 60 dB."""
SECONDS_OF_EQUAL_ENERGY = 1.0
"""T60 at which the noise of `decaying_noise_response` has the energy of the direct sound."""


def simulate_room_impulse_responses(count: int, rate: int, seed: int) -> list[FloatArray]:
    """Impulse responses [T] of `count` random rooms at `rate` Hz, each from its direct path on, which has amplitude 1.

    Room i depends on the seed and i alone, on any number of cores. Rooms measure 3 to 12 by 3 to 10 by 2.4 to 5 m, walls
    swallow 15 to 60 % of the energy, source and ear are 0.5 m or more apart and from the walls.

    Raises:
        ConfigError: pyroomacoustics is not installed.
    """
    try:
        import pyroomacoustics
    except ImportError as error:
        raise ConfigError(
            "train.audio.reverb_prob is above 0, but pyroomacoustics is not installed",
            "pip install 'seeing-sound[reverb]', or set train.audio.reverb_prob to 0",
        ) from error
    threads = pyroomacoustics.constants.get("num_threads")
    pyroomacoustics.constants.set("num_threads", 1)  # each thread adds up its own echoes: the last digits depend on how many
    try:
        return [_impulse(pyroomacoustics, rate, seeded_rng(seed, "room", str(index))) for index in range(count)]
    finally:
        pyroomacoustics.constants.set("num_threads", threads)


def _impulse(pyroomacoustics: Any, rate: int, rng: np.random.Generator) -> FloatArray:
    size = rng.uniform((3.0, 3.0, 2.4), (12.0, 10.0, 5.0))
    absorption = float(rng.uniform(0.15, 0.6))
    microphone = rng.uniform(0.5, size - 0.5)
    source = rng.uniform(0.5, size - 0.5)
    while np.linalg.norm(source - microphone) < 0.5:
        source = rng.uniform(0.5, size - 0.5)
    room = pyroomacoustics.ShoeBox(
        size, fs=rate, materials=pyroomacoustics.Material(absorption), max_order=MAX_ORDER, use_rand_ism=False
    )
    room.add_source(source)
    room.add_microphone(microphone)
    room.compute_rir()
    response = np.asarray(room.rir[0][0], np.float64)
    direct = int(np.argmax(np.abs(response)))  # all other paths are longer and reflect from a wall
    impulse: FloatArray = (response[direct:] / response[direct]).astype(np.float32)
    return impulse


def decaying_noise_response(t60_seconds: float, rate: int, rng: np.random.Generator) -> FloatArray:
    """Impulse response [T60 x rate] of a room: the direct sound, then noise that decays by 60 dB in T60 (Moorer 1979).

    The energy of the noise grows in proportion to T60; it equals that of the direct sound at `SECONDS_OF_EQUAL_ENERGY`.
    """
    count = max(1, round(t60_seconds * rate))
    response = rng.standard_normal(count) * 10.0 ** (-3.0 * np.arange(count) / count)
    response[0] = 0.0
    energy = float(np.dot(response, response))
    if energy > 0:
        response *= np.sqrt(t60_seconds / SECONDS_OF_EQUAL_ENERGY / energy)
    response[0] = 1.0
    return response.astype(np.float32)


def apply_reverb(samples: npt.NDArray[np.floating], impulse: Sequence[float] | FloatArray) -> npt.NDArray[np.float64]:
    """Convolve samples [T] with an impulse response; length, mean square and onset are kept."""
    dry = np.asarray(samples, np.float64)
    wet: npt.NDArray[np.float64] = fftconvolve(dry, np.asarray(impulse, np.float64))[: len(dry)]
    energy = float(np.dot(wet, wet))
    return wet * float(np.sqrt(np.dot(dry, dry) / energy)) if energy > 0 else wet
