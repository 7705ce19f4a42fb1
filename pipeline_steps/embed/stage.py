"""Stage `embed`: encode unique event texts and all audio as unit vectors of one space."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline_steps.audio.log_mel import map_threads
from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.core.atomic import write_bytes, write_json
from pipeline_steps.core.checksums import record_checksums
from pipeline_steps.core.errors import DataError, StageError
from pipeline_steps.core.executors.base import ExecutorName, Failure, Result
from pipeline_steps.core.executors.run import run_items
from pipeline_steps.core.gpu_memory import gpu_memory_guard
from pipeline_steps.core.hashing import fingerprint, sha256_bytes, text_id
from pipeline_steps.core.media_shards import MediaShardReader
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.result_cache import ResultCache
from pipeline_steps.core.schemas import AUDIO, AUDIO_IDS, EVENTS, QUARANTINE, TEXT_IDS
from pipeline_steps.core.stage_report import StageReport
from pipeline_steps.core.tables import read_table, write_table
from pipeline_steps.embed.config import EmbedConfig
from pipeline_steps.embed.int8_check import MIN_CLIPS, calibration_sample, neighbor_agreement
from pipeline_steps.embed.known_answer import TEXTS, check_text_vectors
from pipeline_steps.embed.vector_checks import assert_unit, validate_vectors
from pipeline_steps.models.text_audio.base import TEXT_AUDIO_ENCODERS, TextAudioEncoder

__all__ = ["EmbedConfig", "build_encoder", "embed_audio", "embed_texts", "run"]

log = logging.getLogger(__name__)

MORE_MEMORY = "free GPU memory, or choose a smaller model or the CPU"

VECTOR = pa.schema([pa.field("vector", pa.list_(pa.float32()))])


def build_encoder(config: EmbedConfig, layout: ProjectPaths) -> TextAudioEncoder:
    """Encoder that the configuration selects. Loads no weights and downloads nothing."""
    return TEXT_AUDIO_ENCODERS.get(config.encoder)(config.encoder_config, layout)


def embed_audio(config: EmbedConfig, layout: ProjectPaths, clips: Sequence[FloatArray]) -> FloatArray:
    """Unit vectors [N, D] of clips, each mono float32 [T] at 48 kHz, without the cache."""
    encoder = build_encoder(config, layout).load()
    if artifact := encoder.audio_artifact():
        artifact.restore(_cache_url(config, layout))
    return encoder.encode_audio(clips)


def run(config: EmbedConfig, layout: ProjectPaths) -> StageReport:
    """Encode the event texts and all audio of the catalog.

    Raises:
        DataError: there is no audio or no text, too many of them have no usable vector, or the first ones all failed.
        IntegrityError: the encoder gives unlike texts the same vector.
    """
    report = StageReport("embed")
    catalog = read_table(layout.catalog / "audio.parquet", AUDIO).to_pylist()
    events = read_table(layout.captions / "events.parquet", EVENTS).to_pylist()
    if not catalog:
        raise DataError("data/catalog/audio.parquet: there is no audio after ingest", "see the reasons: sonify quarantine list")
    if not events:
        raise DataError(
            "data/captions/events.parquet: no image has a sound event",
            "see data/captions/abstained.parquet, or lower caption.min_confidence",
        )
    audio_ids = [row["audio_id"] for row in catalog]
    config, int8, computed_by_check = check_int8_quality(config, layout, audio_ids)
    processor = AudioEmbeddingProcessor(config, layout)
    encoder = processor.encoder
    if config.executor == "local" or encoder.vectors_need_weights:
        encoder.load()
    phrases = {row["text_id"]: row["phrase"] for row in events}
    text_ids = sorted(phrases)
    texts = [phrases[key] for key in text_ids]
    text_vectors, text_computed, artifact_cached = embed_texts(encoder, config, layout, texts, config.executor)
    known, *_ = embed_texts(encoder, config, layout, TEXTS, config.executor)
    check_text_vectors(known, str(encoder.meta()["space"]))

    rows, failed, computed = _load_or_compute(processor, audio_ids, config, config.executor)
    computed += computed_by_check
    usable = [audio_id for audio_id in audio_ids if audio_id not in failed]
    audio_vectors = (
        encoder.audio_vectors(np.stack([rows[key] for key in usable]))
        if usable
        else np.zeros((0, encoder.dimension), np.float32)
    )

    name = encoder.name
    quarantined = [_quarantine(row, *failed[row["audio_id"]], name) for row in catalog if row["audio_id"] in failed]
    by_id = {row["audio_id"]: row for row in catalog}
    audio_keys, audio_vectors, invalid = _drop_invalid(usable, audio_vectors)
    audio_model, text_model = encoder.model_names
    quarantined += [
        _quarantine(by_id[key], code, f"{audio_model} gave no usable vector", name) for key, code in invalid.items()
    ]
    text_keys, text_vectors, invalid = _drop_invalid(text_ids, text_vectors)
    reason = f"{text_model} gave no usable vector"
    quarantined += [_quarantine_text(key, phrases[key], code, reason, name) for key, code in invalid.items()]

    report.n_in = len(phrases) + len(catalog)
    report.n_ok = len(text_keys) + len(audio_keys)
    report.n_quarantined = len(quarantined)
    report.cache_misses = text_computed + computed
    report.cache_hits = report.n_in - report.cache_misses - len(failed)
    if quarantined:
        first = f"first: {quarantined[0]['path']}: {quarantined[0]['code']}"
        action = "fix or remove these items"
        report.check_failures(config.max_failed_fraction, "texts and clips", first, action)
        if not (audio_keys and text_keys):
            raise DataError(f"no {'text' if audio_keys else 'clip'} has a usable vector ({first})", action)
    assert_unit(text_vectors, "text vectors")
    assert_unit(audio_vectors, "audio vectors")
    report.metrics = {
        "dimension": encoder.dimension,
        "texts": {"n": len(text_keys)},
        "sounds": {"n": len(audio_keys)},
        **({"int8": int8} if int8 else {}),
    }
    report.runtime = {
        "texts": {"cache_misses": text_computed, "cache_hits": len(phrases) - text_computed},
        "sounds": {"cache_misses": computed, "cache_hits": len(audio_ids) - computed - len(failed)},
        "tag_vectors_cached": artifact_cached,
    }
    with record_checksums("embed", layout.embeddings):
        _write(layout.embeddings, encoder, phrases, (text_keys, text_vectors), (audio_keys, audio_vectors), quarantined)
    return report


def check_int8_quality(
    config: EmbedConfig, layout: ProjectPaths, audio_ids: Sequence[str]
) -> tuple[EmbedConfig, dict[str, Any], int]:
    """Decide whether 8-bit integers may be used: encode a sample of the pool both ways and compare the neighbors.

    The check is part of every run and uses cached vectors. Its result depends on the pool and the checkpoint, not on earlier
    runs. A new clip is encoded twice at most.

    Returns:
        The configuration to use (float32 if 8-bit integers are rejected), the figures for the report (empty if the encoder does
        not use 8-bit integers), and how many of the vectors to be used were computed here.
    """
    fallback = TEXT_AUDIO_ENCODERS.get(config.encoder).float32_config(config.encoder_config)
    if fallback is None:
        return config, {}, 0
    exact_group, floor = fallback
    exact = config.model_copy(update={config.encoder: exact_group})
    ids = calibration_sample(audio_ids)
    rejected: dict[str, Any] = {"used": False, "reason": f"fewer than {MIN_CLIPS} clips to compare", "floor": floor}
    if len(ids) < MIN_CLIPS:
        log.warning("int8 is not used, float32 is: %d clips are too few to compare (%d are needed)", len(ids), MIN_CLIPS)
        return exact, {**rejected, "sounds": len(ids)}, 0
    if config.executor == "ray" and (artifact := build_encoder(config, layout).audio_artifact()):
        artifact.load_or_compute(_cache_url(config, layout))  # once, here: otherwise every actor would compute it
    int8_rows, _, int8_computed = _load_or_compute(AudioEmbeddingProcessor(config, layout), ids, config, config.executor)
    exact_rows, _, exact_computed = _load_or_compute(AudioEmbeddingProcessor(exact, layout), ids, exact, config.executor)
    both = [key for key in ids if key in int8_rows and key in exact_rows]
    if len(both) < MIN_CLIPS:
        log.warning("int8 is not used, float32 is: only %d of %d sampled clips were encoded", len(both), len(ids))
        return exact, {**rejected, "sounds": len(both)}, exact_computed
    found = neighbor_agreement(np.stack([exact_rows[key] for key in both]), np.stack([int8_rows[key] for key in both]))
    used = found["recall_at_10"] >= floor
    decision = "int8 is used" if used else "int8 is not used, float32 is"
    measured = f"recall@10 {found['recall_at_10']:.4f} on {len(both)} clips, floor {floor:g}"
    log.log(logging.INFO if used else logging.WARNING, "%s: %s, mean cosine %.5f", decision, measured, found["cosine_mean"])
    report = {"used": used, "reason": f"recall {'reaches' if used else 'is below'} the floor", "floor": floor, **found}
    return (config, report, int8_computed) if used else (exact, report, exact_computed)


def embed_texts(
    encoder: TextAudioEncoder, config: EmbedConfig, layout: ProjectPaths, texts: Sequence[str], executor: ExecutorName = "local"
) -> tuple[FloatArray, int, bool]:
    """Unit vectors [N, D] of texts through the result cache.

    Returns:
        The vectors, how many texts were computed, and whether the encoder's text artifact was cached.
    """
    processor = TextEmbeddingProcessor(config, layout, {text_id(text): text for text in texts}, encoder)
    artifact = encoder.text_artifact()
    artifact_cached = artifact is not None and artifact.restore(_cache_url(config, layout))
    rows, failed, computed = _load_or_compute(processor, sorted(processor.phrases), config, executor)
    if not texts:
        return np.zeros((0, encoder.dimension), np.float32), 0, artifact_cached
    if not rows:
        return np.full((len(texts), encoder.dimension), np.nan, np.float32), len(failed), artifact_cached
    missing = np.full_like(next(iter(rows.values())), np.nan)
    stacked = np.stack([rows.get(text_id(text), missing) for text in texts])
    return encoder.text_vectors(stacked), computed + len(failed), artifact_cached


def _cache_url(config: EmbedConfig, layout: ProjectPaths) -> str:
    return config.cache_dir or str(layout.result_cache)


class AudioEmbeddingProcessor:
    """Item processor: audio ids -> cache rows, in this process or in a Ray actor."""

    def __init__(self, config: EmbedConfig, layout: ProjectPaths) -> None:
        self._settings = (config, layout)
        self.encoder = build_encoder(config, layout)
        self.cache = ResultCache(_cache_url(config, layout), "embed-audio", fingerprint(self.describe()), VECTOR)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_processor, (AudioEmbeddingProcessor, self._settings, self.cache)

    def describe(self) -> Any:
        return self.encoder.describe_audio()

    def load(self) -> None:
        config, layout = self._settings
        with gpu_memory_guard("embed.encoder", MORE_MEMORY):
            self.encoder.load()
        if artifact := self.encoder.audio_artifact():
            artifact.restore(_cache_url(config, layout))
        self._media = MediaShardReader(layout.media)

    def results(self, ids: Sequence[str]) -> Iterator[tuple[str, Result]]:
        size = self._settings[0].batch_size
        for start in range(0, len(ids), size):
            prepared: dict[str, FloatArray] = {}
            part = ids[start : start + size]
            # A clip is computed on one core, so its vector does not depend on the number of threads.
            for audio_id, found in zip(part, map_threads(self._prepare, part, torch.get_num_threads()), strict=True):
                if isinstance(found, Exception):
                    yield audio_id, ("EMB_FAILED", f"{type(found).__name__}: {found}")
                else:
                    prepared[audio_id] = found
            with gpu_memory_guard("embed.encoder, embed.batch_size", MORE_MEMORY):
                vectors = self.encoder.audio_rows(list(prepared.values()))
            for audio_id, vector in zip(prepared, vectors, strict=True):
                yield audio_id, _row(vector, self.encoder.model_names[0])

    def _prepare(self, audio_id: str) -> FloatArray | Exception:
        try:
            return self.encoder.prepare_audio(self._media.sound(audio_id))
        except StageError:
            raise
        except Exception as error:
            return error


class TextEmbeddingProcessor:
    """Item processor: text ids -> cache rows, in this process or in a Ray actor."""

    def __init__(
        self, config: EmbedConfig, layout: ProjectPaths, phrases: Mapping[str, str], encoder: TextAudioEncoder | None = None
    ) -> None:
        self._settings = (config, layout)
        self.phrases = phrases
        self.encoder = encoder or build_encoder(config, layout)
        self.cache = ResultCache(_cache_url(config, layout), "embed-text", fingerprint(self.describe()), VECTOR)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_processor, (TextEmbeddingProcessor, (*self._settings, self.phrases), self.cache)

    def describe(self) -> Any:
        return self.encoder.describe_texts()

    def load(self) -> None:
        with gpu_memory_guard("embed.encoder", MORE_MEMORY):
            self.encoder.load()

    def results(self, ids: Sequence[str]) -> Iterator[tuple[str, Result]]:
        with gpu_memory_guard("embed.encoder, embed.batch_size", MORE_MEMORY):
            vectors = self.encoder.text_rows([self.phrases[key] for key in ids])
        for key, vector in zip(ids, vectors, strict=True):
            yield key, _row(vector, self.encoder.model_names[1])


def _restore_processor(
    kind: type[AudioEmbeddingProcessor | TextEmbeddingProcessor], arguments: tuple[Any, ...], cache: ResultCache
) -> AudioEmbeddingProcessor | TextEmbeddingProcessor:
    """Unpickle hook: rebuild the processor in a worker, with the cache of the driver.

    A cache derived in the worker could have another fingerprint.
    """
    processor = kind(*arguments)
    processor.cache = cache
    return processor


def _row(vector: FloatArray, network: str) -> Result:
    """Cache row of a vector; a failure if the vector holds NaN or infinity."""
    if np.isfinite(vector).all():
        return {"vector": vector}
    return "EMB_NONFINITE", f"{network} gave no usable vector"


def _load_or_compute(
    processor: AudioEmbeddingProcessor | TextEmbeddingProcessor, ids: Sequence[str], config: EmbedConfig, executor: ExecutorName
) -> tuple[dict[str, FloatArray], dict[str, Failure], int]:
    """Cache rows by id, failures by id, and how many rows were computed."""
    rows = {key: np.asarray(vector, np.float32) for key, vector in processor.cache.vectors(ids).items()}
    new, limit = [key for key in ids if key not in rows], config.failure_limit(len(ids), len(rows))
    done = run_items(processor, new, config.batch_size, executor, config.ray, limit)
    rows.update({key: np.asarray(row["vector"], np.float32) for key, row in done.rows.items()})
    by_workers = processor.cache.vectors(done.cached_ids)
    rows.update({key: np.asarray(vector, np.float32) for key, vector in by_workers.items()})
    return rows, done.failed, len(done.rows) + len(by_workers)


def _drop_invalid(keys: Sequence[str], vectors: FloatArray) -> tuple[list[str], FloatArray, dict[str, str]]:
    """Keys and rows of valid vectors, and the codes of the others."""
    codes = validate_vectors(vectors)
    valid = [row for row, code in enumerate(codes) if not code]
    return [keys[row] for row in valid], vectors[valid], {keys[row]: code for row, code in enumerate(codes) if code}


def _write(
    folder: Path,
    encoder: TextAudioEncoder,
    phrases: Mapping[str, str],
    texts: tuple[list[str], FloatArray],
    audio: tuple[list[str], FloatArray],
    quarantined: list[dict[str, Any]],
) -> None:
    """Write vectors and tables, then `meta.json` with their hashes, which marks the folder as complete."""
    (text_keys, text_vectors), (audio_keys, audio_vectors) = texts, audio
    payloads = {"text.npy": _npy(text_vectors), "audio.npy": _npy(audio_vectors)}
    for name, payload in payloads.items():
        write_bytes(folder / name, payload)
    rows = [{"row": row, "text_id": key, "phrase": phrases[key]} for row, key in enumerate(text_keys)]
    write_table(folder / "text_ids.parquet", TEXT_IDS, rows)
    write_table(folder / "audio_ids.parquet", AUDIO_IDS, [{"row": row, "audio_id": key} for row, key in enumerate(audio_keys)])
    write_table(folder / "quarantine.parquet", QUARANTINE, quarantined)
    meta = {
        **encoder.meta(),
        "family": encoder.family,
        "families": list(encoder.families),
        "dimension": encoder.dimension,
        "metric": "inner product of unit rows",
        "fingerprint": fingerprint(encoder.describe()),
        "parameters": encoder.parameters,
        "texts": len(text_keys),
        "sounds": len(audio_keys),
        "sha256": {name: sha256_bytes(payload) for name, payload in payloads.items()},
    }
    write_json(folder / "meta.json", meta)


def _npy(vectors: FloatArray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(vectors, dtype=np.float32), allow_pickle=False)
    return buffer.getvalue()


def _quarantine(row: Mapping[str, Any], code: str, reason: str, encoder: str) -> dict[str, Any]:
    return {
        "item_id": row["audio_id"],
        "kind": "audio",
        "path": row["path"],
        "bytes": row["bytes"],
        "stage": "embed",
        "code": code,
        "reason": reason[:500],
        "decoder": encoder,
        "action": "dropped",
        "retryable": False,
    }


def _quarantine_text(key: str, phrase: str, code: str, reason: str, encoder: str) -> dict[str, Any]:
    row = {"audio_id": key, "path": phrase, "bytes": len(phrase.encode("utf-8"))}
    return {**_quarantine(row, code, reason, encoder), "kind": "text"}
