"""An encoder that gives all texts one vector stops the stage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline_steps.core.errors import IntegrityError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.embed.config import EmbedConfig
from pipeline_steps.embed.known_answer import TEXTS, check_text_vectors
from pipeline_steps.embed.stage import run
from tests.factories.catalog import write_catalog
from tests.factories.checkpoints.clap import clap_checkpoint
from tests.factories.events import write_events

pytestmark = pytest.mark.fault


def vectors(spread: float) -> np.ndarray:
    rows = 1 + spread * np.random.default_rng(0).standard_normal((len(TEXTS), 64))
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def test_unlike_vectors_pass_and_almost_equal_ones_are_refused_with_the_figures() -> None:
    check_text_vectors(vectors(1.0), "model")
    with pytest.raises(IntegrityError, match=r"owner/model.*8 texts .* mean cosine of 0\.99\d\d \(smallest 0\.99") as caught:
        check_text_vectors(vectors(0.03), "owner/model")
    assert caught.value.exit_code == 6
    with pytest.raises(IntegrityError):
        check_text_vectors(np.full((8, 4), np.nan, np.float32), "model")


def test_a_checkpoint_whose_text_tower_is_dead_stops_the_stage(tmp_path: Path, demo: Path, assets: Path) -> None:
    from safetensors.torch import load_file, save_file

    layout = ProjectPaths(tmp_path)
    write_catalog(layout, demo, [], ["dog-003"], assets=assets)
    write_events(layout, {"a" * 32: "a dog barking"})
    folder = clap_checkpoint(tmp_path / "models/clap")
    weights = load_file(folder / "model.safetensors")
    weights["text_projection.linear2.bias"] += 100 * torch.ones_like(weights["text_projection.linear2.bias"])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError, match="does not distinguish texts"):
        run(EmbedConfig.from_params({"encoder": "clap", "clap": {"model": "models/clap"}}), layout)
    assert not layout.embeddings.exists()
