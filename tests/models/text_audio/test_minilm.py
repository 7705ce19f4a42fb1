"""MiniLM: published vectors, and independence of rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline_steps.models.text_audio.minilm import MiniLM


@pytest.fixture(scope="module")
def minilm(assets: Path) -> MiniLM:
    return MiniLM(assets).load()


def test_published_vector(minilm: MiniLM) -> None:
    """First numbers of the model card's example sentence, as sentence-transformers gives them."""
    vector = minilm.encode(["This is an example sentence"])[0]
    np.testing.assert_allclose(vector[:6], [0.06765693, 0.06349581, 0.04871312, 0.07930496, 0.03744796, 0.00265273], atol=2e-6)


def test_rows_are_unit_and_independent(minilm: MiniLM) -> None:
    texts = ["a dog barking", "", "a very long text " * 200, "\u732b \U0001f431 m\u00e9ow"]
    rows = minilm.encode(texts)
    assert rows.shape == (4, 384)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-5)
    for row, text in zip(rows, texts, strict=True):
        assert minilm.encode([text])[0].tobytes() == row.tobytes()
    assert minilm.encode([]).shape == (0, 384)


def test_similar_texts_have_similar_vectors(minilm: MiniLM) -> None:
    bark, dog, train = minilm.encode(["a dog barking", "a barking puppy", "a steam train whistle"])
    assert bark @ dog > bark @ train + 0.2
