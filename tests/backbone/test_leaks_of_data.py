"""No image of the backbone's data is an image of the demo, or nearly one."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from backbone import leaks
from backbone.config import data_folder, params
from backbone.dataset import evaluation_files

ROOT = Path(__file__).parents[2]
ITEMS = data_folder() / "dataset" / "items.parquet"
needs_data = pytest.mark.skipif(not ITEMS.exists(), reason="backbone/data is not built; run the stage dataset")


@pytest.fixture(scope="module")
def appearance() -> leaks.Appearance:
    """Stored hashes and the stored pixels, which are what the models see."""
    rows = pq.read_table(ITEMS, columns=["phash"])["phash"].to_pylist()
    bits = np.array([[[int(b) for b in view] for view in views] for views in rows], bool)
    images = np.load(ITEMS.parent / "images.npy", mmap_mode="r")
    thumbnails = np.stack([np.asarray(leaks.content_square(Image.fromarray(image), leaks.THUMBNAIL)) for image in images])
    return leaks.Appearance(bits, thumbnails)


@needs_data
def test_no_image_is_near_a_demo_image(appearance: leaks.Appearance) -> None:
    reference = leaks.Appearance.of_folder(ROOT / "data/demo/images")
    settings = params("dataset")["leak_rule"]
    assert not leaks.LeakRule(settings["hash_distance"], -1, 0, settings["rmse"] - 2).matches(appearance, reference).any()


@needs_data
def test_no_file_of_the_demo_manifest_is_used() -> None:
    used = {(row["package"], row["path"]) for row in pq.read_table(ITEMS, columns=["package", "path"]).to_pylist()}
    demo = evaluation_files(ROOT, params("dataset"))
    assert len(demo & {(package, path) for package, path in demo if package.startswith("@lobehub")}) > 200
    assert not used & demo


@needs_data
def test_stored_hashes_belong_to_the_stored_pixels(appearance: leaks.Appearance) -> None:
    images = np.load(ITEMS.parent / "images.npy", mmap_mode="r")
    sample = np.random.default_rng(0).choice(len(images), 60, replace=False)
    own = [
        leaks.pairwise_distances(leaks.image_hashes(Image.fromarray(images[i]))[None], appearance.bits[i, :1])[0, 0]
        for i in sample
    ]
    assert np.median(own) <= 4


def test_every_split_of_the_demo_is_checked() -> None:
    assert params("dataset")["leak_images"] == "data/demo/images"
    assert sum(1 for _ in (ROOT / "data/demo/images").iterdir()) > 600
