"""Stage `embed` on real clips and real weights, and its errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline_steps.core.errors import DataError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import AUDIO_IDS, QUARANTINE, TEXT_IDS
from pipeline_steps.core.tables import read_table
from pipeline_steps.embed.stage import EmbedConfig, run
from pipeline_steps.models.text_audio.yamnet_minilm import YamnetMiniLMEncoder
from tests.factories.catalog import bytes_below, write_catalog
from tests.factories.events import CLIPS, write_events


@pytest.fixture
def layout(tmp_path: Path, demo: Path, assets: Path) -> ProjectPaths:
    made = ProjectPaths(tmp_path / "made")
    write_catalog(made, demo, ["dog-000"], CLIPS, assets=assets)
    write_events(made, {"a" * 32: "dog barking", "b" * 32: "sheep bleating"})
    return made


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Result cache of the session, so that the tags are computed once."""
    return str(tmp_path_factory.getbasetemp() / "memo")


@pytest.fixture
def own_cache_dir(cache_dir: str, layout: ProjectPaths, tmp_path: Path) -> str:
    """Result cache of one test, with the tags and nothing else."""
    run(EmbedConfig(cache_dir=cache_dir), layout)
    shutil.copytree(Path(cache_dir) / "embed-tags", tmp_path / "own/embed-tags")
    return str(tmp_path / "own")


def test_a_new_image_computes_one_text_and_no_audio(layout: ProjectPaths, own_cache_dir: str) -> None:
    own = own_cache_dir
    report = run(EmbedConfig(cache_dir=own), layout)
    report.check_balance()
    assert (report.metrics["texts"], report.runtime["texts"]) == ({"n": 2}, {"cache_misses": 2, "cache_hits": 0})
    assert (report.metrics["sounds"], report.runtime["sounds"]) == ({"n": 4}, {"cache_misses": 4, "cache_hits": 0})
    before = bytes_below(layout.embeddings)

    write_events(layout, {"a" * 32: "dog barking", "b" * 32: "sheep bleating", "c" * 32: "trumpet playing"})
    report = run(EmbedConfig(cache_dir=own), layout)
    assert (report.metrics["texts"], report.runtime["texts"]) == ({"n": 3}, {"cache_misses": 1, "cache_hits": 2})
    assert (report.metrics["sounds"], report.runtime["sounds"]) == ({"n": 4}, {"cache_misses": 0, "cache_hits": 4})
    assert bytes_below(layout.embeddings)["audio.npy"] == before["audio.npy"]

    write_events(layout, {"a" * 32: "dog barking", "b" * 32: "sheep bleating"})
    run(EmbedConfig(cache_dir=own), layout)
    assert bytes_below(layout.embeddings) == before, "the cache does not change results"


def test_rows_are_unit_vectors_with_ids_and_metadata(layout: ProjectPaths, cache_dir: str) -> None:
    run(EmbedConfig(cache_dir=cache_dir), layout)
    texts, clips = np.load(layout.embeddings / "text.npy"), np.load(layout.embeddings / "audio.npy")
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([texts, clips]), axis=1), 1.0, atol=1e-4)
    phrases = read_table(layout.embeddings / "text_ids.parquet", TEXT_IDS).to_pylist()
    names = {row["audio_id"]: row["row"] for row in read_table(layout.embeddings / "audio_ids.parquet", AUDIO_IDS).to_pylist()}
    assert [row["row"] for row in phrases] == list(range(len(texts)))
    assert len(names) == len(clips) == 4
    meta = json.loads((layout.embeddings / "meta.json").read_text())
    assert (meta["texts"], meta["sounds"], meta["dimension"]) == (2, 4, texts.shape[1])
    assert meta["families"] == ["minilm", "yamnet"]
    rebuilt = YamnetMiniLMEncoder.from_parameters(meta["parameters"], layout)
    assert rebuilt.dimension == meta["dimension"], "the parameters rebuild the encoder"


@pytest.mark.fault
@pytest.mark.parametrize(("value", "code"), [(np.nan, "EMB_NONFINITE"), (0.0, "EMB_ZERO")])
def test_invalid_vectors_are_quarantined(
    layout: ProjectPaths, own_cache_dir: str, monkeypatch: pytest.MonkeyPatch, value: float, code: str
) -> None:
    real = YamnetMiniLMEncoder.prepare_audio
    calls: list[int] = []

    def damaged(self: YamnetMiniLMEncoder, samples: np.ndarray) -> np.ndarray:
        calls.append(1)
        found = real(self, samples)
        return np.full_like(found, value) if len(calls) == 1 else found

    monkeypatch.setattr(YamnetMiniLMEncoder, "prepare_audio", damaged)
    with pytest.raises(DataError, match="max_failed_fraction"):
        run(EmbedConfig(cache_dir=own_cache_dir, max_failed_fraction=0), layout)
    shutil.rmtree(Path(own_cache_dir) / "embed-audio")
    calls.clear()
    report = run(EmbedConfig(cache_dir=own_cache_dir), layout)
    report.check_balance()
    assert (report.n_ok, report.n_quarantined) == (5, 1)
    assert len(np.load(layout.embeddings / "audio.npy")) == 3
    rows = read_table(layout.embeddings / "quarantine.parquet", QUARANTINE).to_pylist()
    assert [row["code"] for row in rows] == [code]


def test_nothing_to_embed_stops_the_stage(layout: ProjectPaths, cache_dir: str, demo: Path, assets: Path) -> None:
    write_events(layout, {})
    with pytest.raises(DataError, match="no image has a sound event"):
        run(EmbedConfig(cache_dir=cache_dir), layout)
    write_catalog(layout, demo, ["dog-000"], [], assets=assets)
    with pytest.raises(DataError, match="no audio after ingest"):
        run(EmbedConfig(cache_dir=cache_dir), layout)
