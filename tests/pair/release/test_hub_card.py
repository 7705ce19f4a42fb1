"""YAML head of the cards: licenses as the hub names them, sizes, splits."""

from __future__ import annotations

import pytest
from huggingface_hub import DatasetCard

from pipeline_steps.pair.release.hub_card import dataset_head, hub_license, license_fields


@pytest.mark.parametrize(
    ("spdx", "hub"),
    [
        ("CC0-1.0", "cc0-1.0"),
        ("GPL-2.0-or-later", "gpl-2.0"),
        ("GPL-3.0-only", "gpl-3.0"),
        ("GFDL-1.2-or-later", "gfdl"),
        ("ODbL-1.0", "odbl"),
        ("LicenseRef-mine", "other"),
        ("CC-BY-SA-2.0", "other"),
        (None, "other"),
    ],
)
def test_licenses_by_the_names_of_the_hub(spdx: str | None, hub: str) -> None:
    assert hub_license(spdx) == hub


def test_license_fields() -> None:
    assert license_fields(["MIT", "MIT"]) == {"license": "mit"}
    assert license_fields(["MIT", "CC0-1.0", None]) == {"license": ["cc0-1.0", "mit", "other"]}
    assert license_fields(["MIT"], private=True)["license_name"] == "private"
    assert license_fields([None])["license"] == "other"


def test_head_of_a_data_set_is_read_by_the_library_of_the_hub() -> None:
    files = {"train": "train-*.tar", "val": "val-*.tar", "test": "test-*.tar"}
    counts = {"train": 900, "test": 200}
    head = dataset_head('A "title": x', ["MIT"], files, counts, {"train": 10, "val": 0, "test": 5}, ["webdataset"])
    data = DatasetCard(f"{head}# Title\n").data.to_dict()
    assert data["pretty_name"] == 'A "title": x'
    assert data["license"] == "mit"
    assert data["size_categories"] == ["1K<n<10K"]
    assert data["configs"][0]["data_files"] == [
        {"split": "train", "path": "train-*.tar"},
        {"split": "test", "path": "test-*.tar"},
    ]
    assert data["dataset_info"]["splits"][1] == {"name": "test", "num_bytes": 5, "num_examples": 200}
    assert "webdataset" in data["tags"]
    private = dataset_head("x", ["MIT"], files, counts, {"train": 10, "test": 5}, [], private=True)
    assert "license: other" in private
    assert "- private" in private
