"""Stage `retrieve`: each event text -> its nearest pool sounds, calibrated and with hubs damped; and the interactive index."""

from __future__ import annotations

import io
import json
import logging
from typing import Any

import numpy as np

from pipeline_steps.core.atomic import atomic_path, write_json
from pipeline_steps.core.contracts import AUDIO, AUDIO_IDS, EVENTS, IMAGES, NEIGHBOURS, TEXT_IDS
from pipeline_steps.core.errors import DataError, IntegrityError
from pipeline_steps.core.identity import fingerprint, sha256_bytes
from pipeline_steps.core.layout import Layout
from pipeline_steps.core.report import StageReport
from pipeline_steps.core.seeding import generator
from pipeline_steps.core.tables import read_table, write_table
from pipeline_steps.retrieve.annoy_index import AnnoySearch, SideCar, build
from pipeline_steps.retrieve.config import Config
from pipeline_steps.retrieve.ranking import REPORT_K, Ranked, hub_report, rank
from pipeline_steps.retrieve.search import ExactSearch, FloatArray, NearestNeighbours, recall_at

__all__ = ["Config", "open_index", "open_pool_index", "read_vectors", "run"]

log = logging.getLogger(__name__)

REMAKE = "run: dvc repro --force embed"


def read_vectors(layout: Layout) -> tuple[dict[str, Any], FloatArray, list[str], FloatArray, list[str]]:
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
    vectors: list[FloatArray] = []
    for name, count in (("text.npy", len(text_ids)), ("audio.npy", len(audio_ids))):
        payload = (folder / name).read_bytes() if (folder / name).is_file() else b""
        if sha256_bytes(payload) != hashes[name]:
            raise IntegrityError(f"{folder / name}: sha256 is {sha256_bytes(payload)}, meta.json says {hashes[name]}", REMAKE)
        rows = np.load(io.BytesIO(payload), allow_pickle=False)
        if rows.shape != (count, dimension) or rows.dtype != np.float32 or not np.isfinite(rows).all():
            raise IntegrityError(
                f"{folder / name}: {rows.dtype} {rows.shape}, expected float32 {(count, dimension)}, finite", REMAKE
            )
        vectors.append(rows)
    return meta, vectors[0], text_ids, vectors[1], audio_ids


def _space(meta: dict[str, Any]) -> str:
    """Fingerprint of the indexed vectors: the space and the very bytes."""
    return fingerprint([meta["fingerprint"], meta["sha256"]["audio.npy"]])


def open_index(layout: Layout, search_k: int, dimension: int, n_items: int, space: str) -> AnnoySearch:
    """Open the interactive index after every check.

    Raises:
        IntegrityError: the side-car or the index is missing, damaged, or of other embeddings.
    """
    path = layout.retrieval / "index.json"
    try:
        side_car = SideCar.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path} is missing or damaged: {error}", "run: dvc repro --force retrieve") from error
    return AnnoySearch(side_car, layout.retrieval / "index.ann", search_k, dimension, n_items, space)


def open_pool_index(layout: Layout, search_k: int) -> tuple[AnnoySearch, FloatArray, list[str]]:
    """The interactive index with the vectors [N, D] and ids of the pool sounds behind its rows.

    Raises:
        IntegrityError: see `read_vectors` and `open_index`.
    """
    meta, _, _, audio_vectors, audio_ids = read_vectors(layout)
    pool = {row["audio_id"] for row in read_table(layout.catalog / "audio.parquet", AUDIO).to_pylist() if not row["holdout"]}
    rows = [row for row, audio_id in enumerate(audio_ids) if audio_id in pool]
    vectors = audio_vectors[rows]
    return open_index(layout, search_k, vectors.shape[1], len(rows), _space(meta)), vectors, [audio_ids[row] for row in rows]


def run(config: Config, layout: Layout) -> StageReport:
    """Find the neighbours of every text that a pool picture suggests, among pool sounds only.

    Raises:
        DataError: no pool text or sound, or Annoy's recall@10 is below `recall_floor`.
        IntegrityError: the embeddings are not what their `meta.json` says.
    """
    report = StageReport("retrieve")
    meta, text_vectors, text_ids, audio_vectors, audio_ids = read_vectors(layout)
    pool = {row["audio_id"] for row in read_table(layout.catalog / "audio.parquet", AUDIO).to_pylist() if not row["holdout"]}
    holdout = {row["image_id"] for row in read_table(layout.catalog / "images.parquet", IMAGES).to_pylist() if row["holdout"]}
    asked = {
        row["text_id"]
        for row in read_table(layout.captions / "events.parquet", EVENTS).to_pylist()
        if row["image_id"] not in holdout
    }
    sound_rows = [row for row, audio_id in enumerate(audio_ids) if audio_id in pool]
    text_rows = [row for row, key in enumerate(text_ids) if key in asked]
    if not sound_rows or not text_rows:
        raise DataError(
            f"nothing to retrieve: {len(text_rows)} texts of pool pictures, {len(sound_rows)} pool sounds",
            "see the quarantine and abstention tables of the stages before",
        )
    if config.k > len(sound_rows):
        log.warning("retrieve.k is %d, the pool has %d sounds: all of them are neighbours", config.k, len(sound_rows))
    sounds, texts = audio_vectors[sound_rows], text_vectors[text_rows]
    space = _space(meta)
    with atomic_path(layout.retrieval / "index.ann") as temporary:
        side_car = build(sounds, config.annoy_trees, config.seed, temporary, space)
    write_json(layout.retrieval / "index.json", side_car.as_dict())
    exact = ExactSearch(sounds, config.block)
    annoy = open_index(layout, config.annoy_search_k, sounds.shape[1], len(sounds), space)
    recall = _check_recall(config, exact, annoy, texts)

    search: NearestNeighbours = exact if config.search == "exact" else annoy
    ranked = rank(
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
    )
    _write(layout, ranked, [text_ids[row] for row in text_rows], [audio_ids[row] for row in sound_rows])
    before = search.search(texts, min(REPORT_K, config.k))[0]
    report.n_in = report.n_ok = len(texts)
    report.computed = len(texts)
    report.metrics = {
        "sounds": len(sounds),
        "search": config.search,
        "damping": config.damping,
        "annoy_recall_at_10": round(recall, 4),
        "hubs": hub_report(before, ranked.rows, len(sounds)),
        "embeddings": meta["fingerprint"],
        "families": meta.get("families", []),
    }
    return report


def _check_recall(config: Config, exact: ExactSearch, annoy: AnnoySearch, texts: FloatArray) -> float:
    """Recall@10 of Annoy against exact search on a sample of the texts; DataError when below the floor."""
    sample = np.sort(generator(config.seed, "retrieve", "recall").permutation(len(texts))[: config.recall_sample])
    recall = recall_at(annoy.search(texts[sample], REPORT_K)[0], exact.search(texts[sample], REPORT_K)[0], REPORT_K)
    if recall < config.recall_floor:
        raise DataError(
            f"recall@{REPORT_K} of Annoy is {recall:.3f} on {len(sample)} texts, "
            f"below retrieve.recall_floor {config.recall_floor}",
            f"raise retrieve.annoy_search_k (now {config.annoy_search_k}) or retrieve.annoy_trees (now {config.annoy_trees})",
        )
    return recall


def _write(layout: Layout, ranked: Ranked, text_ids: list[str], audio_ids: list[str]) -> None:
    """Write the neighbours; candidates that an approximate search did not find are left out."""
    rows = []
    for number, key in enumerate(text_ids):
        for place in range(ranked.rows.shape[1]):
            item = int(ranked.rows[number, place])
            if item >= 0:
                rows.append(
                    {
                        "text_id": key,
                        "rank": place,
                        "audio_id": audio_ids[item],
                        "score": float(ranked.scores[number, place]),
                        "z": float(ranked.z[number, place]),
                        "damped": float(ranked.damped[number, place]),
                    }
                )
    write_table(layout.retrieval / "neighbours.parquet", NEIGHBOURS, rows)
