"""EfficientNet-Lite, SSD-MobileNet-v2 and AugNet on real pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline_steps.evaluate.judges.augnet import AugNet
from pipeline_steps.models.vision.coco_labels import COCO_LABELS
from pipeline_steps.models.vision.efficientnet_lite import EfficientNetLite, EfficientNetLite0, EfficientNetLite3
from pipeline_steps.models.vision.image_transforms import crop_or_pad_square, resize
from pipeline_steps.models.vision.ssd_mobilenet_v2 import SsdMobileNetV2, anchors, decode_boxes, suppress
from tests.models.golden_outputs import picture


@pytest.fixture(scope="module", params=[EfficientNetLite0, EfficientNetLite3])
def tagger(assets: Path, request: pytest.FixtureRequest) -> EfficientNetLite:
    network: type[EfficientNetLite] = request.param
    return network(assets).load()


@pytest.fixture(scope="module")
def detector(assets: Path) -> SsdMobileNetV2:
    return SsdMobileNetV2(assets).load()


@pytest.mark.parametrize(
    ("name", "labels"), [("i-dog-000", {"Eskimo dog", "Siberian husky"}), ("i-airplane-000", {"airliner"})]
)
def test_lite_names_real_pictures(tagger: EfficientNetLite, demo: Path, name: str, labels: set[str]) -> None:
    probabilities = tagger.probabilities([picture(demo, name)])
    assert probabilities.shape == (1, 1000)
    assert float(probabilities.sum()) == pytest.approx(1.0, abs=1e-4)
    top = {tagger.labels[index].split(",")[0] for index in probabilities[0].argsort()[::-1][:5]}
    assert top & labels


def test_lite_rows_do_not_depend_on_the_batch(tagger: EfficientNetLite, demo: Path) -> None:
    pictures = [picture(demo, "i-dog-000"), picture(demo, "i-airplane-000")]
    together, alone = tagger.features(pictures), tagger.features(pictures[1:])
    assert together.shape == (2, 1280)
    assert together[1].tobytes() == alone[0].tobytes()
    assert len(tagger.labels) == 1000
    assert tagger.labels[0] == "tench, Tinca tinca"


def test_both_networks_are_kin_but_not_the_same(assets: Path, demo: Path) -> None:
    small, large = EfficientNetLite0(assets).load(), EfficientNetLite3(assets).load()
    assert small.family == large.family == "efficientnet"
    assert small.labels == large.labels
    one, other = (network.probabilities([picture(demo)])[0] for network in (small, large))
    assert {int(one.argmax()), int(other.argmax())} <= set(range(151, 269)), "breeds of dog"
    assert not np.allclose(one, other, atol=1e-3)


def test_framing_changes_the_fingerprint(assets: Path) -> None:
    assert EfficientNetLite0(assets, framing="pad").describe() != EfficientNetLite0(assets).describe()


@pytest.mark.parametrize(("name", "label"), [("i-dog-000", "dog"), ("i-cat-000", "cat"), ("i-airplane-000", "airplane")])
def test_ssd_finds_real_objects(detector: SsdMobileNetV2, demo: Path, name: str, label: str) -> None:
    best = detector.detect([picture(demo, name)])[0][0]
    assert best.label == label
    assert best.score > 0.8
    top, left, bottom, right = best.box
    assert 0 <= top < bottom <= 1
    assert 0 <= left < right <= 1


def test_ssd_on_a_blank_picture_and_on_many_shapes(detector: SsdMobileNetV2) -> None:
    assert detector.detect([np.full((64, 64, 3), 255, np.uint8)], min_score=0.5) == [[]]
    shapes = [np.zeros((1, 1, 3), np.uint8), np.zeros((10, 700, 3), np.uint8)]
    assert detector.features(shapes).shape[0] == 2
    assert detector.features([]).shape[0] == 0


def test_coco_has_80_labels_in_id_order() -> None:
    assert len(COCO_LABELS) == len(set(COCO_LABELS.values())) == 80
    assert list(COCO_LABELS) == sorted(COCO_LABELS)
    assert (COCO_LABELS[1], COCO_LABELS[18], COCO_LABELS[90]) == ("person", "dog", "toothbrush")


def test_zero_codes_decode_to_the_anchors() -> None:
    boxes = decode_boxes(torch.zeros(1917, 4))
    assert anchors().shape == (1917, 4)
    torch.testing.assert_close((boxes[:, 2:] + boxes[:, :2]) / 2, anchors()[:, :2])
    torch.testing.assert_close(boxes[:, 2:] - boxes[:, :2], anchors()[:, 2:])


def test_suppression_keeps_the_best_of_each_cluster() -> None:
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.9], [0.0, 0.0, 0.2, 0.2], [0.5, 0.5, 0.5, 0.5]])
    assert suppress(boxes) == [0, 2, 3]
    assert suppress(boxes[:0]) == []


def test_augnet_sees_the_same_thing_in_a_changed_picture(assets: Path, demo: Path) -> None:
    augnet = AugNet(assets, short_side=160).load()
    dog = picture(demo, "i-dog-000")
    features = augnet.features([dog, dog[8:-8, 8:-8], picture(demo, "i-airplane-000")])
    assert features.shape == (3, 768)
    assert np.abs(features).max() <= 1
    near, far = (float(np.linalg.norm(features[0] - features[row])) for row in (1, 2))
    assert near < 0.7 * far


def test_framing() -> None:
    wide = np.zeros((2, 6, 3), np.uint8)
    wide[:, 2:4] = 9
    assert (crop_or_pad_square(wide, "crop") == 9).all()
    assert crop_or_pad_square(wide, "stretch") is wide
    padded = crop_or_pad_square(wide, "pad")
    assert padded.shape == (6, 6, 3)
    assert (padded[:2] == 255).all()
    assert (padded[2:4] == wide).all()
    assert resize(wide, 3, 5).shape == (5, 3, 3)
