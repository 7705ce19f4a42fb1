"""Leak filter: rejects images that also occur, exactly or nearly, in an evaluation set."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image, ImageOps

HASH_BITS = 64
THUMBNAIL = 32


@dataclass(frozen=True)
class Appearance:
    """What the filter compares of images: pHash bits and small colour images.

    Attributes:
        bits: [images, 2, 64]; the second axis is the mirror image.
        thumbnails: uint8 [images, 32, 32, 3].
    """

    bits: np.ndarray
    thumbnails: np.ndarray

    @classmethod
    def of(cls, image: Image.Image) -> "Appearance":
        """Return the appearance of one image."""
        return cls(image_hashes(image)[None], np.asarray(content_square(image, THUMBNAIL))[None])

    @classmethod
    def stack(cls, parts: Sequence["Appearance"]) -> "Appearance":
        """Return the appearance of several images."""
        return cls(np.concatenate([p.bits for p in parts]), np.concatenate([p.thumbnails for p in parts]))

    @classmethod
    def of_folder(cls, folder: Path) -> "Appearance":
        """Return the appearance of all images of a folder."""
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in {".webp", ".png", ".jpg", ".jpeg", ".gif", ".bmp"})
        if not paths:
            raise FileNotFoundError(f"{folder}: no images; the leak filter needs the evaluation images")
        return cls.stack([cls.of(Image.open(path)) for path in paths])


@dataclass(frozen=True)
class LeakRule:
    """When an image counts as a copy of a reference image; the same limits hold for its mirror image.

    The hash alone misses copies whose thin outline, frame or scaling differs, so images with similar pixels are
    rejected at a larger hash distance.

    Attributes:
        hash_distance: copies have at most this Hamming distance.
        similar_hash_distance: so do images up to this distance, if their RMSE is at most `similar_rmse`.
        similar_rmse: in grey levels, of 32 x 32 px.
        rmse: copies have at most this RMSE, whatever their hash.
    """

    hash_distance: int
    similar_hash_distance: int
    similar_rmse: float
    rmse: float

    def matches(self, images: Appearance, reference: Appearance) -> np.ndarray:
        """Return the mask [images] of those that copy an image of the reference."""
        distance = pairwise_distances(images.bits, reference.bits[:, 0])
        error = pairwise_rmse(images.thumbnails, reference.thumbnails)
        similar = (distance <= self.similar_hash_distance) & (error <= self.similar_rmse)
        return np.asarray(((distance <= self.hash_distance) | similar | (error <= self.rmse)).any(1))


def content_square(image: Image.Image, size: int = 128, white: int = 250) -> Image.Image:
    """Return an image on a white square, cropped to its content.

    Content is the opaque part. For an opaque image it is the part that differs from white, so that the same
    drawing has the same hash with and without a margin.
    """
    rgba = image.convert("RGBA")
    box = rgba.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    rgba = rgba.crop(box) if box else rgba
    flat = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    flat.alpha_composite(rgba)
    grey = flat.convert("L")
    box = grey.point(lambda v: 255 if v < white else 0).getbbox()
    flat = flat.convert("RGB").crop(box) if box else flat.convert("RGB")
    return ImageOps.pad(flat, (size, size), color=(255, 255, 255))


def image_hashes(image: Image.Image) -> np.ndarray:
    """Return the pHash bits [2, 64] of an image and of its mirror image."""
    square = content_square(image)
    return np.stack([imagehash.phash(view).hash.reshape(-1) for view in (square, ImageOps.mirror(square))])


def pairwise_distances(candidates: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return Hamming distances [images, references], the smaller one of both orientations.

    Args:
        candidates: bits [images, 2, 64].
        reference: bits [references, 64].
    """
    a, b = candidates.astype(np.float32), reference.astype(np.float32)
    return np.asarray((a.sum(-1)[..., None] + b.sum(-1)[None, None] - 2 * (a @ b.T)).min(1).round().astype(int))


def pairwise_rmse(images: np.ndarray, reference: np.ndarray, chunk: int = 64) -> np.ndarray:
    """Return root mean squared errors [images, references] in grey levels, the smaller one of both orientations."""
    flat = reference.reshape(len(reference), -1).astype(np.float32)
    norms, size = np.square(flat).sum(1), flat.shape[1]
    rows = []
    for i in range(0, len(images), chunk):
        views = []
        for view in (images[i : i + chunk], images[i : i + chunk, :, ::-1]):
            part = np.ascontiguousarray(view).reshape(len(view), -1).astype(np.float32)
            views.append(np.square(part).sum(1)[:, None] + norms[None] - 2 * part @ flat.T)
        rows.append(np.sqrt(np.maximum(np.minimum(*views), 0) / size))
    return np.concatenate(rows)


def find_duplicates(hashes: np.ndarray, groups: Iterable[str], distance: int) -> np.ndarray:
    """Return a mask of images that nearly repeat an earlier image of the same group, mirrored or not."""
    groups, drop = np.array(list(groups)), np.zeros(len(hashes), bool)
    for group in np.unique(groups):
        index = np.flatnonzero(groups == group)
        kept: list[int] = []
        for i in index:
            if kept and pairwise_distances(hashes[i : i + 1], hashes[kept, 0]).min() <= distance:
                drop[i] = True
            else:
                kept.append(int(i))
    return drop
