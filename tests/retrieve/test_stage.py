"""Stage `retrieve` on synthetic embeddings: pool items only, thresholds, errors, reproducible bytes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from pipeline_steps.core.errors import ConfigError, DataError, IntegrityError
from pipeline_steps.core.hashing import text_id
from pipeline_steps.core.schemas import NEIGHBORS, TEXT_IDS
from pipeline_steps.core.tables import read_table
from pipeline_steps.retrieve.stage import RetrieveConfig, open_pool_index, run
from tests.retrieve.synthetic_embeddings import D, make, unit, write_vectors


def test_neighbors_are_the_best_pool_clips_of_pool_texts(tmp_path: Path) -> None:
    layout = make(tmp_path)
    report = run(RetrieveConfig(k=7, hubness_correction={"method": "none"}), layout)
    report.check_balance()
    rows = read_table(layout.retrieval / "neighbors.parquet", NEIGHBORS).to_pylist()
    held_texts = {text_id("sound 10"), text_id("sound 11")}
    assert {row["text_id"] for row in rows}.isdisjoint(held_texts)
    assert len(rows) == 10 * 7
    texts = {row["text_id"]: row["row"] for row in read_table(layout.embeddings / "text_ids.parquet", TEXT_IDS).to_pylist()}
    scores = unit(1, 12) @ unit(2, 40)[:35].T
    for key in {row["text_id"] for row in rows}:
        mine = [row for row in rows if row["text_id"] == key]
        own = scores[texts[key]]
        assert [int(row["audio_id"], 16) - 1000 for row in mine] == np.argsort(-own, kind="stable")[:7].tolist()
        z = (own - own.mean()) / own.std()
        np.testing.assert_allclose([row["z_score"] for row in mine], np.sort(z)[::-1][:7], atol=1e-3)
    assert report.metrics["annoy_recall_at_10"] >= 0.95
    assert report.metrics["hubness"]["raw"] == report.metrics["hubness"]["corrected"]


@pytest.mark.parametrize("index", ["auto", "exact", "ivf", "annoy"])
def test_the_same_input_gives_the_same_bytes(tmp_path: Path, index: str) -> None:
    outs = []
    for name in ("a", "b"):
        layout = make(tmp_path / name)
        run(RetrieveConfig(index=index), layout)
        outs.append({path.name: path.read_bytes() for path in layout.retrieval.iterdir()})
    assert outs[0] == outs[1]
    assert set(outs[0]) == {"checksums.sha256", "neighbors.parquet", "index.ann", "index.json"}


@pytest.mark.fault
@pytest.mark.parametrize("n_clips", [1, 2])
def test_k_above_the_pool_works_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture, n_clips: int) -> None:
    layout = make(tmp_path, n_clips=n_clips, held_clips=0)
    with caplog.at_level(logging.WARNING):
        run(RetrieveConfig(k=50), layout)
    rows = read_table(layout.retrieval / "neighbors.parquet", NEIGHBORS).to_pylist()
    assert len(rows) == 10 * n_clips
    assert "all of them are neighbors" in caplog.text
    assert all(np.isfinite([row["z_score"], row["corrected_score"]]).all() for row in rows)


@pytest.mark.fault
@pytest.mark.parametrize(("held_clips", "held_images"), [(40, 0), (0, 12)])
def test_an_empty_side_stops_the_stage(tmp_path: Path, held_clips: int, held_images: int) -> None:
    layout = make(tmp_path, held_clips=held_clips, held_images=held_images)
    with pytest.raises(DataError, match="nothing to retrieve"):
        run(RetrieveConfig(), layout)
    assert not (layout.retrieval / "index.ann").exists(), "no empty index is built"


@pytest.mark.fault
def test_recall_below_the_floor_stops_the_stage(tmp_path: Path) -> None:
    layout = make(tmp_path, n_clips=400)
    with pytest.raises(DataError, match=r"recall@10 .*annoy.min_recall 0.99") as failure:
        run(RetrieveConfig.from_params({"annoy": {"trees": 1, "search_k": 1, "min_recall": 0.99}}), layout)
    assert failure.value.exit_code == 3
    assert "annoy.search_k (now 1)" in failure.value.action


@pytest.mark.fault
def test_an_index_of_other_embeddings_is_rejected(tmp_path: Path) -> None:
    layout = make(tmp_path)
    run(RetrieveConfig(), layout)
    index, vectors, ids = open_pool_index(layout, RetrieveConfig())
    assert index.n_items == len(vectors) == len(ids) == 35
    write_vectors(layout, unit(1, 12), unit(2, 40), fingerprint="another revision")
    with pytest.raises(IntegrityError, match="fingerprint of the index is") as failure:
        open_pool_index(layout, RetrieveConfig())
    assert failure.value.exit_code == 6


@pytest.mark.fault
@pytest.mark.parametrize("damage", ["bytes", "nan", "rows", "meta", "missing"])
def test_damaged_embeddings_are_rejected(tmp_path: Path, damage: str) -> None:
    layout = make(tmp_path)
    if damage == "bytes":
        payload = bytearray((layout.embeddings / "audio.npy").read_bytes())
        payload[-1] ^= 1
        (layout.embeddings / "audio.npy").write_bytes(bytes(payload))
    elif damage == "nan":
        write_vectors(layout, unit(1, 12), np.full((40, D), np.nan, np.float32))
    elif damage == "rows":
        write_vectors(layout, unit(1, 12), unit(2, 39))
    elif damage == "meta":
        (layout.embeddings / "meta.json").write_text(json.dumps({"dimension": "x"}))
    else:
        (layout.embeddings / "text.npy").unlink()
    with pytest.raises(IntegrityError):
        run(RetrieveConfig(), layout)
    assert not (layout.retrieval / "index.ann").exists()


def test_ivf_finds_the_exact_neighbors_and_reports_its_probes(tmp_path: Path) -> None:
    tables = []
    for index in ("exact", "ivf"):
        layout = make(tmp_path / index, n_clips=600)
        report = run(RetrieveConfig.from_params({"index": index, "k": 5, "annoy": {"trees": 0}}), layout)
        tables.append(read_table(layout.retrieval / "neighbors.parquet", NEIGHBORS))
    found = report.metrics["ivf"]
    assert report.metrics["index"] == "ivf"
    assert found["recall"] >= 0.97
    assert found["sample"] == 10
    assert report.metrics["ivf_among_texts"]["cells"] > 1
    assert tables[0]["audio_id"] == tables[1]["audio_id"], "random vectors have no structure: both searches are exact"


def test_without_trees_there_is_no_index_and_queries_are_exact(tmp_path: Path) -> None:
    layout = make(tmp_path)
    run(RetrieveConfig(), layout)
    report = run(RetrieveConfig.from_params({"annoy": {"trees": 0}}), layout)
    names = sorted(path.name for path in layout.retrieval.iterdir())
    assert names == ["checksums.sha256", "neighbors.parquet"], "the earlier index is removed"
    assert report.metrics["annoy_recall_at_10"] is None
    index, vectors, ids = open_pool_index(layout, RetrieveConfig())
    assert index.n_items == len(vectors) == len(ids) == 35
    assert index.search(vectors[3:4], 1)[0].tolist() == [[3]]


@pytest.mark.fault
def test_annoy_without_trees_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"annoy\.trees is 0"):
        run(RetrieveConfig.from_params({"index": "annoy", "annoy": {"trees": 0}}), make(tmp_path))


@pytest.mark.fault
@pytest.mark.parametrize("lost", ["index.json", "index.ann"])
def test_an_incomplete_index_is_rejected(tmp_path: Path, lost: str) -> None:
    layout = make(tmp_path)
    run(RetrieveConfig(), layout)
    (layout.retrieval / lost).unlink()
    with pytest.raises(IntegrityError):
        open_pool_index(layout, RetrieveConfig())
