"""Rate and recall of exact and batched nearest-neighbor search, compared with other libraries.

    python -m benchmarks.search [--items 100000 1000000] [--queries 2000] [--batch 20000] [--set clustered structureless]
                                [--peers flat ivf hnswlib annoy usearch] [--rounds 3]

Vectors have 512 dimensions and unit length; the clustered set has a thousand topics of unequal size and a modality gap between
queries and items (see benchmarks/retrieve_pair_scaling.py), the structureless one is random directions. Rates are
per processor second on one thread; the methods run in turn, and the best round counts. Peers are optional
(`pip install seeing-sound[bench]`) and left out if not installed. Recall is that of the first 10 neighbors.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

import argparse
import time
from collections.abc import Callable

import numpy as np

from benchmarks.retrieve_pair_scaling import DIMENSION, World, unit
from pipeline_steps.retrieve.index.base import recall_at
from pipeline_steps.retrieve.index.exact import ExactIndex
from pipeline_steps.retrieve.index.ivf import IVFIndex

K = 10
Search = Callable[[np.ndarray], np.ndarray]


def vectors(kind: str, items: int, queries: int) -> tuple[np.ndarray, np.ndarray]:
    if kind == "clustered":
        world = World()
        return world.draw(items, 5, text=False), world.draw(queries, 6, text=True)
    random = np.random.default_rng(0)
    return tuple(unit(random.standard_normal((count, DIMENSION), dtype=np.float32)) for count in (items, queries))  # type: ignore[return-value]


def product(items: np.ndarray) -> Search:
    """Matrix product without selection: the upper limit of exact search."""

    def run(queries: np.ndarray) -> np.ndarray:
        out = np.empty((1024, 8192), np.float32)
        for start in range(0, len(queries), 1024):
            some = queries[start : start + 1024]
            for at in range(0, len(items), 8192):
                block = items[at : at + 8192]
                np.matmul(some, block.T, out=out[: len(some), : len(block)])
        return np.zeros((len(queries), K), np.int64)

    return run


def peer(name: str, items: np.ndarray) -> Search | None:
    """Search by a library with its index built; None if the library is not installed."""
    try:
        if name == "flat":
            import faiss

            faiss.omp_set_num_threads(1)
            flat = faiss.IndexFlatIP(items.shape[1])
            flat.add(items)
            return lambda queries: flat.search(queries, K)[1]
        if name == "ivf":
            import faiss

            faiss.omp_set_num_threads(1)
            cells = int(2 ** round(np.log2(len(items)) / 2))
            index = faiss.IndexIVFFlat(faiss.IndexFlatIP(items.shape[1]), items.shape[1], cells, faiss.METRIC_INNER_PRODUCT)
            index.cp.max_points_per_centroid = 40
            index.train(items[:: max(1, len(items) // (40 * cells))])
            index.add(items)
            index.nprobe = 32
            return lambda queries: index.search(queries, K)[1]
        if name == "hnswlib":
            import hnswlib

            graph = hnswlib.Index("ip", items.shape[1])
            graph.init_index(len(items), M=16, ef_construction=200, random_seed=0)
            graph.set_num_threads(1)
            graph.add_items(items)
            graph.set_ef(100)
            return lambda queries: graph.knn_query(queries, K, num_threads=1)[0].astype(np.int64)
        if name == "annoy":
            from annoy import AnnoyIndex

            trees = AnnoyIndex(items.shape[1], "dot")
            trees.set_seed(0)
            for row, vector in enumerate(items.tolist()):
                trees.add_item(row, vector)
            trees.build(100 if len(items) < 500_000 else 20, n_jobs=1)
            return lambda queries: np.array([trees.get_nns_by_vector(query.tolist(), K, 50_000) for query in queries])
        from usearch.index import Index

        usearch = Index(ndim=items.shape[1], metric="ip", dtype="f16")
        usearch.add(np.arange(len(items)), items, threads=1)
        return lambda queries: usearch.search(queries, K, threads=1).keys.astype(np.int64)
    except ImportError:
        return None


def measured(name: str, build: Callable[[], Search | None], count: int) -> tuple[str, Search, int, float] | None:
    begin = time.process_time()
    search = build()
    return None if search is None else (name, search, count, time.process_time() - begin)


def compare(kind: str, n: int, arguments: argparse.Namespace) -> None:
    items, queries = vectors(kind, n, arguments.batch + 500)
    sample, tested = queries[-500:], queries[:-500]
    exact = ExactIndex(items)
    few = min(arguments.queries, 1024 if n >= 500_000 else arguments.queries)
    clusters: list[IVFIndex] = []

    def cells() -> Search:
        clusters.append(IVFIndex(items, sample, 0.97, 0))
        return lambda some: clusters[0].search(some, K)[0]

    slow = min(few, 256)
    made = [
        measured("matrix product", lambda: product(items), few),
        measured("ours, exact", lambda: lambda some: exact.search(some, K)[0], few),
        measured("ours, ivf", cells, arguments.batch),
    ]
    titles = {"flat": "faiss IndexFlatIP", "ivf": "faiss IVF, 32 probes", "hnswlib": "hnswlib, ef 100",
              "annoy": "annoy, 50 000 nodes", "usearch": "usearch, f16"}  # fmt: skip
    for name in arguments.peers:
        made.append(measured(titles[name], lambda name=name: peer(name, items), slow if name in ("flat", "annoy") else few))
    methods = [one for one in made if one is not None]
    truth = exact.search(tested[:few], K)[0]
    best = dict.fromkeys((name for name, *_ in methods), 0.0)
    recall: dict[str, float] = {}
    for _ in range(arguments.rounds):
        for name, search, count, _built in methods:
            begin = time.process_time()
            rows = search(tested[:count])
            best[name] = max(best[name], count / (time.process_time() - begin))
            shared = min(count, few)
            recall[name] = recall_at(rows[:shared], truth[:shared], K)
    print(f"\n{kind}, {n} items, {arguments.batch} queries in a batch, load {os.getloadavg()[0]:.1f}; {clusters[0].probing}")
    print(f"{'method':22} {'build cpu s':>11} {'queries/s':>10} {'of product':>10} {'x exact':>8} {'recall@10':>9}")
    for name, _, _, built in methods:
        found = "" if name == "matrix product" else f"{recall[name]:9.4f}"
        rate = best[name]
        ratios = f"{rate / best['matrix product']:10.2f} {rate / best['ours, exact']:8.2f}"
        print(f"{name:22} {built:11.1f} {rate:10.1f} {ratios} {found}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[100_000])
    parser.add_argument("--queries", type=int, default=2000, help="queries for exact methods and graphs")
    parser.add_argument("--batch", type=int, default=20_000, help="queries of the batched search")
    parser.add_argument("--set", nargs="+", default=["clustered"], choices=["clustered", "structureless"])
    parser.add_argument("--peers", nargs="*", default=["flat", "ivf", "hnswlib", "annoy", "usearch"])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    for kind in arguments.set:
        for n in arguments.items:
            compare(kind, n, arguments)


if __name__ == "__main__":
    main()
