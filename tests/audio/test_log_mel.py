"""The front-ends of CLAP and AST against transformers' own extractors, and the cutting of sounds into windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline_steps.audio.log_mel import (
    AstFeatureConfig,
    ClapFeatureConfig,
    ast_log_mel,
    clap_log_mel,
    map_threads,
    split_windows,
)

SECONDS = 2
TIME = np.arange(SECONDS * 48_000) / 48_000
RANDOM = np.random.default_rng(0)
SOUNDS = {
    "noise": 0.1 * RANDOM.standard_normal(len(TIME)),
    "tone": 0.9 * np.sin(2 * np.pi * 997 * TIME),
    "bass": 0.9 * np.sin(2 * np.pi * 60 * TIME),
    "faint": 1e-5 * RANDOM.standard_normal(len(TIME)),
    "click": np.eye(1, len(TIME), 7000)[0],
    "silence": np.zeros(len(TIME)),
    "offset": np.full(len(TIME), 0.5),
}


@pytest.fixture(params=[*SOUNDS, "recording"])
def sound(request: pytest.FixtureRequest, demo: Path) -> np.ndarray:
    if request.param == "recording":  # a lossy codec: steep spectrum, bands that are all but empty
        return split_windows(soundfile.read(demo / "sounds/s-dog-003.ogg", dtype="float32")[0], len(TIME))[0]
    return SOUNDS[request.param].astype(np.float32)


@pytest.mark.parametrize("scale", ["slaney", "htk"])
def test_clap_is_equal_to_transformers(sound: np.ndarray, scale: str) -> None:
    from transformers import ClapFeatureExtractor

    truncation = "fusion" if scale == "htk" else "rand_trunc"
    theirs = ClapFeatureExtractor(max_length_s=SECONDS, frequency_min=50, truncation=truncation)
    expected = theirs(sound, sampling_rate=48_000, return_tensors="np")["input_features"][0, 0]
    ours = clap_log_mel(torch.from_numpy(sound)[None], ClapFeatureConfig(seconds=SECONDS, low=50, scale=scale))[0].numpy()
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() < 2e-4


def test_ast_is_equal_to_transformers(sound: np.ndarray) -> None:
    from transformers import ASTFeatureExtractor

    settings = AstFeatureConfig(frames=150)
    samples = sound[: settings.samples]
    expected = ASTFeatureExtractor(max_length=150)(samples, sampling_rate=16_000, return_tensors="np")["input_values"][0]
    ours = ast_log_mel(torch.from_numpy(samples)[None], settings)[0].numpy()
    assert ours.shape == expected.shape == (150, 128)
    assert np.abs(ours - expected).max() < 2e-4


def test_loudness_stays_in_the_features() -> None:
    samples = torch.from_numpy(SOUNDS["noise"].astype(np.float32))[None]
    step = ast_log_mel(10 * samples, AstFeatureConfig()) - ast_log_mel(samples, AstFeatureConfig())
    torch.testing.assert_close(step.median(), torch.tensor(0.0252 * 20), atol=1e-3, rtol=0)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    windows = torch.from_numpy(np.stack([SOUNDS[name].astype(np.float32) for name in ("noise", "tone", "faint")]))
    for front_end, settings in ((clap_log_mel, ClapFeatureConfig()), (ast_log_mel, AstFeatureConfig())):
        together = front_end(windows, settings)
        for row, window in enumerate(windows):
            assert torch.equal(front_end(window[None], settings)[0], together[row])


@given(st.integers(1, 700), st.integers(1, 200))
def test_windows_hold_every_sample_and_nothing_else(count: int, length: int) -> None:
    samples = np.arange(count, dtype=np.float32)
    for padding, repeats in (("repeatpad", length // count), ("pad", 1)) if count <= length else ():
        (window,) = split_windows(samples, length, padding)
        assert np.array_equal(window, np.pad(np.tile(samples, repeats), (0, length - repeats * count)))
    windows = split_windows(samples, length)
    assert windows.shape == (max(1, -(-count // length)), length)
    assert set(windows.ravel()) == set(samples), "no silence is added and nothing is left out"
    assert np.array_equal(windows[0], np.resize(samples, length) if count < length else samples[:length])
    if count >= length:
        assert windows[-1][-1] == samples[-1]
        assert all(np.array_equal(np.diff(window), np.ones(length - 1)) for window in windows), "each is a stretch of the sound"


@pytest.mark.parametrize("bad", [np.zeros(0), np.zeros((2, 5)), np.array([0.0, np.nan]), np.array([np.inf])])
def test_what_is_no_sound_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="finite mono"):
        split_windows(bad, 10)


def test_threads_keep_the_order_and_the_setting() -> None:
    before = torch.get_num_threads()
    assert map_threads(lambda item: (item, torch.get_num_threads()), range(20), 3) == [(item, 1) for item in range(20)]
    assert torch.get_num_threads() == before
    assert map_threads(str, [1, 2], 1) == ["1", "2"]
