"""Scenes: one or two images of single things at chosen sizes and places on white.

A scene teaches the UNet what no single image shows: that a thing can be small, and that two things can stand beside each other.
Its condition is a blend of token states: `weight * states(first) + (1 - weight) * states(second)`.
The second caption is that of another image, or the empty caption. Sizes follow the weights.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline_steps.diffusion.image_processor import place

WHITE = 255


@dataclass(frozen=True)
class Scene:
    """One scene.

    Attributes:
        first, second: rows of the images; second is -1 for a scene of one thing.
        weight: of the first one in the blend, in (0, 1).
        pixels: uint8 [size, size, 3].
    """

    first: int
    second: int
    weight: float
    pixels: np.ndarray


def side_of(weight: float, count: int) -> float:
    """Return the side of a thing as a fraction of the scene's side.

    One thing: linear in the weight, from 0.2 to 1.
    Two things: the area is proportional to the weight, and both fit side by side.
    """
    return 0.2 + 0.8 * weight if count == 1 else 0.74 * weight**0.5


def compose(images: np.ndarray, rows: list[int], weights: list[float], rng: np.random.Generator) -> np.ndarray:
    """Return a scene of one or two images; two stand beside each other, in either order."""
    size = images.shape[1]
    canvas = np.full((size, size, 3), WHITE, np.uint8)
    lefts = [rng.random()] if len(rows) == 1 else ([0.0, 1.0] if rng.random() < 0.5 else [1.0, 0.0])
    for row, weight, left in zip(rows, weights, lefts, strict=True):
        image = images[row][:, ::-1] if rng.random() < 0.5 else images[row]
        place(canvas, np.ascontiguousarray(image), side_of(weight, len(rows)), left, rng.uniform(0.3, 0.9))
    return canvas


def compose_scenes(
    images: np.ndarray, things: np.ndarray, sampling_weights: np.ndarray, settings: dict[str, Any]
) -> list[Scene]:
    """Return `settings["count"]` scenes; a function of the arguments alone.

    Args:
        images: uint8 [images, size, size, 3].
        things: name of the thing on each image; two images of a scene show different things.
        sampling_weights: relative probability of each image; zero outside the training split.
        settings: group `dataset.scenes` of params.yaml, with the seed.
    """
    rng = np.random.default_rng(settings["seed"])
    probability = sampling_weights / sampling_weights.sum()
    scenes = []
    for _ in range(settings["count"]):
        first = int(rng.choice(len(images), p=probability))
        second = -1
        if rng.random() < settings["pair_fraction"]:
            second = int(rng.choice(len(images), p=probability))
            if things[second] == things[first]:
                second = -1
        low, high = (0.2, 0.95) if second < 0 else (0.2, 0.8)
        weight = round(float(rng.uniform(low, high)), 3)
        rows, weights = ([first], [weight]) if second < 0 else ([first, second], [weight, 1 - weight])
        scenes.append(Scene(first, second, weight, compose(images, rows, weights, rng)))
    return scenes
