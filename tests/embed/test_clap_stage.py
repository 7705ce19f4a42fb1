"""Stage `embed` with encoder `clap`: a small checkpoint of the real architecture on real clips."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import QUARANTINE
from pipeline_steps.core.tables import read_table
from pipeline_steps.embed.config import EmbedConfig
from pipeline_steps.embed.stage import build_encoder, embed_texts, run
from pipeline_steps.models.text_audio.clap import ClapEncoder
from tests.factories.catalog import bytes_below, write_catalog
from tests.factories.checkpoints.clap import clap_checkpoint
from tests.factories.events import CLIPS, write_events

PHRASES = {"a" * 32: "a dog barking in the distance", "b" * 32: "rain on a tin roof"}


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory, demo: Path, assets: Path) -> ProjectPaths:
    made = ProjectPaths(tmp_path_factory.mktemp("clap"))
    write_catalog(made, demo, ["dog-000"], CLIPS, assets=assets)
    write_events(made, PHRASES)
    clap_checkpoint(made.root / "checkpoints/clap")
    return made


def config(cache_dir: Path, **more: object) -> EmbedConfig:
    return EmbedConfig.from_params(
        {"encoder": "clap", "clap": {"model": "checkpoints/clap"}, "cache_dir": str(cache_dir), **more}
    )


def test_vectors_are_written_once_and_reused(layout: ProjectPaths, tmp_path: Path) -> None:
    report = run(config(tmp_path / "memo"), layout)
    report.check_balance()
    assert (report.n_ok, report.cache_misses, report.cache_hits) == (6, 6, 0)
    before = bytes_below(layout.embeddings)
    meta = json.loads(before["meta.json"])
    assert (meta["encoder"], meta["family"], meta["dimension"], meta["sounds"]) == ("clap", "clap", 24, 4)
    assert meta["space"].startswith("clap@")
    assert str(layout.root) not in before["meta.json"].decode()

    again = run(config(tmp_path / "memo"), layout)
    assert (again.cache_misses, again.cache_hits) == (0, 6)
    run(config(tmp_path / "other", batch_size=1), layout)
    assert bytes_below(layout.embeddings) == before, "neither cache nor batch size changes a byte"


def test_the_encoder_can_be_rebuilt_from_meta(layout: ProjectPaths, tmp_path: Path) -> None:
    run(config(tmp_path / "memo"), layout)
    meta = json.loads((layout.embeddings / "meta.json").read_text())
    encoder = ClapEncoder.from_parameters(meta["parameters"], layout)
    assert encoder is not None
    encoder.load()
    texts = np.load(layout.embeddings / "text.npy")
    assert {tuple(row) for row in encoder.encode_texts(list(PHRASES.values()))} == {tuple(row) for row in texts}
    chosen = config(tmp_path / "memo")
    asked, computed, _ = embed_texts(
        build_encoder(chosen, layout).load(), chosen, layout, ["a crowd cheering", *PHRASES.values()]
    )
    assert asked.shape == (3, 24)
    assert computed == 1, "only the new text is computed"


def test_a_clip_that_cannot_be_encoded_is_quarantined(
    layout: ProjectPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ClapEncoder.prepare_audio
    calls: list[int] = []

    def damaged(self: ClapEncoder, samples: np.ndarray) -> np.ndarray:
        calls.append(1)
        return real(self, np.full_like(samples, np.nan) if len(calls) == 2 else samples)

    monkeypatch.setattr(ClapEncoder, "prepare_audio", damaged)
    report = run(config(tmp_path / "memo", max_failed_fraction=0.5), layout)
    report.check_balance()
    assert (report.n_ok, report.n_quarantined) == (5, 1)
    (row,) = read_table(layout.embeddings / "quarantine.parquet", QUARANTINE).to_pylist()
    assert (row["code"], row["decoder"]) == ("EMB_FAILED", "clap")
    assert "finite mono" in row["reason"]


def test_an_encoder_without_its_model_is_rejected() -> None:
    for encoder in ("clap", "laion_clap"):
        with pytest.raises(ValidationError, match=f"encoder {encoder} needs"):
            EmbedConfig(encoder=encoder)
