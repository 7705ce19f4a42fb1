"""Stage `retrieve`: each event text -> its nearest pool sounds, calibrated and with hubs damped; and the interactive index."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.core.atomic import atomic_path, write_json
from pipeline_steps.core.errors import ConfigError, DataError, IntegrityError
from pipeline_steps.core.hashing import fingerprint, sha256_file
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import AUDIO, AUDIO_IDS, EVENTS, IMAGES, NEIGHBOURS, TEXT_IDS
from pipeline_steps.core.seeding import seeded_rng
from pipeline_steps.core.stage_report import StageReport
from pipeline_steps.core.tables import read_table, write_table
from pipeline_steps.retrieve.config import RetrieveConfig
from pipeline_steps.retrieve.index.annoy import AnnoyIndex, IndexMetadata, build
from pipeline_steps.retrieve.index.base import VectorIndex, recall_at
from pipeline_steps.retrieve.index.exact import ExactIndex
from pipeline_steps.retrieve.index.factory import build_index, resolve_backend
from pipeline_steps.retrieve.index.ivf import IVFIndex
from pipeline_steps.retrieve.index.torch_exact import TorchExactIndex
from pipeline_steps.retrieve.ranking import REPORT_K, RankedNeighbours, hub_report, rank_neighbours

__all__ = ["RetrieveConfig", "open_index", "open_pool_index", "read_vectors", "run"]

log = logging.getLogger(__name__)

REMAKE = "run: dvc repro --force embed"

FINITE_ROWS = 65_536
"""Rows checked for NaN at a time, so that a file larger than memory can be checked."""

TABLE_ROWS = 4_000_000
"""Rows of one chunk of the neighbour table: a chunk of strings must stay below 2 GB."""


def read_vectors(layout: ProjectPaths) -> tuple[dict[str, Any], FloatArray, list[str], FloatArray, list[str]]:
    """The embeddings: meta, text vectors [T, D] and ids, sound vectors [N, D] and ids, checked against `meta.json`.

    Raises:
        IntegrityError: bytes, shapes or counts are not those that `meta.json` names.
    """
    folder = layout.embeddings
    if not (folder / "meta.json").is_file():
        raise DataError(f"{folder / 'meta.json'} is missing", "run: dvc repro embed")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        hashes = {"text.npy": str(meta["sha256"]["text.npy"]), "audio.npy": str(meta["sha256"]["audio.npy"])}
        dimension = int(meta["dimension"])
        _ = str(meta["fingerprint"])
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{folder / 'meta.json'} is damaged: {error}", REMAKE) from error
    text_ids = read_table(folder / "text_ids.parquet", TEXT_IDS)["text_id"].to_pylist()
    audio_ids = read_table(folder / "audio_ids.parquet", AUDIO_IDS)["audio_id"].to_pylist()
    texts = _matrix(folder / "text.npy", hashes["text.npy"], (len(text_ids), dimension))
    sounds = _matrix(folder / "audio.npy", hashes["audio.npy"], (len(audio_ids), dimension))
    return meta, texts, text_ids, sounds, audio_ids


def _matrix(path: Path, sha256: str, shape: tuple[int, int]) -> FloatArray:
    """A matrix, memory-mapped (writes stay private), after its bytes and values were checked."""
    found = sha256_file(path) if path.is_file() else "missing"
    if found != sha256:
        raise IntegrityError(f"{path}: sha256 is {found}, meta.json says {sha256}", REMAKE)
    rows = np.asarray(np.load(path, mmap_mode="c", allow_pickle=False))
    finite = rows.dtype == np.float32 and all(
        np.isfinite(rows[start : start + FINITE_ROWS]).all() for start in range(0, len(rows), FINITE_ROWS)
    )
    if rows.shape != shape or not finite:
        raise IntegrityError(f"{path}: {rows.dtype} {rows.shape}, expected float32 {shape}, finite", REMAKE)
    return rows


def _pool_sounds(layout: ProjectPaths) -> pa.Array:
    """Ids of the sounds that may be paired."""
    catalog = read_table(layout.catalog / "audio.parquet", AUDIO).select(["audio_id", "holdout"])
    return catalog.filter(pc.invert(catalog["holdout"]))["audio_id"].combine_chunks()


def _pool_text_ids(layout: ProjectPaths) -> pa.Array:
    """Ids of the texts that a pool picture suggests; of a picture that is not in the catalog too."""
    catalog = read_table(layout.catalog / "images.parquet", IMAGES).select(["image_id", "holdout"])
    held_out = catalog.filter(catalog["holdout"])["image_id"].combine_chunks()
    events = read_table(layout.captions / "events.parquet", EVENTS).select(["image_id", "text_id"])
    return pc.unique(events.filter(pc.invert(pc.is_in(events["image_id"], value_set=held_out)))["text_id"].combine_chunks())


def _rows_of(ids: list[str], wanted: pa.Array) -> list[int]:
    """Rows whose id is wanted."""
    inside = pc.is_in(pa.array(ids, pa.string()), value_set=wanted)
    return [int(row) for row in np.flatnonzero(inside.to_numpy(zero_copy_only=False))]


def _select(vectors: FloatArray, rows: list[int]) -> FloatArray:
    """These rows; all of them without a copy."""
    return vectors if len(rows) == len(vectors) else vectors[rows]


def _space(meta: dict[str, Any]) -> str:
    """Fingerprint of the indexed vectors: the space and the very bytes."""
    return fingerprint([meta["fingerprint"], meta["sha256"]["audio.npy"]])


def open_index(layout: ProjectPaths, search_k: int, dimension: int, n_items: int, space: str) -> AnnoyIndex:
    """Open the interactive index after every check.

    Raises:
        IntegrityError: the side-car or the index is missing, damaged, or of other embeddings.
    """
    path = layout.retrieval / "index.json"
    try:
        side_car = IndexMetadata.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path} is missing or damaged: {error}", "run: dvc repro --force retrieve") from error
    return AnnoyIndex(side_car, layout.retrieval / "index.ann", search_k, dimension, n_items, space)


def open_pool_index(layout: ProjectPaths, search_k: int) -> tuple[VectorIndex, FloatArray, list[str]]:
    """The interactive index with the vectors [N, D] and ids of the pool sounds behind its rows; a scan if none was built.

    Raises:
        IntegrityError: see `read_vectors` and `open_index`.
    """
    meta, _, _, audio_vectors, audio_ids = read_vectors(layout)
    rows = _rows_of(audio_ids, _pool_sounds(layout))
    vectors, ids = _select(audio_vectors, rows), [audio_ids[row] for row in rows]
    if not (layout.retrieval / "index.json").exists() and not (layout.retrieval / "index.ann").exists():
        return ExactIndex(vectors), vectors, ids
    return open_index(layout, search_k, vectors.shape[1], len(rows), _space(meta)), vectors, ids


def run(config: RetrieveConfig, layout: ProjectPaths) -> StageReport:
    """Find the neighbours of every text that a pool picture suggests, among pool sounds only.

    Raises:
        DataError: no pool text or sound, or Annoy's recall@10 is below `recall_floor`.
        IntegrityError: the embeddings are not what their `meta.json` says.
        ResourceError: a GPU is asked for and there is none.
    """
    report = StageReport("retrieve")
    meta, text_vectors, text_ids, audio_vectors, audio_ids = read_vectors(layout)
    sound_rows = _rows_of(audio_ids, _pool_sounds(layout))
    text_rows = _rows_of(text_ids, _pool_text_ids(layout))
    if not sound_rows or not text_rows:
        raise DataError(
            f"nothing to retrieve: {len(text_rows)} texts of pool pictures, {len(sound_rows)} pool sounds",
            "see the quarantine and abstention tables of the stages before",
        )
    if config.k > len(sound_rows):
        log.warning("retrieve.k is %d, the pool has %d sounds: all of them are neighbours", config.k, len(sound_rows))
    sounds, texts = _select(audio_vectors, sound_rows), _select(text_vectors, text_rows)
    annoy, recall = _interactive(config, layout, sounds, texts, _space(meta))
    search, among_texts = _searches(config, sounds, texts, annoy)
    ranked = rank_neighbours(
        search,
        texts,
        sounds,
        config.k,
        config.damping,
        config.damping_k,
        config.damping_beta,
        config.null_sample,
        config.seed,
        config.block,
        among_texts,
    )
    _write(layout, ranked, [text_ids[row] for row in text_rows], [audio_ids[row] for row in sound_rows])
    report.n_in = report.n_ok = len(texts)
    report.computed = len(texts)
    report.metrics = {
        "sounds": len(sounds),
        "search": SEARCH_NAMES[type(search)],
        "damping": config.damping,
        "annoy_recall_at_10": None if recall is None else round(recall, 4),
        "hubs": hub_report(ranked.nearest[:, : config.k], ranked.rows, len(sounds)),
        "embeddings": meta["fingerprint"],
        "families": meta.get("families", []),
    }
    for name, used in (("cluster", search), ("cluster_among_texts", among_texts)):
        if isinstance(used, IVFIndex):
            report.metrics[name] = {key: round(value, 4) for key, value in asdict(used.probing).items()}
    return report


SEARCH_NAMES: dict[type, str] = {ExactIndex: "exact", IVFIndex: "cluster", TorchExactIndex: "gpu", AnnoyIndex: "annoy"}


def _interactive(
    config: RetrieveConfig, layout: ProjectPaths, sounds: FloatArray, texts: FloatArray, space: str
) -> tuple[AnnoyIndex | None, float | None]:
    """Build the interactive index and measure its recall@10; nothing (and no stale file) without trees."""
    if not config.annoy_trees:
        if config.search == "annoy":
            raise ConfigError("retrieve.search is annoy and retrieve.annoy_trees is 0", "give it trees, or set search to auto")
        for name in ("index.json", "index.ann"):
            (layout.retrieval / name).unlink(missing_ok=True)
        return None, None
    with atomic_path(layout.retrieval / "index.ann") as temporary:
        side_car = build(sounds, config.annoy_trees, config.seed, temporary, space)
    write_json(layout.retrieval / "index.json", side_car.as_dict())
    annoy = open_index(layout, config.annoy_search_k, sounds.shape[1], len(sounds), space)
    return annoy, _check_recall(config, ExactIndex(sounds, config.block), annoy, texts)


def _searches(
    config: RetrieveConfig, sounds: FloatArray, texts: FloatArray, annoy: AnnoyIndex | None
) -> tuple[VectorIndex, VectorIndex | None]:
    """Who finds the sounds of a text, and (for CSLS, if not exactly) the texts of a sound."""
    if config.search == "annoy":
        return annoy or ExactIndex(sounds, config.block), None
    kind = resolve_backend(len(texts), len(sounds)) if config.search == "auto" else config.search
    settings = (config.recall_target, config.recall_sample, config.seed, config.block)
    search = build_index(kind, sounds, texts, *settings)
    if kind == "exact" or config.damping != "csls":
        return search, None
    return search, build_index(kind, texts, sounds, *settings)


def _check_recall(config: RetrieveConfig, exact: ExactIndex, annoy: AnnoyIndex, texts: FloatArray) -> float:
    """Recall@10 of Annoy against exact search on a sample of the texts; DataError when below the floor."""
    sample = np.sort(seeded_rng(config.seed, "retrieve", "recall").permutation(len(texts))[: config.recall_sample])
    recall = recall_at(annoy.search(texts[sample], REPORT_K)[0], exact.search(texts[sample], REPORT_K)[0], REPORT_K)
    if recall < config.recall_floor:
        raise DataError(
            f"recall@{REPORT_K} of Annoy is {recall:.3f} on {len(sample)} texts, "
            f"below retrieve.recall_floor {config.recall_floor}",
            f"raise retrieve.annoy_search_k (now {config.annoy_search_k}) or retrieve.annoy_trees (now {config.annoy_trees})",
        )
    return recall


def _write(layout: ProjectPaths, ranked: RankedNeighbours, text_ids: list[str], audio_ids: list[str]) -> None:
    """Write the neighbours; candidates that an approximate search did not find are left out."""
    places = ranked.rows.shape[1]
    keys, names = pa.array(text_ids, pa.string()), pa.array(audio_ids, pa.string())
    step = max(1, TABLE_ROWS // places)
    chunks = []
    for start in range(0, len(text_ids), step):
        part = slice(start, start + step)
        found = ranked.rows[part].reshape(-1)
        kept = np.flatnonzero(found >= 0)
        columns = {
            "text_id": keys.take(pa.array(start + kept // places)),
            "rank": pa.array((kept % places).astype(np.int16)),
            "audio_id": names.take(pa.array(found[kept])),
            **{name: pa.array(getattr(ranked, field)[part].reshape(-1)[kept].astype(np.float32)) for name, field in NUMBERS},
        }
        chunks.append(pa.table(columns, schema=NEIGHBOURS.schema))
    write_table(layout.retrieval / "neighbours.parquet", NEIGHBOURS, pa.concat_tables(chunks))


NUMBERS = (("score", "scores"), ("z_score", "z"), ("corrected_score", "damped"))
