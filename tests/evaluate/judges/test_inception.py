"""The two Inception-v3: the numbers of pytorch-fid and torchvision, the resize of clean-fid, rejected checkpoints."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline_steps.core.errors import ConfigError, IntegrityError
from pipeline_steps.evaluate.judges.convert_inception import convert
from pipeline_steps.evaluate.judges.inception import FIDInceptionV3, pooled_features, resize_clean_fid
from pipeline_steps.evaluate.judges.inception_v3 import InceptionV3
from tests.factories.checkpoints.inception import inception_checkpoint, inception_weights

GOLDEN = json.loads(Path(__file__).with_name("golden_inception.json").read_text())
"""Features of two noise images by pytorch-fid 0.3.0 (`of_2015`) and torchvision 0.29.2, with `inception_weights`."""


def noise(side: int) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(9)).clamp(-1, 1)


@pytest.mark.parametrize(("classes", "peer"), [(1008, "of_2015"), (1000, "torchvision")])
def test_features_equal_those_of_the_published_code(classes: int, peer: str) -> None:
    weights = inception_weights(classes)
    with torch.inference_mode():
        made = pooled_features(noise(GOLDEN["side"]), weights, peer == "of_2015")
    assert made.shape == (2, 2048)
    np.testing.assert_allclose(made[:, :: GOLDEN["every"]].numpy(), GOLDEN[peer], rtol=1e-4, atol=1e-5)
    other = np.array(GOLDEN["torchvision" if peer == "of_2015" else "of_2015"])
    assert np.abs(made[:, :: GOLDEN["every"]].numpy() - other).max() > 1e-2  # the pools make a difference


def test_the_resize_is_bicubic_with_antialiasing_and_without_rounding() -> None:
    random = np.random.default_rng(0)
    flat = resize_clean_fid(np.full((7, 31, 3), (3, 128, 255), np.uint8))
    np.testing.assert_allclose(flat, np.broadcast_to(np.float32([3, 128, 255]), (299, 299, 3)), rtol=1e-5)
    image = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    large = resize_clean_fid(image)
    assert large.shape == (299, 299, 3)
    assert np.abs(large - large.round()).max() > 0.4
    assert large.min() < 0 or large.max() > 255  # overshoot is kept, as in clean-fid
    small = resize_clean_fid(random.integers(0, 256, (1500, 1500, 3), dtype=np.uint8))
    assert small.std() < 30  # of 74: neighbours are averaged, not picked


def test_images_of_any_shape_give_one_row_each(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    images = [random.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in ((64, 64), (20, 90), (400, 310))]
    fid = FIDInceptionV3(str(inception_checkpoint(tmp_path / "fid"))).load()
    plain = InceptionV3(str(inception_checkpoint(tmp_path / "plain", 1000))).load()
    rows = fid.features(images)
    assert rows.shape == (3, 128)
    assert np.array_equal(rows[1:2], fid.features([images[1]]))
    byte_range = (np.stack([resize_clean_fid(image) for image in images]) - 128) / 128
    with torch.inference_mode():
        wanted = pooled_features(torch.from_numpy(byte_range.transpose(0, 3, 1, 2)).float(), inception_weights(1008, 16), True)
    np.testing.assert_allclose(rows, wanted.numpy(), rtol=1e-3, atol=1e-4)
    assert np.abs(plain.features(images) - rows).max() > 1e-2
    assert {fid.family, plain.family} == {"inception"}


def test_judge_inception_accepts_the_network_of_fid_only(tmp_path: Path) -> None:
    of_imagenet = inception_checkpoint(tmp_path / "plain", 1000)
    with pytest.raises(ConfigError, match=r"evaluate\.judge_checkpoints\.inception\.model: .* with 1000 classes") as refused:
        FIDInceptionV3(str(of_imagenet)).load()
    assert "inception_v3" in str(refused.value)
    (of_imagenet / "config.json").write_text(json.dumps({"architecture": "inception_v3", "num_classes": 1008}))
    with pytest.raises(IntegrityError, match=r"fc\.weight is \[1000, 128\], not \[1008, 128\]"):
        FIDInceptionV3(str(of_imagenet)).load()


def test_the_error_names_missing_and_mismatched_weights(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = inception_checkpoint(tmp_path / "fid")
    weights = inception_weights(1008, 16)
    del weights["Mixed_6c.branch7x7_2.bn.bias"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(IntegrityError, match=r"1 weights are not in the checkpoint \(first: Mixed_6c\.branch7x7_2\.bn\.bias\)"):
        FIDInceptionV3(str(folder)).load()
    weights = inception_weights(1008, 16)
    weights["Mixed_7b.branch1x1.conv.weight"] = torch.zeros(20, 3, 1, 1)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(IntegrityError, match="do not fit each other"):
        FIDInceptionV3(str(folder)).load()


class CodePayload:
    """Object whose unpickling runs code."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("open('ran', 'w').close()",)


def test_a_published_file_is_converted_without_executing_pickled_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(inception_weights(1008, 16), tmp_path / "fid.pth")
    folder = convert(tmp_path / "fid.pth", tmp_path / "fid")
    image = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    direct = FIDInceptionV3(str(inception_checkpoint(tmp_path / "direct")))
    assert np.array_equal(FIDInceptionV3(str(folder)).features([image]), direct.features([image]))
    with pytest.raises(ConfigError, match="is not empty"):
        convert(tmp_path / "fid.pth", folder)
    with pytest.raises(IntegrityError, match="expected 00"):
        convert(tmp_path / "fid.pth", tmp_path / "other", "00")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"fc.weight": CodePayload()}, protocol=2))
    with pytest.raises(IntegrityError, match="does not contain tensors alone"):
        convert(tmp_path / "evil.pth", tmp_path / "evil")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "evil").exists()
