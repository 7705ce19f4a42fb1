"""The same random weights in laion-clap's networks and in ClapModel give the same vectors, where laion-clap is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from pipeline_steps.models.text_audio.convert_laion_clap import convert
from tests.factories.checkpoints.clap import TEXTS, clap_encoder
from tests.factories.checkpoints.laion import laion_checkpoint, laion_encoder, text_folder

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("laion_clap") is None, reason="laion-clap has an environment of its own (numpy < 2, torchvision)"
)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_same_weights_same_vectors(tmp_path: Path, fused: bool) -> None:
    text = text_folder(tmp_path / "text")
    checkpoint = laion_checkpoint(tmp_path / "laion.pt", fused)
    original = laion_encoder(checkpoint, text).load()
    converted = clap_encoder(convert(checkpoint, text, tmp_path / "converted")).load()
    random = np.random.default_rng(0)
    time = np.arange(1_200_000) / 48_000
    clips = [
        (0.1 * random.standard_normal(30_000)).astype(np.float32),
        (0.5 * np.sin(2 * np.pi * 440 * time[:480_000])).astype(np.float32),
        (0.2 * random.standard_normal(len(time)) * np.exp(-time)).astype(np.float32),
    ]
    found, expected = converted.encode_audio(clips), original.encode_audio(clips)
    assert np.abs(found - expected).max() < 1e-4
    assert np.abs(found[0] - found[1]).max() > 1e-3, "the vectors of different clips differ"
    read, expected = converted.encode_texts(TEXTS), original.encode_texts(TEXTS)
    assert np.abs(read - expected).max() < 1e-4
    assert np.abs(read[0] - read[1]).max() > 1e-3, "the vectors of different texts differ"
