"""Stage `caption`: every picture -> the sounds it suggests, or the reason why it suggests none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

import pyarrow as pa

from pipeline_steps.caption.config import Config
from pipeline_steps.caption.lexicon import parse_lexicon, parse_prior
from pipeline_steps.caption.phrases import clean_events
from pipeline_steps.core.atomic import write_json
from pipeline_steps.core.contracts import ABSTAINED, EVENTS, IMAGES, QUARANTINE
from pipeline_steps.core.errors import DataError, StageError
from pipeline_steps.core.identity import fingerprint, text_id
from pipeline_steps.core.layout import Layout
from pipeline_steps.core.media import MediaReader
from pipeline_steps.core.memo import Memo
from pipeline_steps.core.report import StageReport
from pipeline_steps.core.tables import read_table, write_table
from pipeline_steps.encoders.protocols import Picture
from pipeline_steps.encoders.tagger import Caption, Rules, Tag, Tagger

__all__ = ["Config", "build_captioner", "run"]

log = logging.getLogger(__name__)

MEMO_SCHEMA = pa.schema(
    [
        pa.field("vocabulary", pa.list_(pa.string())),
        pa.field("index", pa.list_(pa.int32())),
        pa.field("label", pa.list_(pa.string())),
        pa.field("probability", pa.list_(pa.float32())),
    ]
)


def build_captioner(config: Config, layout: Layout) -> Tagger:
    """The captioner a configuration asks for, weights not yet loaded."""
    folder = resources.files("pipeline_steps.caption")
    lexicon = parse_lexicon(folder.joinpath("lexicon.csv").read_text(encoding="utf-8"))
    prior = parse_prior(folder.joinpath("label_prior.csv").read_text(encoding="utf-8"))
    return Tagger(
        layout.assets,
        lexicon,
        Rules(config.max_events, config.min_confidence, config.min_share),
        config.detectors,
        config.views,
        config.min_probability,
        prior,
        config.prior_strength,
        models=config.models,
    )


def run(config: Config, layout: Layout) -> StageReport:
    """Caption every picture of the catalog.

    Raises:
        DataError: no picture in the catalog, or more than `max_bad_fraction` of them failed.
    """
    report = StageReport("caption")
    catalog = read_table(layout.catalog / "images.parquet", IMAGES).to_pylist()
    if not catalog:
        raise DataError("the picture pool is empty after ingest", "see data/catalog/quarantine.parquet: sonify quarantine list")
    captioner = build_captioner(config, layout)
    memo = Memo(config.memo or str(layout.memo), "caption", fingerprint(captioner.describe_tags()), MEMO_SCHEMA)
    ids = [row["image_id"] for row in catalog]
    known = {key: _tags(row) for key, row in memo.load(ids).items()}
    report.reused = len(known)
    media = MediaReader(layout.media)
    failed: dict[str, str] = {}
    missing = [image_id for image_id in ids if image_id not in known]
    if missing:
        captioner.load()
    for start in range(0, len(missing), config.batch_size):
        batch = missing[start : start + config.batch_size]
        found, errors = tag_batch(captioner.tags, {image_id: media.image(image_id) for image_id in batch})
        failed.update(errors)
        memo.append({image_id: _row(tags) for image_id, tags in found.items()})
        known.update({image_id: _tags(_row(tags)) for image_id, tags in found.items()})
        report.computed += len(found)
        log.info("captioned %d of %d new pictures", min(start + config.batch_size, len(missing)), len(missing))
    _write(config, layout, report, catalog, known, failed, captioner)
    return report


def tag_batch(
    tag: Callable[[Sequence[Picture]], list[list[Tag]]], pictures: Mapping[str, Picture]
) -> tuple[dict[str, list[Tag]], dict[str, str]]:
    """Tags by id, and reasons by id of those that failed.

    A captioner that returns fewer or more results than it was given cannot be matched to its pictures: then, and when it
    raises, the batch goes through one by one, so that one bad item never shifts or loses the others.
    """
    ids = list(pictures)
    try:
        results = tag([pictures[image_id] for image_id in ids])
        if len(results) == len(ids):
            return dict(zip(ids, results, strict=True)), {}
        log.warning("the captioner gave %d results for %d pictures; going one by one", len(results), len(ids))
    except StageError:
        raise
    except Exception as error:
        log.warning("the captioner failed on a batch of %d (%s); going one by one", len(ids), error)
    found: dict[str, list[Tag]] = {}
    errors: dict[str, str] = {}
    for image_id in ids:
        try:
            single = tag([pictures[image_id]])
        except StageError:
            raise
        except Exception as error:
            errors[image_id] = f"{type(error).__name__}: {error}"
            continue
        if len(single) == 1:
            found[image_id] = single[0]
        else:
            errors[image_id] = f"{len(single)} results for one picture"
    return found, errors


def _write(
    config: Config,
    layout: Layout,
    report: StageReport,
    catalog: list[dict[str, Any]],
    known: Mapping[str, list[Tag]],
    failed: Mapping[str, str],
    captioner: Tagger,
) -> None:
    events: list[dict[str, Any]] = []
    abstained: list[dict[str, Any]] = []
    quarantined: list[dict[str, Any]] = []
    for row in catalog:
        image_id = row["image_id"]
        report.n_in += 1
        if image_id in failed:
            quarantined.append(_quarantine(row, failed[image_id]))
            continue
        caption = captioner.compose(known[image_id])
        cleaned = clean_events(caption.events, config.max_phrase)
        if not cleaned:
            abstained.append(_abstained(image_id, caption))
            continue
        report.n_ok += 1
        for rank, event in enumerate(cleaned):
            events.append(
                {
                    "image_id": image_id,
                    "rank": rank,
                    "text_id": text_id(event.sound),
                    "sound": event.sound,
                    "source": event.source,
                    "visible": event.visible,
                    "salience": event.salience,
                    "confidence": event.confidence,
                }
            )
    report.n_abstained, report.n_quarantined = len(abstained), len(quarantined)
    if len(quarantined) > config.max_bad_fraction * report.n_in:
        first = quarantined[0]
        raise DataError(
            f"{len(quarantined)} of {report.n_in} pictures could not be captioned (first: {first['path']}: {first['reason']})",
            "mend the captioner or raise caption.max_bad_fraction",
        )
    codes = [row["code"] for row in abstained]
    report.metrics = {
        "events": len(events),
        "unique_texts": len({row["text_id"] for row in events}),
        "abstained": {code: codes.count(code) for code in sorted(set(codes))},
        "families": list(captioner.families),
        "fingerprint": fingerprint(captioner.describe()),
    }
    write_table(layout.captions / "events.parquet", EVENTS, events)
    write_table(layout.captions / "quarantine.parquet", QUARANTINE, quarantined)
    write_table(layout.captions / "abstained.parquet", ABSTAINED, abstained)
    described = {
        "captioner": config.captioner,
        "families": report.metrics["families"],
        "fingerprint": report.metrics["fingerprint"],
    }
    write_json(layout.captions / "meta.json", described)  # evaluation refuses judges of these families


def _abstained(image_id: str, caption: Caption) -> dict[str, Any]:
    code, reason = (caption.code, caption.reason) if caption.code else ("EMPTY", "no phrase was left after cleaning")
    return {"image_id": image_id, "stage": "caption", "code": code, "reason": reason, "score": caption.score}


def _quarantine(row: Mapping[str, Any], reason: str) -> dict[str, Any]:
    return {
        "item_id": row["image_id"],
        "kind": "image",
        "path": row["path"],
        "bytes": row["bytes"],
        "stage": "caption",
        "code": "CAPTION_FAILED",
        "reason": reason[:500],
        "decoder": "tagger",
        "action": "dropped",
        "retryable": True,
    }


def _row(tags: Sequence[Tag]) -> dict[str, Any]:
    return {
        "vocabulary": [tag.vocabulary for tag in tags],
        "index": [tag.index for tag in tags],
        "label": [tag.label for tag in tags],
        "probability": [tag.probability for tag in tags],
    }


def _tags(row: Mapping[str, Any]) -> list[Tag]:
    values = zip(row["vocabulary"], row["index"], row["label"], row["probability"], strict=True)
    return [Tag(vocabulary, index, label, probability) for vocabulary, index, label, probability in values]
