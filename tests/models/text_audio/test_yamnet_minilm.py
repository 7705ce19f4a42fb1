"""Encoder `yamnet_minilm`: windows, level, tags, and outputs of the real weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline_steps.core.hashing import fingerprint
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.models.audio.yamnet import HOP_SAMPLES, MIN_SAMPLES
from pipeline_steps.models.text_audio.audioset_phrases import hand_written_phrases
from pipeline_steps.models.text_audio.base import TextAudioEncoder
from pipeline_steps.models.text_audio.yamnet_minilm import (
    LOUDEST,
    QUIETEST,
    TAGS,
    YamnetMiniLMEncoder,
    YamnetMiniLMEncoderConfig,
    baseline_audio_embeddings,
    normalize_level,
    softmax_over_tags,
    tag_phrases,
    window_weights,
    windows,
)
from tests.models.golden_outputs import digest, sound

GOLDEN = Path(__file__).with_name("golden_yamnet_minilm.json")


def yamnet_minilm(assets: Path, **settings: Any) -> YamnetMiniLMEncoder:
    """Encoder whose weights lie in the folder `assets`."""
    layout = ProjectPaths(assets.parents[1])
    assert layout.assets == assets
    return YamnetMiniLMEncoder(YamnetMiniLMEncoderConfig(**settings), layout)


@pytest.fixture(scope="module")
def encoder(assets: Path) -> YamnetMiniLMEncoder:
    return yamnet_minilm(assets).load()


def test_tag_phrases_split_synonyms() -> None:
    assert tag_phrases("Chicken, rooster") == ["Chicken, rooster", "Chicken", "rooster"]
    assert tag_phrases("Roaring cats (lions, tigers)") == ["Roaring cats (lions, tigers)", "Roaring cats", "lions", "tigers"]
    assert tag_phrases("Dog") == ["Dog"]


@given(st.integers(1, 5 * MIN_SAMPLES))
def test_windows_cover_the_clip_exactly(length: int) -> None:
    samples = np.arange(1, length + 1, dtype=np.float32)
    cut = windows(samples)
    assert cut.shape[1] == MIN_SAMPLES
    assert set(np.unique(cut)) == set(samples), "every sample is used, none is added"
    if length > MIN_SAMPLES:
        assert cut[-1, -1] == samples[-1], "the last window ends with the clip"
        assert (np.diff(cut[:, 0]) <= HOP_SAMPLES).all()
    else:
        np.testing.assert_array_equal(cut[0], np.resize(samples, MIN_SAMPLES))


def test_an_empty_clip_is_one_silent_window() -> None:
    assert not windows(np.zeros(0, np.float32)).any()


def test_silent_windows_have_weight_zero() -> None:
    cut = np.stack([np.full(10, 0.5), np.zeros(10), np.full(10, 0.125)]).astype(np.float32)
    np.testing.assert_allclose(window_weights(cut, 0.5), [2 / 3, 0.0, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(window_weights(np.zeros((4, 10), np.float32), 0.5), 0.25)
    np.testing.assert_allclose(window_weights(cut, 0.0), 1 / 3)


@given(st.floats(1e-5, 1.0))
def test_level_normalization_moves_the_rms_to_the_nearer_bound(rms: float) -> None:
    samples = (rms * np.tile([1.0, -1.0], 100)).astype(np.float32)
    got = float(np.sqrt(np.mean(normalize_level(samples).astype(np.float64) ** 2)))
    assert got == pytest.approx(min(max(rms, QUIETEST), LOUDEST), rel=1e-4)


def test_level_normalization_keeps_silence() -> None:
    assert not normalize_level(np.zeros(10, np.float32)).any()


@given(st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=20), st.floats(0.01, 1))
def test_softmax_sums_to_one_and_keeps_order(values: list[float], temperature: float) -> None:
    row = np.array([values], np.float32)
    result = softmax_over_tags(row, temperature)
    assert result.sum() == pytest.approx(1.0, abs=1e-4)
    order = np.argsort(row[0], kind="stable")
    assert (np.diff(result[0][order]) >= -1e-7).all()


def test_plain_audio_vectors_use_the_twenty_best_tags() -> None:
    random = np.random.default_rng(0)
    posteriors, tags = random.random((3, 40)).astype(np.float32), random.normal(size=(40, 6)).astype(np.float32)
    for row, got in zip(posteriors, baseline_audio_embeddings(posteriors, tags), strict=True):
        best = np.argsort(-row)[:20]
        wanted = (row[best, None] * tags[best]).sum(0)
        np.testing.assert_allclose(got, wanted / np.linalg.norm(wanted), atol=1e-5)


def test_hand_written_phrases_belong_to_tags(encoder: YamnetMiniLMEncoder) -> None:
    phrases = hand_written_phrases()
    assert set(phrases) <= set(encoder.yamnet.class_names)
    assert len(phrases) > 300
    for name, texts in phrases.items():
        assert texts, name
        assert all(text == text.strip() and 3 < len(text) < 60 for text in texts), name
        assert len(set(texts)) == len(texts), name


def test_it_is_a_text_audio_encoder_with_unit_rows(encoder: YamnetMiniLMEncoder, demo: Path) -> None:
    assert isinstance(encoder, TextAudioEncoder)
    texts, clips = encoder.encode_texts(["dog barking", "a bell"]), encoder.encode_audio([sound(demo)])
    assert texts.shape == (2, TAGS)
    assert clips.shape == (1, TAGS)
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([texts, clips]), axis=1), 1.0, atol=1e-5)
    assert encoder.encode_texts([]).shape == encoder.encode_audio([]).shape == (0, TAGS)


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("s-dog-003", "dog barking"),
        ("s-sheep-000", "sheep bleating"),
        ("s-train-000", "train passing by"),
        ("s-trumpet-000", "trumpet playing"),
        ("s-cow-000", "cow mooing"),
    ],
)
def test_a_clip_is_nearest_to_its_phrase(encoder: YamnetMiniLMEncoder, demo: Path, name: str, phrase: str) -> None:
    phrases = ["dog barking", "sheep bleating", "train passing by", "trumpet playing", "cow mooing", "rain falling"]
    scores = encoder.encode_texts(phrases) @ encoder.encode_audio([sound(demo, name)])[0]
    assert phrases[int(np.argmax(scores))] == phrase


def test_the_same_clip_gives_the_same_bytes_at_any_level(encoder: YamnetMiniLMEncoder, demo: Path) -> None:
    samples = sound(demo)
    assert encoder.prepare_audio(samples).tobytes() == encoder.prepare_audio(samples.copy()).tobytes()
    quiet, quieter = encoder.encode_audio([samples * 1e-2, samples * 1e-3])
    np.testing.assert_allclose(quiet, quieter, atol=1e-3)


def test_outputs_equal_the_golden_outputs(encoder: YamnetMiniLMEncoder, demo: Path) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert YamnetMiniLMEncoder.version == golden["version"], "version was raised: rewrite golden_yamnet_minilm.json"
    got = {"text": encoder.encode_texts(["dog barking"])[0], "sound": encoder.encode_audio([sound(demo)])[0]}
    for name, values in got.items():
        np.testing.assert_allclose(digest(values), golden[name], rtol=1e-3, atol=1e-4, err_msg=f"{name} changed: raise version")


def test_every_parameter_is_in_the_fingerprint(assets: Path) -> None:
    variants = [
        yamnet_minilm(assets),
        yamnet_minilm(assets, text_pooling="plain"),
        yamnet_minilm(assets, temperature=0.05),
        yamnet_minilm(assets, phrase_weight=0.0),
        yamnet_minilm(assets, loudness_power=0.0),
    ]
    assert len({fingerprint(variant.describe()) for variant in variants}) == len(variants)


def test_tag_vectors_of_another_shape_are_rejected(assets: Path) -> None:
    with pytest.raises(ValueError, match="shape"):
        yamnet_minilm(assets).set_tag_embeddings(np.zeros((3, 384), np.float32))
