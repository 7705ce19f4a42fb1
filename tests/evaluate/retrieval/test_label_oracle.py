"""The label oracle asks in the very space that is on disk: rebuilt from meta.json, checked against a text of it."""

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


def ask(root: Path, meta: dict[str, Any], expected: np.ndarray) -> dict[str, np.ndarray] | None:
    layout = ProjectPaths(root)
    return label_vectors(layout, str(layout.result_cache), meta, LABELS, TEXTS[0], expected)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    clap_checkpoint(root / "models/clap")
    return root


def test_labels_are_embedded_by_the_clap_of_the_space(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    encoder = clap_encoder("models/clap", device="cpu").load()
    meta = {"encoder": "clap", "parameters": encoder.parameters}
    assert str(project) not in str(meta)
    monkeypatch.chdir("/")  # the folder is the project's, whatever the working directory
    made = ask(project, meta, encoder.encode_texts(TEXTS[:1])[0])
    assert made is not None
    assert list(made) == LABELS
    assert np.array_equal(np.stack(list(made.values())), encoder.encode_texts(LABELS))


def test_a_clap_that_has_changed_since_is_an_error(project: Path, tmp_path: Path) -> None:
    encoder = clap_encoder("models/clap", device="cpu", root=project).load()
    shutil.copytree(project, tmp_path / "changed")
    shutil.rmtree(tmp_path / "changed/models/clap")
    clap_checkpoint(tmp_path / "changed/models/clap", seed=1)
    meta = {"encoder": "clap", "parameters": encoder.parameters}
    with pytest.raises(IntegrityError, match="made by another version of the encoder"):
        ask(tmp_path / "changed", meta, encoder.encode_texts(TEXTS[:1])[0])


def test_a_space_that_cannot_be_rebuilt_leaves_the_row_out(project: Path) -> None:
    outside = clap_encoder(project / "models/clap", device="cpu")
    for meta in ({"encoder": "clap", "parameters": outside.parameters}, {"encoder": "clap"}):
        assert ask(project, meta, np.zeros(24, np.float32)) is None
