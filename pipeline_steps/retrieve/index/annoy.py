"""Vector index `annoy`: random projection trees, for single interactive queries, kept in a checked file.

Annoy maps a file after checking only that its size is a multiple of the node size, so a damaged file can kill the process. A
metadata file (hash, dimension, metric, count, seed, fingerprint) is therefore checked first, and a child process loads the
index before this one does.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Literal, Self

import numpy as np
from annoy import AnnoyIndex as NativeIndex
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline_steps.core.array_types import FloatArray, IntArray
from pipeline_steps.core.checksums import verified_sha256
from pipeline_steps.core.config import StageConfig
from pipeline_steps.core.errors import ConfigError, IntegrityError
from pipeline_steps.core.hashing import sha256_file
from pipeline_steps.retrieve.index.base import INDEXES, IndexSettings, VectorIndex

METRIC: Literal["dot"] = "dot"
ACTION = "run: dvc repro --force retrieve"
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


class IndexMetadata(BaseModel):
    """Metadata of an index file, checked before the file is opened."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    sha256: str
    bytes: int
    dimension: int
    metric: str
    n_items: int
    trees: int
    seed: int
    fingerprint: str

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Metadata from the content of `index.json`.

        Raises:
            IntegrityError: it is not JSON, a key is missing or unknown, or a value has another type.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            problem = error.errors()[0]
            raise IntegrityError(f"index.json: {'.'.join(map(str, problem['loc']))}: {problem['msg']}", ACTION) from error


def _build_native(items: FloatArray, trees: int, seed: int) -> NativeIndex:
    """Annoy's index of unit rows [N, D] with ids 0..N-1.

    `n_jobs=1`, because a parallel build differs from run to run even with a seed.
    """
    index = NativeIndex(items.shape[1], METRIC)
    index.set_seed(seed)
    for row, vector in enumerate(items.tolist()):
        index.add_item(row, vector)
    index.build(trees, n_jobs=1)
    return index


def write_index(items: FloatArray, trees: int, seed: int, path: Path, fingerprint: str) -> IndexMetadata:
    """Write an index of unit rows [N, D] to `path`; the same input gives the same bytes."""
    n_items, dimension = items.shape
    _build_native(items, trees, seed).save(str(path))
    return IndexMetadata(
        sha256=sha256_file(path), bytes=path.stat().st_size, dimension=dimension, metric=METRIC, n_items=n_items, trees=trees,
        seed=seed, fingerprint=fingerprint,
    )  # fmt: skip


def validate_index(metadata: IndexMetadata, path: Path, dimension: int, n_items: int, fingerprint: str) -> None:
    """Check that the metadata describe the file and that they belong to these embeddings.

    Raises:
        IntegrityError: fingerprint, dimension, metric, count, size or hash differ; the message has both values.
    """
    expected = {"fingerprint": fingerprint, "dimension": dimension, "metric": METRIC, "n_items": n_items}
    for name, value in expected.items():
        if (own := getattr(metadata, name)) != value:
            raise IntegrityError(f"{path}: {name} of the index is {own}, the embeddings have {value}", ACTION)
    if not path.is_file():
        raise IntegrityError(f"{path} is missing", ACTION)
    found: dict[str, object] = {"bytes": path.stat().st_size}
    if found["bytes"] == metadata.bytes:
        found["sha256"] = verified_sha256(path)
    for name, value in found.items():
        if getattr(metadata, name) != value:
            raise IntegrityError(f"{path}: {name} is {value}, index.json says {getattr(metadata, name)}", ACTION)


def probe_in_subprocess(metadata: IndexMetadata, path: Path) -> None:
    """Load and query the file in a child process, which a damaged file may kill.

    Raises:
        IntegrityError: INDEX_CRASH, the child was killed, did not finish, or found rows outside the index.
    """
    command = [sys.executable, "-c", PROBE, str(metadata.dimension), metadata.metric, str(metadata.n_items), str(path)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise IntegrityError(f"INDEX_CRASH: {path}: a query does not finish", ACTION) from error
    if done.returncode:
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"code {done.returncode}"
        raise IntegrityError(f"INDEX_CRASH: a child process that queried {path} ended with {how}", ACTION)


class AnnoyIndexConfig(StageConfig):
    """Group `retrieve.annoy`."""

    trees: int = Field(100, ge=0, le=2000, description="trees of the index for single queries; 0: none is built")
    search_k: int = Field(20_000, ge=1, le=100_000_000, description="nodes that Annoy inspects per query")
    min_recall: float = Field(0.95, ge=0, le=1, description="recall@10 against exact search; the stage fails below it")


@INDEXES.register("annoy")
class AnnoyIndex(VectorIndex):
    """Approximate index by Annoy.

    Args:
        native: Annoy's index.
        search_k: nodes inspected per query; -1 is Annoy's default, which is far too low for text -> audio.
    """

    config_class = AnnoyIndexConfig

    def __init__(self, native: NativeIndex, search_k: int) -> None:
        self._index = native
        self._search_k = search_k
        self._n_items: int = native.get_n_items()

    @classmethod
    def build(cls, items: FloatArray, queries: FloatArray, config: AnnoyIndexConfig, settings: IndexSettings) -> Self:
        """Index in memory.

        Raises:
            ConfigError: the configuration has no trees.
        """
        if not config.trees:
            raise ConfigError(
                "retrieve.annoy.trees is 0, and retrieve.index is annoy", "raise it, or set retrieve.index to auto"
            )
        return cls(_build_native(items, config.trees, settings.seed), config.search_k)

    @classmethod
    def open(cls, metadata: IndexMetadata, path: Path, search_k: int, dimension: int, n_items: int, fingerprint: str) -> Self:
        """Index from a memory-mapped file, after every check.

        `dimension`, `n_items` and `fingerprint` are those of the embeddings that the index must belong to.

        Raises:
            IntegrityError: see `validate_index` and `probe_in_subprocess`.
        """
        validate_index(metadata, path, dimension, n_items, fingerprint)
        probe_in_subprocess(metadata, path)
        native = NativeIndex(metadata.dimension, METRIC)
        native.load(str(path))
        return cls(native, search_k)

    @property
    def n_items(self) -> int:
        return self._n_items

    def search(self, queries: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
        k = min(k, self._n_items)
        rows = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        for number, query in enumerate(queries):
            found, values = self._index.get_nns_by_vector(query.tolist(), k, self._search_k, include_distances=True)
            rows[number, : len(found)] = found
            scores[number, : len(values)] = values
        return rows, scores
