"""Judges `dinov2` and `clip` on tiny checkpoints of true architecture: pixels, features, rejected checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline_steps.core.array_types import ByteArray
from pipeline_steps.core.errors import ConfigError, IntegrityError
from pipeline_steps.evaluate.judges.base import ImageFeatureExtractor
from pipeline_steps.evaluate.judges.clip import ClipImageEncoder
from pipeline_steps.evaluate.judges.dinov2 import Dinov2
from pipeline_steps.evaluate.judges.hub_vision_model import TransformersImageEncoder
from pipeline_steps.models.hub_checkpoint import vision_families
from tests.factories.checkpoints.vision_towers import clip_checkpoint, dinov2_checkpoint

JUDGES: dict[str, type[TransformersImageEncoder]] = {
    "dinov2": Dinov2,
    "dinov2-registers": Dinov2,
    "clip": ClipImageEncoder,
    "clip-tower": ClipImageEncoder,
}
WIDTH = {"dinov2": 32, "dinov2-registers": 32, "clip": 24, "clip-tower": 24}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("towers")
    return {
        "dinov2": dinov2_checkpoint(root / "dinov2"),
        "dinov2-registers": dinov2_checkpoint(root / "registers", registers=True),
        "clip": clip_checkpoint(root / "clip"),
        "clip-tower": clip_checkpoint(root / "tower", tower_alone=True),
    }


def sample_images() -> list[ByteArray]:
    """Smooth and noisy ones of several shapes, smaller and larger than the network's square."""
    random = np.random.default_rng(0)
    ramp = np.linspace(0, 255, 90)[:, None, None] * np.linspace(0.2, 1, 70)[None, :, None] * [1.0, 0.6, 0.3]
    noisy = [random.integers(0, 256, (height, width, 3)) for height, width in ((20, 33), (64, 64), (150, 61))]
    return [np.asarray(image, np.uint8) for image in (ramp, *noisy)]


def pixels_of_dinov2(image: ByteArray) -> np.ndarray:
    """Pixels according to the published preprocessor_config.json, by Pillow and numpy: short side 48, center crop 42."""
    height, width = image.shape[:2]
    short, long = min(height, width), max(height, width)
    sizes = {short: 48, long: int(48 * long / short)} if short != long else {short: 48}
    resized = np.asarray(Image.fromarray(image).resize((sizes[width], sizes[height]), Image.Resampling.BICUBIC), np.float64)
    top, left = (resized.shape[0] - 42) // 2, (resized.shape[1] - 42) // 2
    cut = resized[top : top + 42, left : left + 42] / 255.0
    return ((cut - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).transpose(2, 0, 1)


@pytest.mark.parametrize("name", JUDGES)
def test_features_equal_those_of_transformers_at_any_batch_size(folders: dict[str, Path], name: str) -> None:
    from transformers import AutoImageProcessor, AutoModel, CLIPModel

    judge = JUDGES[name](str(folders[name])).load()
    assert isinstance(judge, ImageFeatureExtractor)
    images = sample_images()
    made = judge.features(images)
    assert made.shape == (4, WIDTH[name])
    assert made.dtype == np.float32
    assert np.array_equal(np.concatenate([judge.features([image]) for image in images]), made)
    source = folders["clip"] if name == "clip-tower" else folders[name]
    processor = AutoImageProcessor.from_pretrained(source, backend="pil")
    with torch.inference_mode():
        for image, row in zip(images, made, strict=True):
            inputs = processor(images=Image.fromarray(image), return_tensors="pt")
            if name.startswith("clip"):
                wanted = CLIPModel.from_pretrained(source).eval().get_image_features(**inputs).pooler_output[0]
            else:
                wanted = AutoModel.from_pretrained(source).eval()(**inputs).last_hidden_state[0, 0]
            np.testing.assert_allclose(row, wanted.numpy(), rtol=1e-4, atol=1e-5)
    spread = np.linalg.norm(made - made.mean(0), axis=1)
    assert spread.min() > 0.1  # different images have different rows


def test_pixels_follow_the_preprocessor_configuration(folders: dict[str, Path]) -> None:
    judge = Dinov2(str(folders["dinov2"])).load()
    for image in sample_images():
        made = judge._processor(images=[Image.fromarray(image)], return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(made, pixels_of_dinov2(image), atol=2e-6)


def test_a_wrong_or_damaged_checkpoint_is_rejected(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.judge_checkpoints\.clip\.model: .* is of type dinov2, not clip"):
        ClipImageEncoder(str(folders["dinov2"])).fetch()
    with pytest.raises(ConfigError, match=r"evaluate\.judge_checkpoints\.dinov2\.revision: 'main' is not a commit"):
        Dinov2("facebook/dinov2-base", "main").fetch()
    with pytest.raises(IntegrityError, match="pinned is 0000"):
        Dinov2(str(folders["dinov2"]), "0" * 64).fetch()
    folder = shutil.copytree(folders["dinov2"], tmp_path / "code")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(IntegrityError, match="auto_map asks for code"):
        Dinov2(str(folder)).load()
    folder = shutil.copytree(folders["dinov2"], tmp_path / "more-layers")
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(IntegrityError, match=r"judge_checkpoints\.dinov2\.model: \d+ weights are not in the checkpoint"):
        Dinov2(str(folder)).load()
    folder = shutil.copytree(folders["clip"], tmp_path / "no-preprocessor")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(IntegrityError, match="no usable image processor"):
        ClipImageEncoder(str(folder)).load()


def test_the_identity_of_a_folder_depends_on_its_files_only(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["clip"], tmp_path / "models/clip")
    there, here = ClipImageEncoder(str(folders["clip"])), ClipImageEncoder("models/clip", root=tmp_path)
    assert there.describe() == here.describe()
    assert str(tmp_path) not in json.dumps(here.describe())
    assert ClipImageEncoder("models/clip", here.identity["sha256"], root=tmp_path).fetch() == tmp_path / "models/clip"


@pytest.mark.parametrize(
    ("config", "tower"),
    [
        ({"model_type": "llava", "vision_config": {"model_type": "clip_vision_model"}}, "clip"),
        ({"model_type": "instructblip", "vision_config": {"model_type": "instructblip_vision_model"}}, "clip"),
        ({"model_type": "qwen2_vl", "vision_config": {"model_type": "qwen2_vl"}}, "clip"),
        ({"model_type": "paligemma"}, "siglip"),
        ({"model_type": "llava_onevision", "vision_config": {"model_type": "siglip_vision_model"}}, "siglip"),
    ],
)
def test_families_of_the_vision_towers_of_captioners(config: dict[str, object], tower: str) -> None:
    assert tower in vision_families(config)
    assert (ClipImageEncoder.family in vision_families(config)) == (tower == "clip")
