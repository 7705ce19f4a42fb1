"""IVF index, running top-k, choice of `auto`, and exact search on a torch device."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline_steps.core.errors import ResourceError
from pipeline_steps.retrieve.index import base, exact
from pipeline_steps.retrieve.index.base import INDEXES, IndexSettings, recall_at, resolve_index
from pipeline_steps.retrieve.index.exact import ExactIndex
from pipeline_steps.retrieve.index.ivf import IVFIndex, choose_probes, probed_cells
from pipeline_steps.retrieve.index.kmeans import cell_count, fit_cells
from pipeline_steps.retrieve.index.top_k import RunningTopK, top_k
from pipeline_steps.retrieve.index.torch_exact import TorchExactIndex


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def clustered(n: int, seed: int, d: int = 16, topics: int = 40) -> np.ndarray:
    centres = np.random.default_rng(99).normal(size=(topics, d))
    random = np.random.default_rng(seed)
    return unit(centres[random.integers(0, topics, n)] + 0.3 * random.normal(size=(n, d)))


@given(
    st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 400), st.integers(1, 90), st.lists(st.integers(1, 90), min_size=1)
)
@settings(max_examples=60, deadline=None)
def test_the_running_top_k_equals_the_top_k(seed: int, n: int, items: int, k: int, steps: list[int]) -> None:
    random = np.random.default_rng(seed)
    scores = random.choice(np.linspace(-1, 1, 9), (n, items)).astype(np.float32)  # many ties
    if seed % 3 == 0:
        scores.sort(axis=1)  # each block exceeds all earlier blocks
    best, at, turn = RunningTopK(n, k), 0, 0
    while at < items:
        end = min(items, at + steps[turn % len(steps)])
        best.update(np.arange(n), scores[:, at:end], np.arange(at, end))
        at, turn = end, turn + 1
    rows, values = best.result()
    wanted_rows, wanted = top_k(scores, k)
    size = min(k, items)
    np.testing.assert_array_equal(rows[:, :size], wanted_rows)
    np.testing.assert_array_equal(values[:, :size], wanted)
    assert (rows[:, size:] == -1).all()


def test_queries_may_be_updated_in_any_order() -> None:
    random = np.random.default_rng(0)
    scores = random.normal(size=(7, 300)).astype(np.float32)
    best = RunningTopK(7, 5)
    for query in (3, 0, 6, 1, 5, 2, 4):
        for at in range(0, 300, 50):
            best.update(np.array([query]), scores[query : query + 1, at : at + 50], np.arange(at, at + 50))
    np.testing.assert_array_equal(best.result()[0], top_k(scores, 5)[0])


def test_a_scan_equals_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    items, queries = clustered(3000, 1), clustered(50, 2)
    items[700:720] = items[5]  # equal vectors: ties go to the smaller row
    whole = ExactIndex(items, 16).search(queries, 30)
    monkeypatch.setattr(exact, "WHOLE_ITEMS", 100)
    monkeypatch.setattr(exact, "FIRST_BLOCK", 64)
    monkeypatch.setattr(exact, "BLOCK", 256)
    scanned = ExactIndex(items, 16).search(queries, 30)
    np.testing.assert_allclose(scanned[1], whole[1], atol=1e-6)
    truth = queries.astype(np.float64) @ items.T.astype(np.float64)
    np.testing.assert_allclose(np.take_along_axis(truth, scanned[0], 1), whole[1], atol=1e-6)
    same = items[5] @ items[5]
    rows = ExactIndex(items).search(items[5:6], 10)[0][0]
    assert same == pytest.approx(1, abs=1e-5)
    assert rows.tolist() == [5, *range(700, 709)]


def test_cells_hold_every_item_once() -> None:
    items = clustered(900, 3)
    cells = fit_cells(items, 0)
    assert len(cells) == cell_count(900) == 64
    assert sorted(cells.order.tolist()) == list(range(900))
    np.testing.assert_array_equal(cells.cell_of[cells.order], np.repeat(np.arange(64), np.diff(cells.starts)))
    np.testing.assert_allclose(np.linalg.norm(cells.centroids, axis=1), 1, atol=1e-5)
    assert fit_cells(items, 0).order.tobytes() == cells.order.tobytes()


@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_items_work(n: int) -> None:
    items = clustered(n, 4)
    found = IVFIndex(items, items, 0.97, 0).search(items, 10)
    np.testing.assert_array_equal(np.sort(found[0], axis=1), np.tile(np.arange(n), (n, 1)))


def test_equal_items_with_empty_cells() -> None:
    items = np.tile(clustered(1, 0), (300, 1))
    found = IVFIndex(items, items[:5], 0.97, 0).search(items[:5], 4)[0]
    assert found.shape == (5, 4)
    assert (found >= 0).all()


def test_recall_reaches_its_target_on_other_queries() -> None:
    items, queries = clustered(6000, 5), clustered(800, 6)
    found = IVFIndex(items, queries[:400], 0.97, 0)
    exact = ExactIndex(items).search(queries[400:], 10)
    rows, scores = found.search(queries[400:], 10)
    assert 0 < found.probing.probes < found.probing.cells
    assert found.probing.scanned < 0.25
    assert found.probing.recall >= 0.97
    assert recall_at(rows, exact[0], 10) >= 0.96
    np.testing.assert_allclose(np.take_along_axis(queries[400:] @ items.T, rows, 1), scores, atol=1e-5)
    assert (np.diff(scores, axis=1) <= 0).all()
    low = IVFIndex(items, queries[:400], 0.5, 0)
    assert low.probing.probes < found.probing.probes
    assert low.probing.recall < found.probing.recall


def test_without_structure_it_is_exact() -> None:
    random = np.random.default_rng(0)
    items, queries = unit(random.normal(size=(4000, 48))), unit(random.normal(size=(100, 48)))
    found = IVFIndex(items, queries, 0.97, 0)
    assert found.probing.probes == 0
    rows, scores = found.search(queries, 10)
    exact = ExactIndex(items).search(queries, 10)
    np.testing.assert_array_equal(rows, exact[0])
    np.testing.assert_array_equal(scores, exact[1])


def test_the_same_input_gives_the_same_rows_whatever_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    items, queries = clustered(3000, 7), clustered(500, 8)
    first = IVFIndex(items, queries[:200], 0.95, 3)
    again = IVFIndex(items, queries[:200], 0.95, 3)
    rows, scores = first.search(queries, 20)
    assert rows.tobytes() == again.search(queries, 20)[0].tobytes()
    monkeypatch.setattr("pipeline_steps.retrieve.index.ivf.QUERY_BATCH", 64)
    parts = first.search(queries, 20)
    np.testing.assert_allclose(parts[1], scores, atol=1e-6)
    assert recall_at(parts[0], rows, 20) > 0.999


@given(st.integers(0, 2**31), st.integers(1, 300), st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_probes_are_the_nearest_centroids(seed: int, n: int, probes: int) -> None:
    random = np.random.default_rng(seed)
    items, queries = unit(random.normal(size=(n, 4))), unit(random.normal(size=(3, 4)))
    cells = fit_cells(items, 0)
    probes = min(probes, len(cells))
    wanted = np.sort(queries @ cells.centroids.T, axis=1)[:, ::-1][:, :probes]
    got = np.take_along_axis(queries @ cells.centroids.T, probed_cells(cells, queries, probes), 1)
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert choose_probes(cells, queries, ExactIndex(items).search(queries, 3)[0], 0.999)[0] <= len(cells)


def test_the_choice_of_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def absent() -> bool:
        asked.append(True)
        return False

    monkeypatch.setattr(base, "cuda_found", absent)
    assert resolve_index(1000, 1000) == "exact"
    assert not asked, "small pools never look for a GPU: their outputs agree on all machines"
    assert resolve_index(20_000, 60_000) == "exact"
    assert resolve_index(250_000, 1_000_000) == "ivf"
    monkeypatch.setattr(base, "cuda_found", lambda: True)
    assert resolve_index(250_000, 1_000_000) == "torch"


@pytest.mark.parametrize("name", ["exact", "ivf", "annoy"])
def test_every_index_finds_the_nearest(name: str) -> None:
    items, queries = clustered(2000, 9), clustered(60, 10)
    index_class = INDEXES.get(name)
    config = index_class.config_class() if index_class.config_class else None
    found = index_class.build(items, queries, config, IndexSettings(0, 32, 60))
    assert found.n_items == 2000
    assert recall_at(found.search(queries, 10)[0], ExactIndex(items).search(queries, 10)[0], 10) > 0.95


def test_search_on_a_torch_device_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline_steps.retrieve.index.torch_exact.ITEM_BLOCK", 300)
    monkeypatch.setattr("pipeline_steps.retrieve.index.torch_exact.QUERY_BLOCK", 7)
    items, queries = clustered(1000, 11), clustered(30, 12)
    rows, scores = TorchExactIndex(items, "cpu").search(queries, 12)
    exact = ExactIndex(items).search(queries, 12)
    np.testing.assert_allclose(scores, exact[1], atol=1e-6)
    assert recall_at(rows, exact[0], 12) > 0.99
    assert TorchExactIndex(items[:3], "cpu").search(queries, 12)[0].shape == (30, 3)


@pytest.mark.fault
def test_a_missing_gpu_is_an_error() -> None:
    import torch

    if torch.cuda.is_available():
        assert TorchExactIndex(clustered(5, 0)).n_items == 5
        return
    with pytest.raises(ResourceError, match="no CUDA device") as failure:
        INDEXES.get("torch").build(clustered(5, 0), clustered(2, 1), None, IndexSettings())
    assert failure.value.exit_code == 4
