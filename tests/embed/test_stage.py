"""The stages embed and retrieve on real sounds and real weights, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline_steps.core.errors import DataError
from pipeline_steps.core.hashing import text_id
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import AUDIO_IDS, EVENTS, QUARANTINE, TEXT_IDS
from pipeline_steps.core.tables import read_table, write_table
from pipeline_steps.embed.stage import EmbedConfig, run
from pipeline_steps.models.text_audio.yamnet_minilm import YamnetMiniLMEncoder
from tests.factories.catalog import bytes_below, write_catalog

SOUNDS = ["dog-003", "sheep-000", "train-000", "trumpet-000"]


def write_events(layout: ProjectPaths, phrases: dict[str, str]) -> None:
    """One event a picture: {image id: phrase}."""
    rows = [
        {
            "image_id": image_id,
            "rank": 0,
            "text_id": text_id(phrase),
            "phrase": phrase,
            "sound_source": "it",
            "visible": True,
            "salience": 1.0,
            "confidence": 0.8,
        }
        for image_id, phrase in phrases.items()
    ]
    write_table(layout.captions / "events.parquet", EVENTS, rows)


@pytest.fixture
def layout(tmp_path: Path, demo: Path, assets: Path) -> ProjectPaths:
    made = ProjectPaths(tmp_path / "made")
    write_catalog(made, demo, ["dog-000"], SOUNDS, assets=assets)
    write_events(made, {"a" * 32: "dog barking", "b" * 32: "sheep bleating"})
    return made


@pytest.fixture(scope="session")
def memo(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One memo for the session, so that the tags are read once."""
    return str(tmp_path_factory.getbasetemp() / "memo")


@pytest.fixture
def own_memo(memo: str, layout: ProjectPaths, tmp_path: Path) -> str:
    """A memo of one's own that knows the tags and nothing else."""
    run(EmbedConfig(cache_dir=memo), layout)
    shutil.copytree(Path(memo) / "embed-tags", tmp_path / "own/embed-tags")
    return str(tmp_path / "own")


def test_one_new_picture_costs_one_text_and_no_sound(layout: ProjectPaths, own_memo: str) -> None:
    own = own_memo
    report = run(EmbedConfig(cache_dir=own), layout)
    report.check_balance()
    assert report.metrics["texts"] == {"n": 2, "computed": 2, "reused": 0}
    assert report.metrics["sounds"] == {"n": 4, "computed": 4, "reused": 0}
    before = bytes_below(layout.embeddings)

    write_events(layout, {"a" * 32: "dog barking", "b" * 32: "sheep bleating", "c" * 32: "trumpet playing"})
    report = run(EmbedConfig(cache_dir=own), layout)
    assert report.metrics["texts"] == {"n": 3, "computed": 1, "reused": 2}
    assert report.metrics["sounds"] == {"n": 4, "computed": 0, "reused": 4}
    assert bytes_below(layout.embeddings)["audio.npy"] == before["audio.npy"]

    write_events(layout, {"a" * 32: "dog barking", "b" * 32: "sheep bleating"})
    run(EmbedConfig(cache_dir=own), layout)
    assert bytes_below(layout.embeddings) == before, "the memo changes nothing"


def test_rows_are_unit_vectors_that_know_what_they_are(layout: ProjectPaths, memo: str) -> None:
    run(EmbedConfig(cache_dir=memo), layout)
    texts, sounds = np.load(layout.embeddings / "text.npy"), np.load(layout.embeddings / "audio.npy")
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([texts, sounds]), axis=1), 1.0, atol=1e-4)
    phrases = read_table(layout.embeddings / "text_ids.parquet", TEXT_IDS).to_pylist()
    names = {row["audio_id"]: row["row"] for row in read_table(layout.embeddings / "audio_ids.parquet", AUDIO_IDS).to_pylist()}
    assert [row["row"] for row in phrases] == list(range(len(texts)))
    assert len(names) == len(sounds) == 4
    meta = json.loads((layout.embeddings / "meta.json").read_text())
    assert (meta["texts"], meta["sounds"], meta["dimension"]) == (2, 4, texts.shape[1])
    assert meta["families"] == ["minilm", "yamnet"]
    rebuilt = YamnetMiniLMEncoder.from_parameters(meta["parameters"], layout)
    assert rebuilt.dimension == meta["dimension"], "the parameters make the encoder again"


@pytest.mark.fault
@pytest.mark.parametrize(("value", "code"), [(np.nan, "EMB_NONFINITE"), (0.0, "EMB_ZERO")])
def test_useless_vectors_are_quarantined(
    layout: ProjectPaths, own_memo: str, monkeypatch: pytest.MonkeyPatch, value: float, code: str
) -> None:
    real = YamnetMiniLMEncoder.prepare_audio
    calls: list[int] = []

    def damaged(self: YamnetMiniLMEncoder, samples: np.ndarray) -> np.ndarray:
        calls.append(1)
        found = real(self, samples)
        return np.full_like(found, value) if len(calls) == 1 else found

    monkeypatch.setattr(YamnetMiniLMEncoder, "prepare_audio", damaged)
    with pytest.raises(DataError, match="max_failed_fraction"):
        run(EmbedConfig(cache_dir=own_memo), layout)
    shutil.rmtree(Path(own_memo) / "embed-audio")
    calls.clear()
    report = run(EmbedConfig(cache_dir=own_memo, max_failed_fraction=0.5), layout)
    report.check_balance()
    assert (report.n_ok, report.n_quarantined) == (5, 1)
    assert len(np.load(layout.embeddings / "audio.npy")) == 3
    rows = read_table(layout.embeddings / "quarantine.parquet", QUARANTINE).to_pylist()
    assert [row["code"] for row in rows] == [code]


def test_nothing_to_embed_stops_the_stage(layout: ProjectPaths, memo: str, demo: Path, assets: Path) -> None:
    write_events(layout, {})
    with pytest.raises(DataError, match="no image has a sound event"):
        run(EmbedConfig(cache_dir=memo), layout)
    write_catalog(layout, demo, ["dog-000"], [], assets=assets)
    with pytest.raises(DataError, match="no audio after ingest"):
        run(EmbedConfig(cache_dir=memo), layout)
