"""Time of the matrix step of a Frechet distance, compared with scipy's matrix square root.

    python -m benchmarks.frechet [--dimension 2048] [--rows 3000] [--rounds 1]

Processor seconds on one thread; the sides run in turn, and the best round counts. Both start from the same two sets of
features. The project's function includes one covariance. The two covariances of the square root are timed separately, and both
ratios, with and without them, are printed.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

import argparse
import time

import numpy as np
from scipy.linalg import sqrtm

from pipeline_steps.evaluate.metrics.distribution import frechet_distance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimension", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    d, n = arguments.dimension, arguments.rows
    random = np.random.default_rng(0)
    mixing = random.standard_normal((d, d)) * np.exp(-np.arange(d) / 300) / 30
    x, y = random.standard_normal((n, d)) @ mixing, random.standard_normal((n, d)) @ mixing * 1.05 + 0.01
    best = {"covariances": float("inf"), "sqrtm": float("inf"), "ours": float("inf")}
    values = {}
    for _ in range(arguments.rounds):
        begin = time.process_time()
        cx, cy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
        best["covariances"] = min(best["covariances"], time.process_time() - begin)
        begin = time.process_time()
        root = np.trace(sqrtm(cx @ cy)).real
        best["sqrtm"] = min(best["sqrtm"], time.process_time() - begin)
        values["sqrtm"] = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cx) + np.trace(cy) - 2 * root
        begin = time.process_time()
        values["ours"] = frechet_distance(x, y)
        best["ours"] = min(best["ours"], time.process_time() - begin)
    print(f"{n} rows, {d} dimensions, load {os.getloadavg()[0]:.1f}")
    covariances = f"{best['covariances']:.2f} s for both covariances"
    print(f"scipy sqrtm of the product {best['sqrtm']:8.2f} s, and {covariances}: {values['sqrtm']:.8f}")
    print(f"ours, features to distance {best['ours']:8.2f} s: {values['ours']:.8f}")
    print(f"whole step against whole step {(best['sqrtm'] + best['covariances']) / best['ours']:.1f} times; "
          f"sqrtm alone against our whole step {best['sqrtm'] / best['ours']:.1f} times; "
          f"relative difference {abs(values['ours'] / values['sqrtm'] - 1):.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
