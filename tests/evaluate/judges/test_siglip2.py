"""Judge `siglip2` on tiny checkpoints of true architecture: images and names of classes in one space."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline_steps.core.errors import ConfigError, IntegrityError
from pipeline_steps.core.l2_normalize import l2_normalize
from pipeline_steps.evaluate.abilities.scores import ClassSpace
from pipeline_steps.evaluate.judges.siglip2 import Siglip2
from pipeline_steps.models.hub_checkpoint import vision_families
from tests.factories.checkpoints.vision_towers import dinov2_checkpoint, siglip2_checkpoint

NAMES = ["a dog barking", "Rain", "waves"]


@pytest.fixture(scope="module", params=[False, True], ids=["fixed", "any-resolution"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return siglip2_checkpoint(tmp_path_factory.mktemp("siglip2"), any_resolution=request.param)


def sample_images() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (*size, 3)).astype(np.uint8) for size in ((20, 33), (64, 64), (90, 31))]


def test_images_and_names_equal_those_of_transformers(folder: Path) -> None:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    judge = Siglip2(str(folder)).load()
    images = sample_images()
    made, texts = judge.features(images), judge.class_features(NAMES)
    assert made.shape == texts.shape == (3, 32)
    assert np.array_equal(np.concatenate([judge.features([image]) for image in images]), made)
    model = AutoModel.from_pretrained(folder).eval()
    processor, tokenizer = AutoImageProcessor.from_pretrained(folder, backend="pil"), AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        for image, row in zip(images, made, strict=True):
            inputs = processor(images=Image.fromarray(image), return_tensors="pt")
            np.testing.assert_allclose(row, model.get_image_features(**inputs).pooler_output[0].numpy(), rtol=1e-4, atol=1e-5)
        for name, row in zip(NAMES, texts, strict=True):
            text = f"this is a photo of {name.lower()}."
            ids = tokenizer(text, padding="max_length", max_length=64, return_tensors="pt")["input_ids"]
            np.testing.assert_allclose(row, model.get_text_features(ids).pooler_output[0].numpy(), rtol=1e-4, atol=1e-5)
    assert np.linalg.norm(made - made.mean(0), axis=1).min() > 0.1
    assert np.linalg.norm(texts - texts.mean(0), axis=1).min() > 0.01


def test_texts_are_the_classes_of_the_abilities() -> None:
    texts = {"cat": np.array([1.0, 0.0]), "dog": np.array([0.0, 1.0])}
    images = l2_normalize(np.array([[0.9, 0.2], [0.8, 0.1], [0.2, 0.9], [0.1, 0.7]]))
    space = ClassSpace.fit(images, ["cat", "cat", "dog", "dog"], texts)
    assert space is not None
    assert np.array_equal(space.means, [[1.0, 0.0], [0.0, 1.0]])
    assert (space.log_odds(images, "cat", "dog") > 0).tolist() == [True, True, False, False]
    assert space.found(images, "cat")[[0, 1, 3]].tolist() == [True, True, False]


def test_a_captioner_with_this_tower_excludes_it() -> None:
    assert Siglip2.family in vision_families({"model_type": "qwen3_vl"})
    assert Siglip2.family in vision_families({"model_type": "smolvlm"})


def test_another_network_and_a_missing_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"judge_checkpoints\.siglip2\.model: .* is of type dinov2, not siglip or siglip2"):
        Siglip2(str(dinov2_checkpoint(tmp_path / "dinov2"))).fetch()
    bare = siglip2_checkpoint(tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    with pytest.raises(IntegrityError, match="no usable tokenizer"):
        Siglip2(str(bare)).load()
