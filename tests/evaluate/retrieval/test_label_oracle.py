"""Label oracle: the encoder is rebuilt from meta.json and checked against a stored text embedding."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline_steps.core.errors import IntegrityError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.evaluate.retrieval.label_oracle import label_vectors
from tests.factories.checkpoints.clap import TEXTS, clap_checkpoint, clap_encoder

LABELS = ["dog", "sea waves"]


def vectors_of_labels(root: Path, meta: dict[str, Any], expected: np.ndarray) -> dict[str, np.ndarray] | None:
    layout = ProjectPaths(root)
    return label_vectors(layout, str(layout.result_cache), meta, LABELS, TEXTS[0], expected)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    clap_checkpoint(root / "models/clap")
    return root


def test_labels_are_encoded_by_the_encoder_of_the_embeddings(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    encoder = clap_encoder("models/clap", device="cpu").load()
    meta = {"encoder": "clap", "parameters": encoder.parameters}
    assert str(project) not in str(meta)
    monkeypatch.chdir("/")  # the path is relative to the project, not to the working directory
    made = vectors_of_labels(project, meta, encoder.encode_texts(TEXTS[:1])[0])
    assert made is not None
    assert list(made) == LABELS
    assert np.array_equal(np.stack(list(made.values())), encoder.encode_texts(LABELS))


def test_a_changed_encoder_is_an_error(project: Path, tmp_path: Path) -> None:
    encoder = clap_encoder("models/clap", device="cpu", root=project).load()
    shutil.copytree(project, tmp_path / "changed")
    shutil.rmtree(tmp_path / "changed/models/clap")
    clap_checkpoint(tmp_path / "changed/models/clap", seed=1)
    meta = {"encoder": "clap", "parameters": encoder.parameters}
    with pytest.raises(IntegrityError, match="made by another version of the encoder"):
        vectors_of_labels(tmp_path / "changed", meta, encoder.encode_texts(TEXTS[:1])[0])


def test_an_encoder_that_cannot_be_rebuilt_gives_no_row(project: Path) -> None:
    outside = clap_encoder(project / "models/clap", device="cpu")
    for meta in ({"encoder": "clap", "parameters": outside.parameters}, {"encoder": "clap"}):
        assert vectors_of_labels(project, meta, np.zeros(24, np.float32)) is None
