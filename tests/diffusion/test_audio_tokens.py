"""Pooling of audio tokens: means of neighbors, one function for training and for exported models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline_steps.diffusion.audio_tokens import TokenPooling, YamnetTokenizer
from pipeline_steps.models.audio.yamnet import YamNet


def test_groups_of_steps_and_bands_are_averaged() -> None:
    grid = torch.arange(5 * 3 * 2).view(5, 3, 2).half()
    pooled = TokenPooling(2, 2)(grid)
    assert (pooled.shape, pooled.dtype) == ((3, 2, 2), torch.float16)
    assert torch.equal(pooled[0, 0], grid[:2, :2].float().mean((0, 1)).half())
    assert torch.equal(pooled[2, 1], grid[4, 2]), "the last group has the tokens that are left"
    assert torch.equal(TokenPooling(64, 64)(grid)[0, 0], grid.float().mean((0, 1)).half())


def test_no_pooling_changes_neither_tokens_nor_fingerprint(assets: Path) -> None:
    grid = torch.rand(5, 3, 2).half()
    assert TokenPooling()(grid) is grid
    tagger = YamNet(assets)
    assert "pooling" not in YamnetTokenizer(tagger, tagger).describe()
    assert YamnetTokenizer(tagger, tagger, TokenPooling(2)).describe()["pooling"] == {"time": 2, "bands": 1}


@pytest.mark.parametrize("seconds", [2.0, 3.3])
def test_a_tokenizer_pools_what_it_encodes(assets: Path, seconds: float) -> None:
    tagger = YamNet(assets)
    clip = (0.3 * np.sin(np.arange(int(48_000 * seconds)) / 20)).astype(np.float32)
    plain, pooled = (
        YamnetTokenizer(tagger, tagger, pooling).tokenize([clip], 10.0)[0] for pooling in (TokenPooling(), TokenPooling(4))
    )
    assert torch.equal(pooled.grid, TokenPooling(4)(plain.grid))
    assert len(pooled.grid) == -(-len(plain.grid) // 4)
    assert torch.equal(pooled.tags, plain.tags)
