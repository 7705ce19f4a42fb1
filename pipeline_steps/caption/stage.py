"""Stage `caption`: every picture -> the sounds it suggests, or the reason why it suggests none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib import resources
from typing import TYPE_CHECKING, Any, cast

from pipeline_steps.caption.captioners.backends import TaggerBackend, VlmBackend, predict_batches
from pipeline_steps.caption.captioners.base import CaptionBackend, CaptionResult, EventSelection
from pipeline_steps.caption.captioners.prompt import CaptionFailure
from pipeline_steps.caption.captioners.tagger import TaggerCaptioner
from pipeline_steps.caption.captioners.vlm_response import VlmPromptOptions
from pipeline_steps.caption.config import CaptionConfig
from pipeline_steps.caption.lexicon import parse_label_prior, parse_lexicon
from pipeline_steps.caption.text_cleaning import clean_events
from pipeline_steps.core.atomic import write_json
from pipeline_steps.core.errors import DataError
from pipeline_steps.core.executors.base import Result
from pipeline_steps.core.executors.run import run_items
from pipeline_steps.core.hashing import fingerprint, text_id
from pipeline_steps.core.media_shards import MediaShardReader
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.result_cache import ResultCache
from pipeline_steps.core.schemas import ABSTAINED, EVENTS, IMAGES, QUARANTINE
from pipeline_steps.core.stage_report import StageReport
from pipeline_steps.core.tables import read_table, write_table

if TYPE_CHECKING:
    from pipeline_steps.caption.captioners.openai_server import OpenAIServerCaptioner
    from pipeline_steps.caption.captioners.vlm import VlmCaptioner

__all__ = ["CaptionConfig", "build_caption_backend", "build_captioner", "run"]


def build_captioner(config: CaptionConfig, layout: ProjectPaths) -> TaggerCaptioner | VlmCaptioner | OpenAIServerCaptioner:
    """The captioner a configuration asks for, weights not yet loaded, nothing fetched."""
    rules = EventSelection(config.max_events, config.min_confidence, config.min_share)
    asking = VlmPromptOptions(config.max_events, config.asking.max_new, config.asking.verify, config.asking.min_verified)
    if config.captioner == "vlm":
        from pipeline_steps.caption.captioners.vlm import VlmCaptioner

        vlm = config.vlm
        folder = layout.root / vlm.model
        model = str(folder) if folder.is_dir() else vlm.model
        return VlmCaptioner(model, vlm.revision, rules, asking, vlm.device, vlm.precision, vlm.constrain)
    if config.captioner == "endpoint":
        from pipeline_steps.caption.captioners.chat_client import ServerOptions
        from pipeline_steps.caption.captioners.openai_server import OpenAIServerCaptioner

        limits = config.endpoint.model_dump(exclude={"families", "guided"})
        return OpenAIServerCaptioner(ServerOptions(**limits), config.endpoint.families, config.endpoint.guided, rules, asking)
    data = resources.files("pipeline_steps.caption")
    lexicon = parse_lexicon(data.joinpath("lexicon.csv").read_text(encoding="utf-8"))
    prior = parse_label_prior(data.joinpath("label_prior.csv").read_text(encoding="utf-8"))
    return TaggerCaptioner(
        layout.assets,
        lexicon,
        rules,
        config.detectors,
        config.views,
        config.min_probability,
        prior,
        config.prior_strength,
        models=config.models,
    )


def build_caption_backend(config: CaptionConfig, layout: ProjectPaths) -> CaptionBackend[Any]:
    """The captioner of a configuration as the stage uses it."""
    captioner = build_captioner(config, layout)
    if isinstance(captioner, TaggerCaptioner):
        return TaggerBackend(captioner, config.batch_size)
    if config.captioner == "endpoint":
        return VlmBackend(captioner, cast("OpenAIServerCaptioner", captioner).stream)
    return VlmBackend(captioner, partial(predict_batches, cast("VlmCaptioner", captioner).look, size=config.batch_size))


def run(config: CaptionConfig, layout: ProjectPaths) -> StageReport:
    """Caption every picture of the catalog.

    Raises:
        DataError: no picture in the catalog, or more than `max_failed_fraction` of them failed.
        ConfigError, IntegrityError: a model that cannot be used or must not be loaded.
        ServiceError: a server or hub that is needed is away; finished pictures are in the memo.
    """
    report = StageReport("caption")
    catalog = read_table(layout.catalog / "images.parquet", IMAGES).to_pylist()
    if not catalog:
        raise DataError("the picture pool is empty after ingest", "see data/catalog/quarantine.parquet: sonify quarantine list")
    work = CaptionProcessor(config, layout)
    looks = work.looks
    ids = [row["image_id"] for row in catalog]
    known = {key: looks.seen(row) for key, row in work.cache.load(ids).items()}
    report.reused = len(known)
    done = run_items(work, [key for key in ids if key not in known], config.batch_size, config.executor, config.ray)
    rows = {**done.rows, **work.cache.load(done.remembered)}
    known.update({key: looks.seen(row) for key, row in rows.items()})
    report.computed = len(rows)
    failed = {key: CaptionFailure(*failure) for key, failure in done.failed.items()}
    _write(config, layout, report, catalog, known, failed, looks)
    return report


class CaptionProcessor:
    """Pictures of the shards -> rows of the memo, in the stage's own process or in an actor of a cluster."""

    def __init__(self, config: CaptionConfig, layout: ProjectPaths) -> None:
        self._settings = (config, layout)
        self.looks = build_caption_backend(config, layout)
        url = config.cache_dir or str(layout.result_cache)
        self.cache = ResultCache(url, "caption", fingerprint(self.describe()), self.looks.schema)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_processor, (*self._settings, self.cache)

    def describe(self) -> dict[str, Any]:
        return self.looks.describe_looks()

    def load(self) -> None:
        self.looks.load()
        self._media = MediaShardReader(self._settings[1].media)

    def results(self, ids: Sequence[str]) -> Iterator[tuple[str, Result]]:
        pictures = ((image_id, self._media.image(image_id)) for image_id in ids)
        for image_id, seen in self.looks.stream(pictures):
            yield image_id, seen if isinstance(seen, CaptionFailure) else self.looks.row(seen)


def _restore_processor(config: CaptionConfig, layout: ProjectPaths, memo: ResultCache) -> CaptionProcessor:
    """The work as it arrives in an actor: with the memo of the process that sent it, whatever this one would describe."""
    work = CaptionProcessor(config, layout)
    work.cache = memo
    return work


def _write(
    config: CaptionConfig,
    layout: ProjectPaths,
    report: StageReport,
    catalog: list[dict[str, Any]],
    known: Mapping[str, Any],
    failed: Mapping[str, CaptionFailure],
    looks: CaptionBackend[Any],
) -> None:
    events: list[dict[str, Any]] = []
    abstained: list[dict[str, Any]] = []
    quarantined: list[dict[str, Any]] = []
    for row in catalog:
        image_id = row["image_id"]
        report.n_in += 1
        if image_id in failed:
            quarantined.append(_quarantine_row(row, failed[image_id], config.captioner))
            continue
        caption = looks.compose(known[image_id])
        cleaned = clean_events(caption.events, config.max_phrase)
        if not cleaned:
            abstained.append(_abstention_row(image_id, caption))
            continue
        report.n_ok += 1
        for rank, event in enumerate(cleaned):
            events.append(
                {
                    "image_id": image_id,
                    "rank": rank,
                    "text_id": text_id(event.sound),
                    "phrase": event.sound,
                    "sound_source": event.source,
                    "visible": event.visible,
                    "salience": event.salience,
                    "confidence": event.confidence,
                }
            )
    report.n_abstained, report.n_quarantined = len(abstained), len(quarantined)
    if len(quarantined) > config.max_failed_fraction * report.n_in:
        first = quarantined[0]
        raise DataError(
            f"{len(quarantined)} of {report.n_in} pictures could not be captioned (first: {first['path']}: {first['reason']})",
            "mend the captioner or raise caption.max_failed_fraction",
        )
    codes = [row["code"] for row in abstained]
    report.metrics = {
        "events": len(events),
        "unique_texts": len({row["text_id"] for row in events}),
        "abstained": {code: codes.count(code) for code in sorted(set(codes))},
        "families": list(looks.families),
        "fingerprint": fingerprint(looks.describe()),
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


def _abstention_row(image_id: str, caption: CaptionResult) -> dict[str, Any]:
    code, reason = (caption.code, caption.reason) if caption.code else ("EMPTY", "no phrase was left after cleaning")
    return {"image_id": image_id, "stage": "caption", "code": code, "reason": reason, "score": caption.score}


def _quarantine_row(row: Mapping[str, Any], failed: CaptionFailure, decoder: str) -> dict[str, Any]:
    return {
        "item_id": row["image_id"],
        "kind": "image",
        "path": row["path"],
        "bytes": row["bytes"],
        "stage": "caption",
        "code": failed.code,
        "reason": failed.reason[:500],
        "decoder": decoder,
        "action": "dropped",
        "retryable": True,
    }
