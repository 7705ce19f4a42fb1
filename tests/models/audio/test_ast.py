"""Tokens of the Audio Spectrogram Transformer: transformers' numbers, in order of time, of sound alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline_steps.audio.resample import resample
from pipeline_steps.core.errors import ConfigError, IntegrityError
from pipeline_steps.models.audio.ast import AstEncoder
from tests.factories.checkpoints.ast import ast_checkpoint

RANDOM = np.random.default_rng(2)
NOISE = (0.1 * RANDOM.standard_normal(26 * 48_000)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ast_checkpoint(tmp_path_factory.mktemp("ast"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> AstEncoder:
    return AstEncoder(str(folder)).load()


def test_a_full_window_gives_transformers_patches_in_order_of_time(folder: Path, tokenizer: AstEncoder) -> None:
    from transformers import ASTFeatureExtractor, ASTModel

    sound = NOISE[: 3 * 164_080]
    samples = resample(sound, 48_000, 16_000)
    assert len(samples) == 164_080
    features = ASTFeatureExtractor.from_pretrained(folder)(samples, sampling_rate=16_000, return_tensors="pt")
    with torch.inference_mode():
        hidden = ASTModel.from_pretrained(folder).eval()(features["input_values"]).last_hidden_state[0, 2:].numpy()
    tokens = tokenizer.tokens(sound)
    assert tokens.shape == (tokenizer.moments * tokenizer.bands, 24) == (101 * 12, 24)
    for moment, band in ((0, 0), (0, 11), (1, 0), (57, 3), (100, 11)):
        np.testing.assert_allclose(tokens[moment * 12 + band], hidden[band * 101 + moment], atol=2e-5)


def test_a_short_sound_is_repeated_and_its_tokens_end_with_it(tokenizer: AstEncoder) -> None:
    second = NOISE[:48_000]
    grid = tokenizer.grids([second])[0]
    assert grid.shape == (10, 12, 24)
    whole = tokenizer.grids([np.tile(second, 11)[: 3 * 164_080]])[0]
    np.testing.assert_allclose(grid, whole[:10], atol=0.05, err_msg="as if it had gone on; a plateau would be heard everywhere")
    assert tokenizer.grids([NOISE[:1]])[0].shape == (1, 12, 24)


def test_a_long_sound_runs_on(tokenizer: AstEncoder) -> None:
    grid = tokenizer.grids([NOISE])[0]
    assert len(grid) == 260, "ten moments a second, none twice"
    second = NOISE[3 * 101 * 1600 :][: 3 * 164_080]
    np.testing.assert_allclose(grid[101:190], tokenizer.grids([second])[0][:89], atol=0.05)


def test_the_same_sound_gives_the_same_bytes(tokenizer: AstEncoder) -> None:
    sounds = [NOISE[:48_000], NOISE[:500_000], NOISE[-100_000:]]
    before = torch.get_num_threads()
    alone = [tokenizer.grids([sound])[0] for sound in sounds]
    try:
        torch.set_num_threads(3)
        for grid, expected in zip(tokenizer.grids(sounds), alone, strict=True):
            assert np.array_equal(grid, expected)
    finally:
        torch.set_num_threads(before)
    assert tokenizer.grids([]) == []


def test_loudness_is_heard(tokenizer: AstEncoder) -> None:
    quiet, loud = tokenizer.grids([0.1 * NOISE[:480_000], NOISE[:480_000]])
    assert np.abs(quiet - loud).mean() > 0.01


@pytest.mark.parametrize("bad", [np.zeros(0), np.zeros((2, 9)), np.array([np.nan, 0.0])])
def test_what_is_no_sound_is_refused(tokenizer: AstEncoder, bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="finite mono"):
        tokenizer.tokens(bad.astype(np.float32))


@pytest.mark.parametrize(
    ("file", "change", "error", "words"),
    [
        ("config.json", {"model_type": "clap"}, ConfigError, "type clap"),
        ("preprocessor_config.json", {"do_normalize": False}, IntegrityError, "do_normalize"),
        ("preprocessor_config.json", {"max_length": 512}, IntegrityError, "disagree"),
        ("preprocessor_config.json", None, IntegrityError, "missing"),
        ("model.safetensors", None, IntegrityError, "safetensors"),
    ],
)
def test_what_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, file: str, change: dict[str, object] | None, error: type[Exception], words: str
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    path = damaged / file
    if change is None:
        path.unlink()
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(error, match=words):
        AstEncoder(str(damaged)).load()


def test_identity_is_content(folder: Path, tmp_path: Path, tokenizer: AstEncoder) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert AstEncoder("copy", root=tmp_path).describe() == tokenizer.describe()
    assert tokenizer.dimension == 24
