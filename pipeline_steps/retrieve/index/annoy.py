"""Annoy behind the `NearestNeighbours` protocol, and the side-car that is checked before Annoy maps a file.

Annoy maps whatever it is given: its only guard is a file size that is a multiple of its node size, so a damaged file can
kill the process. Hence the side-car (hash, dimension, metric, count, seed, fingerprint), and a first load in a child process.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from annoy import AnnoyIndex as NativeIndex

from pipeline_steps.core.array_types import FloatArray, IntArray
from pipeline_steps.core.errors import IntegrityError
from pipeline_steps.core.hashing import sha256_file

METRIC: Literal["dot"] = "dot"
CURE = "run: dvc repro --force retrieve"
PROBE_SECONDS = 120
PROBE = """
import sys
from annoy import AnnoyIndex
dimension, metric, n_items, path = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
index = AnnoyIndex(dimension, metric)
index.load(path)
if index.get_n_items() != n_items:
    sys.exit(3)
step = max(1, n_items // 16)
for item in range(0, n_items, step):
    rows = index.get_nns_by_vector(index.get_item_vector(item), 10, -1)
    if not all(0 <= row < n_items for row in rows):
        sys.exit(4)
"""


@dataclass(frozen=True, slots=True)
class IndexMetadata:
    """What is known of an index file: checked before the file is opened."""

    sha256: str
    bytes: int
    dimension: int
    metric: str
    n_items: int
    trees: int
    seed: int
    fingerprint: str

    def as_dict(self) -> dict[str, Any]:
        """Plain form for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Read the plain form.

        Raises:
            IntegrityError: a key is missing, unknown or of another type.
        """
        kinds = {"sha256": str, "metric": str, "fingerprint": str}
        names = list(cls.__dataclass_fields__)
        if not isinstance(value, Mapping) or sorted(value) != sorted(names):
            raise IntegrityError(f"the index's side-car must hold {', '.join(names)}", CURE)
        for name in names:
            if type(value[name]) is not kinds.get(name, int):
                raise IntegrityError(f"the index's side-car: {name} is {value[name]!r}", CURE)
        return cls(**value)


def build(items: FloatArray, trees: int, seed: int, path: Path, fingerprint: str) -> IndexMetadata:
    """Build an index of unit rows [N, D] into `path`; ids are 0..N-1, and the same input gives the same bytes.

    `n_jobs=1` because a parallel build differs from run to run even when seeded.
    """
    n_items, dimension = items.shape
    index = NativeIndex(dimension, METRIC)
    index.set_seed(seed)
    for row, vector in enumerate(items.tolist()):
        index.add_item(row, vector)
    index.build(trees, n_jobs=1)
    index.save(str(path))
    return IndexMetadata(sha256_file(path), path.stat().st_size, dimension, METRIC, n_items, trees, seed, fingerprint)


def validate_index(side_car: IndexMetadata, path: Path, dimension: int, n_items: int, fingerprint: str) -> None:
    """Refuse a file that is not what the side-car says, or a side-car that is not of these embeddings.

    Raises:
        IntegrityError: fingerprint, dimension, metric, count, size or hash differ; both values are printed.
    """
    expected = {"fingerprint": fingerprint, "dimension": dimension, "metric": METRIC, "n_items": n_items}
    for name, value in expected.items():
        if getattr(side_car, name) != value:
            raise IntegrityError(f"{path}: {name} of the index is {getattr(side_car, name)}, the embeddings have {value}", CURE)
    if not path.is_file():
        raise IntegrityError(f"{path} is missing", CURE)
    found: dict[str, object] = {"bytes": path.stat().st_size}
    if found["bytes"] == side_car.bytes:
        found["sha256"] = sha256_file(path)
    for name, value in found.items():
        if getattr(side_car, name) != value:
            raise IntegrityError(f"{path}: {name} is {value}, the side-car says {getattr(side_car, name)}", CURE)


def probe_in_subprocess(side_car: IndexMetadata, path: Path) -> None:
    """Load and query the file in a child process, which may die in place of this one.

    Raises:
        IntegrityError: INDEX_CRASH, the child was killed, hung or found rows that are not there.
    """
    command = [sys.executable, "-c", PROBE, str(side_car.dimension), side_car.metric, str(side_car.n_items), str(path)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise IntegrityError(f"INDEX_CRASH: {path} hangs when queried", CURE) from error
    if done.returncode:
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"code {done.returncode}"
        raise IntegrityError(f"INDEX_CRASH: a child process that queried {path} ended with {how}", CURE)


class AnnoyIndex:
    """Approximate neighbours from a checked index file: memory-mapped, meant for single interactive queries.

    Args:
        side_car: read from the file beside the index.
        path: the index.
        search_k: nodes inspected per query; -1 is Annoy's default, far too low for text -> sound.
        dimension, n_items, fingerprint: of the embeddings the index must belong to.

    Raises:
        IntegrityError: see `check` and `probe`.
    """

    def __init__(
        self, side_car: IndexMetadata, path: Path, search_k: int, dimension: int, n_items: int, fingerprint: str
    ) -> None:
        validate_index(side_car, path, dimension, n_items, fingerprint)
        probe_in_subprocess(side_car, path)
        self._index = NativeIndex(side_car.dimension, METRIC)
        self._index.load(str(path))
        self._search_k = search_k
        self._n_items = side_car.n_items

    @property
    def n_items(self) -> int:
        return self._n_items

    def search(self, queries: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
        """See `NearestNeighbours.search`; a query for which Annoy finds fewer is filled up with row -1 and score -inf."""
        k = min(k, self._n_items)
        rows = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        for number, query in enumerate(queries):
            found, values = self._index.get_nns_by_vector(query.tolist(), k, self._search_k, include_distances=True)
            rows[number, : len(found)] = found
            scores[number, : len(values)] = values
        return rows, scores
