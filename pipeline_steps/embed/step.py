"""Stage `embed`: unique event texts and all sounds -> unit vectors of one space."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline_steps.core.atomic import write_bytes, write_json
from pipeline_steps.core.contracts import AUDIO, AUDIO_IDS, EVENTS, QUARANTINE, TEXT_IDS
from pipeline_steps.core.errors import DataError, StageError
from pipeline_steps.core.identity import fingerprint, sha256_bytes, text_id
from pipeline_steps.core.layout import Layout
from pipeline_steps.core.media import MediaReader
from pipeline_steps.core.memo import Memo
from pipeline_steps.core.report import StageReport
from pipeline_steps.core.tables import read_table, write_table
from pipeline_steps.embed.config import Config
from pipeline_steps.embed.vectors import admit, assert_unit
from pipeline_steps.encoders.bridge import Bridge
from pipeline_steps.encoders.protocols import FloatArray

__all__ = ["Config", "build_encoder", "run"]

log = logging.getLogger(__name__)

VECTOR = pa.schema([pa.field("vector", pa.list_(pa.float32()))])


def build_encoder(config: Config, layout: Layout) -> Bridge:
    """The encoder a configuration asks for, weights not yet loaded."""
    return Bridge(layout.assets, config.recipe, config.temperature, config.loudness_power, config.min_windows)


class MemoisedTexts:
    """MiniLM behind a memo: reads only strings it has not read before."""

    def __init__(self, encoder: Bridge, memo: Memo) -> None:
        self._encoder, self._memo = encoder, memo
        self._known: dict[str, FloatArray] = {}
        self.computed = self.reused = 0

    def prepare(self, texts: Sequence[str]) -> tuple[int, int]:
        """Make vectors of all `texts` known; returns how many were computed and reused."""
        keys = {text_id(text): text for text in texts}
        found = {keys[key]: np.asarray(row["vector"], np.float32) for key, row in self._memo.load(keys).items()}
        missing = sorted(set(texts) - set(found))
        if missing:
            vectors = self._encoder.minilm.load().encode(missing)
            self._memo.append({text_id(text): {"vector": vector} for text, vector in zip(missing, vectors, strict=True)})
            found.update(zip(missing, vectors, strict=True))
        self._known.update(found)
        return len(missing), len(found) - len(missing)

    def __call__(self, texts: Sequence[str]) -> FloatArray:
        """Vectors [N, 384] of texts made known before."""
        return np.stack([self._known[text] for text in texts])


def run(config: Config, layout: Layout) -> StageReport:
    """Embed the event texts and every sound of the catalog.

    Raises:
        DataError: no sound or no text, or more than `max_bad_fraction` of them gave no usable vector.
    """
    report = StageReport("embed")
    encoder = build_encoder(config, layout).load()
    sounds = read_table(layout.catalog / "audio.parquet", AUDIO).to_pylist()
    events = read_table(layout.captions / "events.parquet", EVENTS).to_pylist()
    if not sounds:
        raise DataError("the sound pool is empty after ingest", "see data/catalog/quarantine.parquet: sonify quarantine list")
    if not events:
        raise DataError("no picture suggests a sound", "see data/captions/abstained.parquet, or lower caption.min_confidence")
    phrases = {row["text_id"]: row["sound"] for row in events}
    memo_url = config.memo or str(layout.memo)

    text_memo = Memo(memo_url, "embed-text", fingerprint(encoder.minilm.describe()), VECTOR)
    reader = MemoisedTexts(encoder, text_memo)
    texts = [phrases[key] for key in sorted(phrases)]
    own = set(encoder.texts_needed(texts)) - set(encoder.texts_needed([]))
    tags_computed, tags_reused = reader.prepare(encoder.texts_needed([]))
    text_computed, text_reused = reader.prepare(sorted(own))
    text_vectors = encoder.encode_texts(texts, reader)

    audio_memo = Memo(memo_url, "embed-audio", fingerprint(encoder.describe_sounds()), VECTOR)
    audio_ids = [row["audio_id"] for row in sounds]
    posteriors, failed, computed = _posteriors(config, layout, encoder, audio_memo, audio_ids)
    usable = [audio_id for audio_id in audio_ids if audio_id not in failed]
    stacked = np.stack([posteriors[key] for key in usable]) if usable else np.zeros((0, 521), np.float32)
    audio_vectors = encoder.sounds_from_posteriors(stacked, reader)

    quarantined = [_quarantine(row, "EMB_FAILED", failed[row["audio_id"]]) for row in sounds if row["audio_id"] in failed]
    by_id = {row["audio_id"]: row for row in sounds}
    audio_keys, audio_vectors, bad = _split(usable, audio_vectors)
    quarantined += [_quarantine(by_id[key], code, "YAMNet gave no usable vector") for key, code in bad.items()]
    text_keys, text_vectors, bad_texts = _split(sorted(phrases), text_vectors)
    quarantined += [_quarantine_text(key, phrases[key], code) for key, code in bad_texts.items()]

    report.n_in = len(phrases) + len(sounds)
    report.n_ok = len(text_keys) + len(audio_keys)
    report.n_quarantined = len(quarantined)
    report.computed, report.reused = text_computed + computed, text_reused + len(audio_ids) - computed - len(failed)
    if len(quarantined) > config.max_bad_fraction * report.n_in or not audio_keys or not text_keys:
        first = quarantined[0]
        raise DataError(
            f"{len(quarantined)} of {report.n_in} texts and sounds have no usable vector (first: {first['path']}: {first['code']})",
            "mend the items or raise embed.max_bad_fraction",
        )
    assert_unit(text_vectors, "text vectors")
    assert_unit(audio_vectors, "audio vectors")
    report.metrics = {
        "dimension": encoder.dimension,
        "texts": {"n": len(text_keys), "computed": text_computed, "reused": text_reused},
        "sounds": {"n": len(audio_keys), "computed": computed, "reused": len(audio_ids) - computed - len(failed)},
        "tag_prompts": {"computed": tags_computed, "reused": tags_reused},
    }
    _write(layout.embeddings, encoder, phrases, (text_keys, text_vectors), (audio_keys, audio_vectors), quarantined)
    return report


def _posteriors(
    config: Config, layout: Layout, encoder: Bridge, memo: Memo, audio_ids: Sequence[str]
) -> tuple[dict[str, FloatArray], dict[str, str], int]:
    """Posteriors by id, reasons by id of those that failed, and how many were computed now."""
    known = {key: np.asarray(row["vector"], np.float32) for key, row in memo.load(audio_ids).items()}
    missing = [audio_id for audio_id in audio_ids if audio_id not in known]
    failed: dict[str, str] = {}
    if not missing:
        return known, failed, 0
    media = MediaReader(layout.media)
    for start in range(0, len(missing), config.batch_size):
        batch: dict[str, FloatArray] = {}
        for audio_id in missing[start : start + config.batch_size]:
            try:
                batch[audio_id] = encoder.posteriors(media.sound(audio_id))
            except StageError:
                raise
            except Exception as error:
                failed[audio_id] = f"{type(error).__name__}: {error}"
        memo.append({key: {"vector": vector} for key, vector in batch.items() if np.isfinite(vector).all()})
        known.update(batch)
        log.info("embedded %d of %d new sounds", min(start + config.batch_size, len(missing)), len(missing))
    return known, failed, len(missing) - len(failed)


def _split(keys: Sequence[str], vectors: FloatArray) -> tuple[list[str], FloatArray, dict[str, str]]:
    """Keys and rows that may enter the space, and the codes of the others."""
    codes = admit(vectors)
    good = [row for row, code in enumerate(codes) if not code]
    return [keys[row] for row in good], vectors[good], {keys[row]: code for row, code in enumerate(codes) if code}


def _write(
    folder: Path,
    encoder: Bridge,
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
    rows = [{"row": row, "text_id": key, "sound": phrases[key]} for row, key in enumerate(text_keys)]
    write_table(folder / "text_ids.parquet", TEXT_IDS, rows)
    write_table(folder / "audio_ids.parquet", AUDIO_IDS, [{"row": row, "audio_id": key} for row, key in enumerate(audio_keys)])
    write_table(folder / "quarantine.parquet", QUARANTINE, quarantined)
    meta = {
        "space": f"yamnet-minilm-{encoder.name}/{encoder.recipe}",
        "family": encoder.family,
        "families": list(encoder.families),
        "dimension": encoder.dimension,
        "metric": "inner product of unit rows",
        "fingerprint": fingerprint(encoder.describe()),
        "parameters": {
            "recipe": encoder.recipe,
            "temperature": encoder.temperature,
            "loudness_power": encoder.loudness_power,
            "min_windows": encoder.min_windows,
        },
        "texts": len(text_keys),
        "sounds": len(audio_keys),
        "sha256": {name: sha256_bytes(payload) for name, payload in payloads.items()},
    }
    write_json(folder / "meta.json", meta)


def _npy(vectors: FloatArray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(vectors, dtype=np.float32), allow_pickle=False)
    return buffer.getvalue()


def _quarantine(row: Mapping[str, Any], code: str, reason: str) -> dict[str, Any]:
    return {
        "item_id": row["audio_id"],
        "kind": "audio",
        "path": row["path"],
        "bytes": row["bytes"],
        "stage": "embed",
        "code": code,
        "reason": reason[:500],
        "decoder": "bridge",
        "action": "dropped",
        "retryable": False,
    }


def _quarantine_text(key: str, phrase: str, code: str) -> dict[str, Any]:
    reason = "MiniLM gave no usable vector"
    row = {"audio_id": key, "path": phrase, "bytes": len(phrase.encode("utf-8"))}
    return {**_quarantine(row, code, reason), "kind": "text"}
