"""Class space and foreground on features and images whose classes and areas are known."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline_steps.core.l2_normalize import l2_normalize
from pipeline_steps.evaluate.abilities.scores import DEFAULT_TEMPERATURE, ClassSpace, foreground_area, plain_ground


def clusters(spread: float, per_class: int = 20) -> tuple[np.ndarray, list[str | None]]:
    rng = np.random.default_rng(0)
    rows = np.repeat(np.eye(8)[:4], per_class, axis=0)
    return l2_normalize(rows + rng.normal(0, spread, rows.shape)), [f"c{row // per_class}" for row in range(len(rows))]


def test_log_odds_equal_those_of_the_softmax_and_change_sign_between_classes() -> None:
    rows, labels = clusters(0.2)
    space = ClassSpace.fit(rows, labels)
    assert space is not None
    logits = rows @ space.means.T / space.temperature
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(space.log_odds(rows, "c1", "c3"), log_p[:, 1] - log_p[:, 3], atol=1e-9)
    assert (space.log_odds(space.means[[1, 3]], "c1", "c3") > 0).tolist() == [True, False]


def test_temperature_depends_on_the_separation_of_the_classes() -> None:
    sharp, blurred = (ClassSpace.fit(*clusters(spread)) for spread in (0.1, 0.5))
    assert sharp is not None
    assert blurred is not None
    assert sharp.temperature < blurred.temperature
    single = ClassSpace.fit(np.eye(3), ["a", "b", None])
    assert single is not None
    assert single.temperature == DEFAULT_TEMPERATURE
    assert ClassSpace.fit(np.eye(3), ["a", "a", None]) is None


def test_a_class_is_found_in_its_images_and_in_five_percent_of_the_others() -> None:
    rows, labels = clusters(0.2, per_class=100)
    space = ClassSpace.fit(rows, labels)
    assert space is not None
    own = np.array([label == "c2" for label in labels])
    found = space.found(rows, "c2")
    assert found[own].mean() > 0.95
    assert found[~own].mean() == pytest.approx(0.05, abs=0.005)
    both = l2_normalize((space.means[0] + space.means[2])[None])
    assert space.found(both, "c0").all()
    assert space.found(both, "c2").all()


def test_area_counts_pixels_that_differ_from_the_background() -> None:
    images = np.full((2, 3, 20, 20, 3), 255, np.uint8)
    images[1] = (40, 90, 120)
    for place, side in enumerate((0, 5, 10)):
        images[:, place, 4 : 4 + side, 4 : 4 + side] = (200, 0, 0)
    images[0, 1, 0, 0] = 240  # within the tolerance
    np.testing.assert_allclose(foreground_area(images), np.array([[0, 25, 100]] * 2) / 400)
    assert (plain_ground(images) == 1).all()
    textured = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    assert plain_ground(textured) < 0.5
