"""Annoy index: checks against its metadata, and a child process that loads the file first."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline_steps.core.errors import IntegrityError
from pipeline_steps.core.hashing import sha256_file
from pipeline_steps.retrieve.config import HubnessCorrectionConfig
from pipeline_steps.retrieve.index.annoy import AnnoyIndex, IndexMetadata, validate_index, write_index
from pipeline_steps.retrieve.index.base import recall_at
from pipeline_steps.retrieve.index.exact import ExactIndex
from pipeline_steps.retrieve.ranking import hubness_report, rank_neighbors

N, D = 300, 16


@pytest.fixture
def items() -> np.ndarray:
    values = np.random.default_rng(3).normal(size=(N, D))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def index(items: np.ndarray, tmp_path: Path) -> tuple[Path, IndexMetadata]:
    path = tmp_path / "index.ann"
    return path, write_index(items, 20, 7, path, "space")


def open_it(path: Path, metadata: IndexMetadata, **changes: object) -> AnnoyIndex:
    expected: dict[str, object] = {"dimension": D, "n_items": N, "fingerprint": "space", **changes}
    return AnnoyIndex.open(metadata, path, 5000, **expected)  # type: ignore[arg-type]


def forged(path: Path, metadata: IndexMetadata) -> IndexMetadata:
    return metadata.model_copy(update={"sha256": sha256_file(path), "bytes": path.stat().st_size})


def test_it_finds_the_exact_neighbors(index: tuple[Path, IndexMetadata], items: np.ndarray) -> None:
    search = open_it(*index)
    rows, scores = search.search(items[:50], 10)
    exact_rows, exact_scores = ExactIndex(items).search(items[:50], 10)
    assert recall_at(rows, exact_rows, 10) > 0.95
    np.testing.assert_allclose(scores[:, 0], exact_scores[:, 0], atol=1e-5)
    assert search.n_items == N


def test_k_above_n_gives_n(index: tuple[Path, IndexMetadata], items: np.ndarray) -> None:
    rows, _ = open_it(*index).search(items[:2], 10 * N)
    assert rows.shape == (2, N)


@pytest.mark.parametrize("method", ["none", "csls", "dis"])
def test_missing_neighbors_are_ranked_last_and_not_counted(
    index: tuple[Path, IndexMetadata], items: np.ndarray, method: str
) -> None:
    path, metadata = index
    poor = AnnoyIndex.open(metadata, path, 1, D, N, "space")
    assert (poor.search(items[:5], 200)[0] == -1).any(), "the index finds too few neighbors"
    correction = HubnessCorrectionConfig.model_validate({"method": method, "k": 3})
    ranked = rank_neighbors(poor, items[:5], items, 100, correction, 50, 0)
    for row, damped in zip(ranked.rows, ranked.corrected_score, strict=True):
        found = row >= 0
        assert found[0]
        assert (np.diff(found.astype(int)) <= 0).all()
        assert np.isfinite(damped[found]).all()
    assert hubness_report(ranked.rows, ranked.rows, N)["corrected"]["max_k_occurrence"] <= 5


def test_the_same_input_gives_the_same_bytes(index: tuple[Path, IndexMetadata], items: np.ndarray, tmp_path: Path) -> None:
    path, metadata = index
    assert write_index(items, 20, 7, tmp_path / "again.ann", "space") == metadata
    assert (tmp_path / "again.ann").read_bytes() == path.read_bytes()


@pytest.mark.fault
@pytest.mark.parametrize("damage", ["truncated", "random", "zeros", "missing"])
def test_a_damaged_file_is_rejected_before_it_is_opened(index: tuple[Path, IndexMetadata], damage: str) -> None:
    path, metadata = index
    payload = path.read_bytes()
    changed = {
        "truncated": payload[: len(payload) // 2],
        "random": np.random.default_rng(0).bytes(len(payload)),
        "zeros": bytes(len(payload)),
    }
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(changed[damage])
    with pytest.raises(IntegrityError, match=r"index\.json says|missing"):
        open_it(path, metadata)


@pytest.mark.fault
@pytest.mark.parametrize("damage", ["pointers", "zeros"])
def test_a_forged_index_kills_only_a_child_process(index: tuple[Path, IndexMetadata], damage: str) -> None:
    path, metadata = index
    payload = bytearray(path.read_bytes())
    if damage == "zeros":
        payload = bytearray(len(payload))
    else:
        node = len(payload) // (len(payload) // (4 * D + 16)) if len(payload) % (4 * D + 16) == 0 else 4 * D + 16
        for offset in range(N * node, len(payload) - 16, 4):
            payload[offset : offset + 4] = (0x7FFFFF00).to_bytes(4, "little")
    path.write_bytes(bytes(payload))
    with pytest.raises(IntegrityError, match="INDEX_CRASH"):
        open_it(path, forged(path, metadata))


@pytest.mark.fault
@pytest.mark.parametrize(("key", "value"), [("dimension", 2 * D), ("n_items", N + 1), ("fingerprint", "another model")])
def test_metadata_of_other_embeddings_are_rejected_with_both_values(
    index: tuple[Path, IndexMetadata], key: str, value: object
) -> None:
    path, metadata = index
    with pytest.raises(IntegrityError) as failure:
        open_it(path, metadata, **{key: value})
    assert str(value) in str(failure.value)
    assert str(getattr(metadata, key)) in str(failure.value)


def test_another_metric_is_rejected(index: tuple[Path, IndexMetadata]) -> None:
    path, metadata = index
    with pytest.raises(IntegrityError, match="metric"):
        validate_index(metadata.model_copy(update={"metric": "angular"}), path, D, N, "space")


@pytest.mark.parametrize("change", [{"sha256": 5}, {"n_items": "many"}, {"surprise": 1}, {"seed": None}, {"dimension": True}])
def test_damaged_metadata_are_rejected(index: tuple[Path, IndexMetadata], change: dict[str, object]) -> None:
    with pytest.raises(IntegrityError, match=r"index\.json"):
        IndexMetadata.from_json(json.dumps({**index[1].model_dump(), **change}))
    assert IndexMetadata.from_json(index[1].model_dump_json()) == index[1]
