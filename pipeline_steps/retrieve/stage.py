"""Stage `retrieve`: the nearest pool clips of each event text, calibrated and hubness-corrected, and the interactive index."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.core.atomic import atomic_path, write_json
from pipeline_steps.core.checksums import read_verified, record_checksums, verified_sha256
from pipeline_steps.core.errors import DataError, IntegrityError
from pipeline_steps.core.hashing import fingerprint
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import AUDIO, AUDIO_IDS, EVENTS, IMAGES, NEIGHBORS, TEXT_IDS
from pipeline_steps.core.seeding import seeded_rng
from pipeline_steps.core.stage_report import StageReport
from pipeline_steps.core.tables import read_table, write_table
from pipeline_steps.retrieve.config import RetrieveConfig
from pipeline_steps.retrieve.index.annoy import AnnoyIndex, AnnoyIndexConfig, IndexMetadata, write_index
from pipeline_steps.retrieve.index.base import INDEXES, VectorIndex, recall_at, resolve_index
from pipeline_steps.retrieve.index.exact import ExactIndex
from pipeline_steps.retrieve.ranking import REPORT_K, RankedNeighbors, hubness_report, rank_neighbors

__all__ = ["RetrieveConfig", "open_pool_index", "read_vectors", "run"]

log = logging.getLogger(__name__)

ACTION = "run: dvc repro --force embed"

FINITE_ROWS = 65_536
"""Rows checked for NaN at a time, so that a file larger than memory can be checked."""

TABLE_ROWS = 4_000_000
"""Rows of one chunk of the neighbor table: a chunk of strings must stay below 2 GB."""


def read_vectors(layout: ProjectPaths) -> tuple[dict[str, Any], FloatArray, list[str], FloatArray, list[str]]:
    """Embeddings: `meta.json`, text vectors [T, D] and ids, audio vectors [N, D] and ids, checked against `meta.json`.

    Raises:
        DataError: `meta.json` is missing.
        IntegrityError: bytes, shapes or counts are not those in `meta.json`.
    """
    folder = layout.embeddings
    if not (folder / "meta.json").is_file():
        raise DataError(f"{folder / 'meta.json'} is missing", "run: dvc repro embed")
    try:
        meta = json.loads(read_verified(folder / "meta.json"))
        hashes = {"text.npy": str(meta["sha256"]["text.npy"]), "audio.npy": str(meta["sha256"]["audio.npy"])}
        dimension = int(meta["dimension"])
        _ = str(meta["fingerprint"])
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{folder / 'meta.json'} is damaged: {error}", ACTION) from error
    text_ids = read_table(folder / "text_ids.parquet", TEXT_IDS)["text_id"].to_pylist()
    audio_ids = read_table(folder / "audio_ids.parquet", AUDIO_IDS)["audio_id"].to_pylist()
    texts = _matrix(folder / "text.npy", hashes["text.npy"], (len(text_ids), dimension))
    audio = _matrix(folder / "audio.npy", hashes["audio.npy"], (len(audio_ids), dimension))
    return meta, texts, text_ids, audio, audio_ids


def _matrix(path: Path, sha256: str, shape: tuple[int, int]) -> FloatArray:
    """Memory-mapped matrix (writes stay private), after its bytes and values were checked."""
    found = verified_sha256(path) if path.is_file() else "missing"
    if found != sha256:
        raise IntegrityError(f"{path}: sha256 is {found}, meta.json says {sha256}", ACTION)
    rows = np.asarray(np.load(path, mmap_mode="c", allow_pickle=False))
    finite = rows.dtype == np.float32 and all(
        np.isfinite(rows[start : start + FINITE_ROWS]).all() for start in range(0, len(rows), FINITE_ROWS)
    )
    if rows.shape != shape or not finite:
        raise IntegrityError(f"{path}: {rows.dtype} {rows.shape}, expected float32 {shape}, finite", ACTION)
    return rows


def _pool_audio_ids(layout: ProjectPaths) -> pa.Array:
    """Ids of the clips that are not held out."""
    catalog = read_table(layout.catalog / "audio.parquet", AUDIO).select(["audio_id", "holdout"])
    return catalog.filter(pc.invert(catalog["holdout"]))["audio_id"].combine_chunks()


def _pool_text_ids(layout: ProjectPaths) -> pa.Array:
    """Ids of the texts that belong to an image that is not held out, in the catalog or not."""
    catalog = read_table(layout.catalog / "images.parquet", IMAGES).select(["image_id", "holdout"])
    held_out = catalog.filter(catalog["holdout"])["image_id"].combine_chunks()
    events = read_table(layout.captions / "events.parquet", EVENTS).select(["image_id", "text_id"])
    return pc.unique(events.filter(pc.invert(pc.is_in(events["image_id"], value_set=held_out)))["text_id"].combine_chunks())


def _rows_of(ids: list[str], wanted: pa.Array) -> list[int]:
    """Rows whose id is among `wanted`."""
    inside = pc.is_in(pa.array(ids, pa.string()), value_set=wanted)
    return [int(row) for row in np.flatnonzero(inside.to_numpy(zero_copy_only=False))]


def _select(vectors: FloatArray, rows: list[int]) -> FloatArray:
    """Rows of `vectors`, without a copy if these are all rows."""
    return vectors if len(rows) == len(vectors) else vectors[rows]


def _index_fingerprint(meta: dict[str, Any]) -> str:
    """Fingerprint of the indexed vectors: of the space and of their bytes."""
    return fingerprint([meta["fingerprint"], meta["sha256"]["audio.npy"]])


def _open_index(layout: ProjectPaths, search_k: int, dimension: int, n_items: int, expected: str) -> AnnoyIndex:
    """The interactive index, after every check.

    Raises:
        IntegrityError: the metadata or the index are missing or damaged, or belong to other embeddings.
    """
    path = layout.retrieval / "index.json"
    if not path.is_file():
        raise IntegrityError(f"{path} is missing", "run: dvc repro --force retrieve")
    metadata = IndexMetadata.from_json(read_verified(path).decode("utf-8", "replace"))
    return AnnoyIndex.open(metadata, layout.retrieval / "index.ann", search_k, dimension, n_items, expected)


def open_pool_index(layout: ProjectPaths, config: RetrieveConfig) -> tuple[VectorIndex, FloatArray, list[str]]:
    """The interactive index with the vectors [N, D] and ids of the pool clips behind its rows; exact if none was built.

    Raises:
        DataError, IntegrityError: the embeddings or the index are missing or damaged, or do not belong together.
    """
    meta, _, _, audio_vectors, audio_ids = read_vectors(layout)
    rows = _rows_of(audio_ids, _pool_audio_ids(layout))
    vectors, ids = _select(audio_vectors, rows), [audio_ids[row] for row in rows]
    if not (layout.retrieval / "index.json").exists() and not (layout.retrieval / "index.ann").exists():
        return ExactIndex(vectors), vectors, ids
    search_k = config.implementation_config("annoy").search_k
    return _open_index(layout, search_k, vectors.shape[1], len(rows), _index_fingerprint(meta)), vectors, ids


def run(config: RetrieveConfig, layout: ProjectPaths) -> StageReport:
    """Find the neighbors of every text of a pool image, among pool clips only.

    Raises:
        DataError: there is no pool text or clip, or Annoy's recall@10 is below `annoy.min_recall`.
        IntegrityError: the embeddings are not those in their `meta.json`.
        ResourceError: the index needs a GPU and there is none.
    """
    report = StageReport("retrieve")
    meta, text_vectors, text_ids, audio_vectors, audio_ids = read_vectors(layout)
    audio_rows = _rows_of(audio_ids, _pool_audio_ids(layout))
    text_rows = _rows_of(text_ids, _pool_text_ids(layout))
    if not audio_rows or not text_rows:
        raise DataError(
            f"nothing to retrieve: {len(text_rows)} texts of pool images, {len(audio_rows)} pool clips",
            "see the quarantine and abstention tables of the stages before",
        )
    if config.k > len(audio_rows):
        log.warning("retrieve.k is %d, the pool has %d clips: all of them are neighbors", config.k, len(audio_rows))
    audio, texts = _select(audio_vectors, audio_rows), _select(text_vectors, text_rows)
    correction = config.hubness_correction
    with record_checksums("retrieve", layout.retrieval):
        annoy, recall = _interactive_index(config, layout, audio, texts, _index_fingerprint(meta))
        name, index, text_index = _build_indexes(config, audio, texts, annoy)
        ranked = rank_neighbors(
            index, texts, audio, config.k, correction, config.null_sample_size, config.seed, config.query_batch_size, text_index
        )
        _write(layout, ranked, [text_ids[row] for row in text_rows], [audio_ids[row] for row in audio_rows])
    report.n_in = report.n_ok = len(texts)
    report.cache_misses = len(texts)
    report.metrics = {
        "sounds": len(audio),
        "index": name,
        "hubness_correction": correction.method,
        "annoy_recall_at_10": None if recall is None else round(recall, 4),
        "hubness": hubness_report(ranked.nearest[:, : config.k], ranked.rows, len(audio)),
        "embeddings": meta["fingerprint"],
        "families": meta.get("families", []),
    }
    for key, built in ((name, index), (f"{name}_among_texts", text_index)):
        if built is not None and (figures := built.metrics()):
            report.metrics[key] = figures
    return report


def _interactive_index(
    config: RetrieveConfig, layout: ProjectPaths, audio: FloatArray, texts: FloatArray, index_fingerprint: str
) -> tuple[AnnoyIndex | None, float | None]:
    """Build the interactive index and measure its recall@10; without trees, remove the files of an earlier index."""
    group: AnnoyIndexConfig = config.implementation_config("annoy")
    if not group.trees:
        for name in ("index.json", "index.ann"):
            (layout.retrieval / name).unlink(missing_ok=True)
        return None, None
    with atomic_path(layout.retrieval / "index.ann") as temporary:
        metadata = write_index(audio, group.trees, config.seed, temporary, index_fingerprint)
    write_json(layout.retrieval / "index.json", metadata.model_dump())
    annoy = _open_index(layout, group.search_k, audio.shape[1], len(audio), index_fingerprint)
    return annoy, _check_recall(config, group, ExactIndex(audio, config.query_batch_size), annoy, texts)


def _build_indexes(
    config: RetrieveConfig, audio: FloatArray, texts: FloatArray, annoy: AnnoyIndex | None
) -> tuple[str, VectorIndex, VectorIndex | None]:
    """Name of the index, index of the audio, and index of the texts for CSLS (None: exact search)."""
    name = resolve_index(len(texts), len(audio)) if config.index == "auto" else config.index
    index_class, group, settings = INDEXES.get(name), config.implementation_config(name), config.index_settings
    prebuilt = annoy if index_class is AnnoyIndex else None
    index = prebuilt or index_class.build(audio, texts, group, settings)
    if not index_class.indexes_texts or config.hubness_correction.method != "csls":
        return name, index, None
    return name, index, index_class.build(texts, audio, group, settings)


def _check_recall(
    config: RetrieveConfig, group: AnnoyIndexConfig, exact: ExactIndex, annoy: AnnoyIndex, texts: FloatArray
) -> float:
    """Recall@10 of Annoy against exact search on a sample of the texts.

    Raises:
        DataError: it is below `annoy.min_recall`.
    """
    sample = np.sort(seeded_rng(config.seed, "retrieve", "recall").permutation(len(texts))[: config.recall_sample_size])
    recall = recall_at(annoy.search(texts[sample], REPORT_K)[0], exact.search(texts[sample], REPORT_K)[0], REPORT_K)
    if recall < group.min_recall:
        raise DataError(
            f"recall@{REPORT_K} of Annoy is {recall:.3f} on {len(sample)} texts, "
            f"below retrieve.annoy.min_recall {group.min_recall}",
            f"raise retrieve.annoy.search_k (now {group.search_k}) or retrieve.annoy.trees (now {group.trees})",
        )
    return recall


def _write(layout: ProjectPaths, ranked: RankedNeighbors, text_ids: list[str], audio_ids: list[str]) -> None:
    """Write the neighbors, without candidates that an approximate index did not find."""
    places = ranked.rows.shape[1]
    keys, names = pa.array(text_ids, pa.string()), pa.array(audio_ids, pa.string())
    step = max(1, TABLE_ROWS // places)
    chunks = []
    for start in range(0, len(text_ids), step):
        part = slice(start, start + step)
        found = ranked.rows[part].reshape(-1)
        kept = np.flatnonzero(found >= 0)
        numbers = {name: getattr(ranked, name)[part].reshape(-1)[kept] for name in ("score", "z_score", "corrected_score")}
        columns = {
            "text_id": keys.take(pa.array(start + kept // places)),
            "rank": pa.array((kept % places).astype(np.int16)),
            "audio_id": names.take(pa.array(found[kept])),
            **{name: pa.array(values.astype(np.float32)) for name, values in numbers.items()},
        }
        chunks.append(pa.table(columns, schema=NEIGHBORS.schema))
    write_table(layout.retrieval / "neighbors.parquet", NEIGHBORS, pa.concat_tables(chunks))
