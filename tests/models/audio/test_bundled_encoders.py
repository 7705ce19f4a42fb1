"""YAMNet and aiSFX on real sounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline_steps.audio.resample import resample
from pipeline_steps.evaluate.judges.aisfx import AiSfx
from pipeline_steps.models.audio.yamnet import HOP_SAMPLES, MIN_SAMPLES, YamNet
from tests.models.golden_outputs import sound


@pytest.fixture(scope="module")
def yamnet(assets: Path) -> YamNet:
    return YamNet(assets).load()


def top(yamnet: YamNet, samples_48k: np.ndarray, count: int = 5) -> list[str]:
    with torch.inference_mode():
        logits, _, _ = yamnet(yamnet.frames(resample(samples_48k, 48_000, 16_000)))
    return [yamnet.class_names[index] for index in torch.sigmoid(logits).mean(0).topk(count).indices.tolist()]


@pytest.mark.parametrize(
    ("name", "tag"),
    [("s-dog-003", "Dog"), ("s-rooster-000", "Chicken, rooster"), ("s-train-000", "Train"), ("s-cat-000", "Cat")],
)
def test_yamnet_names_real_sounds(yamnet: YamNet, demo: Path, name: str, tag: str) -> None:
    assert tag in top(yamnet, sound(demo, name))


def test_yamnet_hears_silence(yamnet: YamNet) -> None:
    assert top(yamnet, np.zeros(48_000, np.float32), 1) == ["Silence"]


@pytest.mark.parametrize(
    ("length", "patches"),
    [(1, 1), (MIN_SAMPLES, 1), (MIN_SAMPLES + 1, 2), (MIN_SAMPLES + HOP_SAMPLES, 2), (MIN_SAMPLES + HOP_SAMPLES + 1, 3)],
)
def test_patches_cover_the_whole_sound(yamnet: YamNet, length: int, patches: int) -> None:
    assert yamnet.frames(np.zeros(length, np.float32)).shape == (patches, 1, 96, 64)


def test_yamnet_shapes_and_vocabulary(yamnet: YamNet) -> None:
    logits, embedding, feature_map = yamnet(torch.zeros(2, 1, 96, 64))
    assert logits.shape == (2, 521)
    assert embedding.shape == (2, 1024)
    assert feature_map.shape == (2, 1024, 3, 2)
    torch.testing.assert_close(feature_map.mean((2, 3)), embedding)
    assert len(yamnet.class_names) == len(set(yamnet.class_names)) == 521


def test_yamnet_passes_gradients_to_its_input(yamnet: YamNet, demo: Path) -> None:
    patches = torch.from_numpy(yamnet.frames(resample(sound(demo), 48_000, 16_000))).requires_grad_()
    yamnet(patches)[2].square().mean().backward()
    assert patches.grad is not None
    assert float(patches.grad.abs().sum()) > 0


def test_aisfx_is_near_for_dogs_and_far_for_a_train(assets: Path, demo: Path) -> None:
    aisfx = AiSfx(assets).load()
    dog, other_dog, train = (aisfx.embed(sound(demo, name)) for name in ("s-dog-003", "s-dog-004", "s-train-000"))
    assert dog.shape == (512,)

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    assert cosine(dog, other_dog) > cosine(dog, train)
    assert cosine(dog, other_dog) > cosine(other_dog, train)


@pytest.mark.parametrize("length", [1, 100, 47_999, 110_000, 480_001])
def test_aisfx_blocks_are_whole_and_finite(length: int) -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, length).astype(np.float32)
    blocks = AiSfx(Path("unused")).blocks(samples)
    assert blocks.shape[1:] == (100, 96)
    assert np.isfinite(blocks).all()
    assert np.isfinite(AiSfx(Path("unused")).blocks(np.zeros(length, np.float32))).all()
