"""Stage `embed`: unique event texts and all sounds -> unit vectors of one space."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.core.atomic import write_bytes, write_json
from pipeline_steps.core.errors import DataError, StageError
from pipeline_steps.core.executors.base import ExecutorName, Failure, Result
from pipeline_steps.core.executors.run import run_items
from pipeline_steps.core.hashing import fingerprint, sha256_bytes, text_id
from pipeline_steps.core.media_shards import MediaShardReader
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.result_cache import ResultCache
from pipeline_steps.core.schemas import AUDIO, AUDIO_IDS, EVENTS, QUARANTINE, TEXT_IDS
from pipeline_steps.core.stage_report import StageReport
from pipeline_steps.core.tables import read_table, write_table
from pipeline_steps.embed.backends import ClapBackend, EmbeddingBackend, YamnetMiniLMBackend
from pipeline_steps.embed.config import EmbedConfig
from pipeline_steps.embed.int8_check import FEWEST, calibration_sample, neighbour_agreement
from pipeline_steps.embed.vector_checks import assert_unit, validate_vectors
from pipeline_steps.models.text_audio.clap import ClapEncoder
from pipeline_steps.models.text_audio.laion_clap import LaionClapEncoder
from pipeline_steps.models.text_audio.yamnet_minilm import TAGS, YamnetMiniLMEncoder

__all__ = ["EmbedConfig", "build_encoder", "build_space", "embed_texts", "run"]

log = logging.getLogger(__name__)

VECTOR = pa.schema([pa.field("vector", pa.list_(pa.float32()))])
NETWORK = pa.schema([pa.field("network", pa.large_binary())])


def build_encoder(config: EmbedConfig, layout: ProjectPaths) -> YamnetMiniLMEncoder | ClapEncoder | LaionClapEncoder:
    """The encoder a configuration asks for, weights not yet loaded, nothing fetched."""
    if config.encoder == "clap":
        settings = config.clap.model_dump(exclude={"int8_recall_floor"})
        return ClapEncoder(**settings, root=layout.root)
    if config.encoder == "laion":
        return LaionClapEncoder(**config.laion.model_dump(), root=layout.root)
    return YamnetMiniLMEncoder(layout.assets, config.recipe, config.temperature, config.phrase_weight, config.loudness_power)


def build_space(encoder: YamnetMiniLMEncoder | ClapEncoder | LaionClapEncoder) -> EmbeddingBackend:
    """The encoder as the stage uses it."""
    return YamnetMiniLMBackend(encoder) if isinstance(encoder, YamnetMiniLMEncoder) else ClapBackend(encoder)


def run(config: EmbedConfig, layout: ProjectPaths) -> StageReport:
    """Embed the event texts and every sound of the catalog.

    Raises:
        DataError: no sound or no text, or more than `max_failed_fraction` of them gave no usable vector.
    """
    report = StageReport("embed")
    sounds = read_table(layout.catalog / "audio.parquet", AUDIO).to_pylist()
    events = read_table(layout.captions / "events.parquet", EVENTS).to_pylist()
    if not sounds:
        raise DataError("the sound pool is empty after ingest", "see data/catalog/quarantine.parquet: sonify quarantine list")
    if not events:
        raise DataError("no picture suggests a sound", "see data/captions/abstained.parquet, or lower caption.min_confidence")
    audio_ids = [row["audio_id"] for row in sounds]
    config, int8, judged = check_int8_quality(config, layout, audio_ids)
    hearing = AudioEmbeddingProcessor(config, layout)
    space, encoder = hearing.space, hearing.space.encoder
    if config.executor == "local" or isinstance(
        encoder, YamnetMiniLMEncoder
    ):  # the bridge is small, and its tags are embedded here
        space.load()
    phrases = {row["text_id"]: row["phrase"] for row in events}
    text_ids = sorted(phrases)
    text_vectors, text_computed, tags_reused = embed_texts(
        encoder, config, layout, [phrases[key] for key in text_ids], config.executor
    )

    rows, failed, computed = _load_or_compute(hearing, audio_ids, config, config.executor)
    computed += judged
    usable = [audio_id for audio_id in audio_ids if audio_id not in failed]
    stacked = np.stack([rows[key] for key in usable]) if usable else np.zeros((0, encoder.dimension), np.float32)
    audio_vectors = space.sounds(stacked) if usable else stacked

    name = encoder.name
    quarantined = [_quarantine(row, *failed[row["audio_id"]], name) for row in sounds if row["audio_id"] in failed]
    by_id = {row["audio_id"]: row for row in sounds}
    audio_keys, audio_vectors, bad = _drop_invalid(usable, audio_vectors)
    sound_network, text_network = _model_names(encoder)
    quarantined += [_quarantine(by_id[key], code, f"{sound_network} gave no usable vector", name) for key, code in bad.items()]
    text_keys, text_vectors, bad_texts = _drop_invalid(text_ids, text_vectors)
    reason = f"{text_network} gave no usable vector"
    quarantined += [_quarantine_text(key, phrases[key], code, reason, name) for key, code in bad_texts.items()]

    report.n_in = len(phrases) + len(sounds)
    report.n_ok = len(text_keys) + len(audio_keys)
    report.n_quarantined = len(quarantined)
    report.computed = text_computed + computed
    report.reused = report.n_in - report.computed - len(failed)
    if len(quarantined) > config.max_failed_fraction * report.n_in or not audio_keys or not text_keys:
        first = quarantined[0]
        raise DataError(
            f"{len(quarantined)} of {report.n_in} texts and sounds have no usable vector "
            f"(first: {first['path']}: {first['code']})",
            "mend the items or raise embed.max_failed_fraction",
        )
    assert_unit(text_vectors, "text vectors")
    assert_unit(audio_vectors, "audio vectors")
    report.metrics = {
        "dimension": encoder.dimension,
        "texts": {"n": len(text_keys), "computed": text_computed, "reused": len(phrases) - text_computed},
        "sounds": {"n": len(audio_keys), "computed": computed, "reused": len(audio_ids) - computed - len(failed)},
        "tag_vectors_reused": tags_reused,
        **({"int8": int8} if int8 else {}),
    }
    _write(layout.embeddings, space, phrases, (text_keys, text_vectors), (audio_keys, audio_vectors), quarantined)
    return report


def check_int8_quality(
    config: EmbedConfig, layout: ProjectPaths, audio_ids: Sequence[str]
) -> tuple[EmbedConfig, dict[str, Any], int]:
    """Whether the pool may be embedded in 8-bit integers: a sample of it is embedded both ways and its neighbours compared.

    Measured anew in each run, over vectors that the memo knows: the answer depends on the pool and the checkpoint, and not on
    earlier runs. A run that adds a sound embeds that sound twice at most.

    Returns:
        The configuration to go on with (backend `openvino` where int8 is refused), the figures for the report (empty when
        nobody asked for int8), and how many of the vectors to be used were computed here.
    """
    if config.encoder != "clap" or config.clap.backend != "openvino-int8":
        return config, {}, 0
    exact = config.model_copy(update={"clap": config.clap.model_copy(update={"backend": "openvino"})})
    ids, floor = calibration_sample(audio_ids), config.clap.int8_recall_floor
    refused: dict[str, Any] = {"used": False, "reason": f"fewer than {FEWEST} sounds to judge by", "floor": floor}
    if len(ids) < FEWEST:
        log.warning("int8 is not used, float32 is: %d sounds are too few to judge by (%d are needed)", len(ids), FEWEST)
        return exact, {**refused, "sounds": len(ids)}, 0
    if config.executor == "ray":  # made here, once: actors that found none would each make their own
        _int8_network(build_encoder(config, layout), config, layout)
    quick_rows, _, quick_computed = _load_or_compute(AudioEmbeddingProcessor(config, layout), ids, config, config.executor)
    exact_rows, _, exact_computed = _load_or_compute(AudioEmbeddingProcessor(exact, layout), ids, exact, config.executor)
    both = [key for key in ids if key in quick_rows and key in exact_rows]
    if len(both) < FEWEST:
        log.warning("int8 is not used, float32 is: only %d of %d sampled sounds can be heard", len(both), len(ids))
        return exact, {**refused, "sounds": len(both)}, exact_computed
    found = neighbour_agreement(np.stack([exact_rows[key] for key in both]), np.stack([quick_rows[key] for key in both]))
    used = found["recall_at_10"] >= floor
    said = "int8 is used" if used else "int8 is not used, float32 is"
    told = f"recall@10 {found['recall_at_10']:.4f} on {len(both)} sounds, floor {floor:g}"
    log.log(logging.INFO if used else logging.WARNING, "%s: %s, mean cosine %.5f", said, told, found["cosine_mean"])
    report = {"used": used, "reason": f"recall {'reaches' if used else 'is below'} the floor", "floor": floor, **found}
    return (config, report, quick_computed) if used else (exact, report, exact_computed)


def embed_texts(
    encoder: YamnetMiniLMEncoder | ClapEncoder | LaionClapEncoder,
    config: EmbedConfig,
    layout: ProjectPaths,
    texts: Sequence[str],
    engine: ExecutorName = "local",
) -> tuple[FloatArray, int, bool]:
    """Unit rows [N, D] of texts through the memo; a person's single question costs what is new in it and no more.

    Returns:
        The vectors, how many texts were computed now, and whether the tags' own vectors were known (`bridge` alone has them).
    """
    reading = TextEmbeddingProcessor(config, layout, {text_id(text): text for text in texts}, build_space(encoder))
    tags_known = False
    if isinstance(encoder, YamnetMiniLMEncoder):
        tags_known = _load_tag_embeddings(
            encoder, ResultCache(_url(config, layout), "embed-tags", fingerprint(encoder.describe_tags()), VECTOR)
        )
    rows, failed, computed = _load_or_compute(reading, sorted(reading.phrases), config, engine)
    if not texts:
        return np.zeros((0, encoder.dimension), np.float32), 0, tags_known
    if not rows:
        return np.full((len(texts), encoder.dimension), np.nan, np.float32), len(failed), tags_known
    useless = np.full_like(next(iter(rows.values())), np.nan)
    stacked = np.stack([rows.get(text_id(text), useless) for text in texts])
    return reading.space.texts(stacked), computed + len(failed), tags_known


def _load_tag_embeddings(encoder: YamnetMiniLMEncoder, memo: ResultCache) -> bool:
    """Give the encoder its tag vectors from the memo, or compute and store them; returns whether they were known."""
    if encoder.recipe == "plain":
        return False
    known = memo.load(["tags"])
    if known:
        encoder.set_tag_embeddings(np.asarray(known["tags"]["vector"], np.float32).reshape(TAGS, -1))
    else:
        memo.append({"tags": {"vector": encoder.tag_vectors().ravel()}})
    return bool(known)


def _int8_network(
    encoder: YamnetMiniLMEncoder | ClapEncoder | LaionClapEncoder, config: EmbedConfig, layout: ProjectPaths
) -> bytes | None:
    """The encoder's quantised network from the memo, or made and stored: all processes hear with the same one.

    Returns:
        None for an encoder that needs none.
    """
    if not isinstance(encoder, ClapEncoder) or encoder.backend != "openvino-int8":
        return None
    memo = ResultCache(_url(config, layout), "embed-int8", fingerprint(encoder.describe_int8()), NETWORK)
    if known := memo.load(["network"]):
        return bytes(known["network"]["network"])
    network = encoder.int8_network()
    memo.append({"network": {"network": network}})
    return network


def _model_names(encoder: YamnetMiniLMEncoder | ClapEncoder | LaionClapEncoder) -> tuple[str, str]:
    """Names for people: the network of the sounds, that of the texts."""
    return ("YAMNet", "MiniLM") if isinstance(encoder, YamnetMiniLMEncoder) else (encoder.name, encoder.name)


def _url(config: EmbedConfig, layout: ProjectPaths) -> str:
    return config.cache_dir or str(layout.result_cache)


class AudioEmbeddingProcessor:
    """Sounds of the shards -> rows of the memo, in the stage's own process or in an actor of a cluster."""

    def __init__(self, config: EmbedConfig, layout: ProjectPaths) -> None:
        self._settings = (config, layout)
        self.space = build_space(build_encoder(config, layout))
        self.cache = ResultCache(_url(config, layout), "embed-audio", fingerprint(self.describe()), VECTOR)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_processor, (AudioEmbeddingProcessor, self._settings, self.cache)

    def describe(self) -> Any:
        return self.space.describe_sounds()

    def load(self) -> None:
        self.space.load()
        encoder = self.space.encoder
        if isinstance(encoder, ClapEncoder) and (network := _int8_network(encoder, *self._settings)):
            encoder.adopt_int8_network(network)
        self._media = MediaShardReader(self._settings[1].media)

    def results(self, ids: Sequence[str]) -> Iterator[tuple[str, Result]]:
        size = self._settings[0].batch_size
        for start in range(0, len(ids), size):
            prepared: dict[str, FloatArray] = {}
            for audio_id in ids[start : start + size]:
                try:
                    prepared[audio_id] = self.space.prepare(self._media.sound(audio_id))
                except StageError:
                    raise
                except Exception as error:
                    yield audio_id, ("EMB_FAILED", f"{type(error).__name__}: {error}")
            for audio_id, vector in zip(prepared, self.space.sound_rows(list(prepared.values())), strict=True):
                yield audio_id, _row(vector, _model_names(self.space.encoder)[0])


class TextEmbeddingProcessor:
    """Texts -> rows of the memo, in the stage's own process or in an actor of a cluster."""

    def __init__(
        self, config: EmbedConfig, layout: ProjectPaths, phrases: Mapping[str, str], space: EmbeddingBackend | None = None
    ) -> None:
        self._settings = (config, layout)
        self.phrases = phrases
        self.space = space or build_space(build_encoder(config, layout))
        self.cache = ResultCache(_url(config, layout), "embed-text", fingerprint(self.describe()), VECTOR)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_processor, (TextEmbeddingProcessor, (*self._settings, self.phrases), self.cache)

    def describe(self) -> Any:
        return self.space.describe_texts()

    def load(self) -> None:
        self.space.load()

    def results(self, ids: Sequence[str]) -> Iterator[tuple[str, Result]]:
        vectors = self.space.text_rows([self.phrases[key] for key in ids])
        for key, vector in zip(ids, vectors, strict=True):
            yield key, _row(vector, _model_names(self.space.encoder)[1])


def _restore_processor(
    kind: type[AudioEmbeddingProcessor | TextEmbeddingProcessor], arguments: tuple[Any, ...], memo: ResultCache
) -> AudioEmbeddingProcessor | TextEmbeddingProcessor:
    """The work as it arrives in an actor: with the memo of the process that sent it, whatever this one would describe."""
    work = kind(*arguments)
    work.cache = memo
    return work


def _row(vector: FloatArray, network: str) -> Result:
    """A row of the memo; NaN and infinity never enter it."""
    if np.isfinite(vector).all():
        return {"vector": vector}
    return "EMB_NONFINITE", f"{network} gave no usable vector"


def _load_or_compute(
    work: AudioEmbeddingProcessor | TextEmbeddingProcessor, ids: Sequence[str], config: EmbedConfig, engine: ExecutorName
) -> tuple[dict[str, FloatArray], dict[str, Failure], int]:
    """Memo rows by id, failures by id, and how many were computed now."""
    known = {key: np.asarray(vector, np.float32) for key, vector in work.cache.vectors(ids).items()}
    done = run_items(work, [key for key in ids if key not in known], config.batch_size, engine, config.ray)
    known.update({key: np.asarray(row["vector"], np.float32) for key, row in done.rows.items()})
    elsewhere = work.cache.vectors(done.remembered)
    known.update({key: np.asarray(vector, np.float32) for key, vector in elsewhere.items()})
    return known, done.failed, len(done.rows) + len(elsewhere)


def _drop_invalid(keys: Sequence[str], vectors: FloatArray) -> tuple[list[str], FloatArray, dict[str, str]]:
    """Keys and rows that may enter the space, and the codes of the others."""
    codes = validate_vectors(vectors)
    good = [row for row, code in enumerate(codes) if not code]
    return [keys[row] for row in good], vectors[good], {keys[row]: code for row, code in enumerate(codes) if code}


def _write(
    folder: Path,
    space: EmbeddingBackend,
    phrases: Mapping[str, str],
    texts: tuple[list[str], FloatArray],
    sounds: tuple[list[str], FloatArray],
    quarantined: list[dict[str, Any]],
) -> None:
    """Write the vectors and tables; `meta.json`, which names their hashes, comes last and marks them as complete."""
    (text_keys, text_vectors), (audio_keys, audio_vectors) = texts, sounds
    payloads = {"text.npy": _npy(text_vectors), "audio.npy": _npy(audio_vectors)}
    for name, payload in payloads.items():
        write_bytes(folder / name, payload)
    rows = [{"row": row, "text_id": key, "phrase": phrases[key]} for row, key in enumerate(text_keys)]
    write_table(folder / "text_ids.parquet", TEXT_IDS, rows)
    write_table(folder / "audio_ids.parquet", AUDIO_IDS, [{"row": row, "audio_id": key} for row, key in enumerate(audio_keys)])
    write_table(folder / "quarantine.parquet", QUARANTINE, quarantined)
    encoder = space.encoder
    meta = {
        **space.meta(),
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
