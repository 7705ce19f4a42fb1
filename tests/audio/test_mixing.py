"""Tracks become one sound."""

from __future__ import annotations

import numpy as np

from pipeline_steps.audio.mixing import mix_tracks

TONE = (0.2 * np.sin(2 * np.pi * 500 * np.arange(16_000) / 16_000)).astype(np.float32)


def test_tracks_are_added_with_their_gains_and_not_normalised() -> None:
    assert np.array_equal(mix_tracks([(TONE, 0.0)]), TONE)
    assert np.allclose(mix_tracks([(TONE, -20.0)]), TONE * 0.1, atol=1e-6)
    mixed = mix_tracks([(TONE, 0.0), (np.full(3, 0.1, np.float32), 0.0)])
    assert np.allclose(mixed, TONE + 0.1, atol=1e-6)
    assert len(mix_tracks([(TONE[:100], 0.0), (TONE, 0.0)])) == 100
    assert np.abs(mix_tracks([(TONE, 40.0)])).max() == 1.0
