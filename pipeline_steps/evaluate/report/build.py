"""The report folder as a mapping of relative path -> bytes: a pure function of what was measured and of the tables."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline_steps.core.array_types import ByteArray, FloatArray
from pipeline_steps.core.escape import escape_csv
from pipeline_steps.evaluate.config import EvaluateConfig
from pipeline_steps.evaluate.evaluation_plan import EvaluationPlan
from pipeline_steps.evaluate.report import summary
from pipeline_steps.evaluate.report.charts import interval_chart, line_chart
from pipeline_steps.evaluate.report.gallery import FIRST_DRAWS, CatalogIndex, MediaPaths, pair_cards, sample_cards
from pipeline_steps.evaluate.report.item_flow import StageTables, find_imbalances, license_counts, picture_flow, sound_flow
from pipeline_steps.evaluate.report.media import mp3, png, spectrogram, strip, thumbnail
from pipeline_steps.evaluate.report.page import render_page
from pipeline_steps.evaluate.run_evaluation import EvaluationResult

Row = Mapping[str, Any]
FloatArray64 = npt.NDArray[np.float64]

THUMBNAIL = 224
"""px of the longer side of a real picture in the report."""

WORKERS = 4
"""Media made at a time; the encoders work outside Python's lock."""

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class MediaLoaders:
    """How the report gets at media: picture by id, sound by key (a catalog id or the key of a mixture)."""

    picture: Callable[[str], ByteArray]
    sound: Callable[[str], FloatArray]


@dataclass(frozen=True, slots=True)
class TrainingHistory:
    """What the model folder says about its training: curves name -> [(step, value)], and grids step -> PNG bytes."""

    curves: Mapping[str, Sequence[tuple[float, float]]]
    grids: Mapping[int, bytes]


def build_report(
    config: EvaluateConfig,
    evaluation: Row,
    assessment: EvaluationResult,
    agenda: EvaluationPlan,
    ranks: Sequence[Row],
    tables: StageTables,
    neighbours: Sequence[Row],
    statistics: Row,
    labels: Mapping[str, str],
    training: TrainingHistory,
    sources: MediaLoaders,
) -> dict[str, bytes]:
    """Every file of the report; the page comes last, so that whoever writes in order has it once all else is there."""
    files: dict[str, bytes] = {}
    shelf = _MediaWriter(sources)
    catalog = CatalogIndex(
        {row["image_id"]: row for row in tables.images}, {row["audio_id"]: row for row in tables.audio}, labels
    )
    judge = config.picture_judges[0]
    titles = agenda.titles
    context = {
        "meta": {
            "samples": config.samples_per_sound,
            "first_draws": FIRST_DRAWS,
            "repeats": config.bootstrap_repeats,
            "reads_text": any(
                block["rows"]["text_oracle"].get("applicable", True) for block in summary.blocks(evaluation, titles)
            ),
            "side": assessment.drawn.shape[2],
            "strip_width": config.samples_per_sound * (assessment.drawn.shape[3] + 2) - 2,
        },
        "headline": summary.headline(evaluation, judge, config.sound_judge, _coverage(tables)),
        "warnings": [*evaluation["warnings"], *find_imbalances(picture_flow(tables)), *find_imbalances(sound_flow(tables))],
        "pairs_rule": _pairs_rule(len(tables.pairs), config.gallery_pairs),
        "pairs": _grouped(
            pair_cards(tables.pairs, tables.events, neighbours, catalog, shelf.shelf, config.gallery_pairs, config.seed)
        ),
        "drawn": _drawn(config, assessment, agenda, shelf),
        "charts": summary.win_charts(evaluation, titles),
        "tables": summary.metric_tables(evaluation, titles),
        "retrieval": summary.retrieval_table(evaluation["retrieval"]) if "retrieval" in evaluation else None,
        "sensitivity": _sensitivity(evaluation),
        "training": _training(training, files),
        "flows": {"pictures": picture_flow(tables), "sounds": sound_flow(tables)},
        "facts": _facts(tables, statistics),
        "abstained": summary.reason_table(_abstained(tables, catalog), config.table_rows, shelf.known_picture(catalog)),
        "quarantined": summary.reason_table(_quarantined(tables), config.table_rows, lambda _: None),
        "protocol": evaluation["protocol"],
        "judge": judge,
        "ais_r2": evaluation["judges"][judge].get("ais_leave_group_out_r2"),
    }
    files |= shelf.make()
    files["plots/items.csv"] = csv_bytes(assessment.items)
    files["plots/draws.csv"] = csv_bytes(_draw_rows(assessment.draws))
    files["plots/metrics.csv"] = csv_bytes(_metric_rows(evaluation))
    files["plots/retrieval.csv"] = csv_bytes(ranks)
    files["evaluation.json"] = json_bytes(evaluation)
    files["index.html"] = render_page(context).encode("utf-8")
    return files


class _MediaWriter:
    """Says where media will lie in the report, and makes what was asked for, several at a time."""

    def __init__(self, sources: MediaLoaders) -> None:
        self._makers: dict[str, Callable[[], bytes]] = {}
        self._sources = sources
        self.shelf = MediaPaths(self.picture, self.audio, self.spectrogram)

    def picture(self, image_id: str) -> str:
        path = f"samples/picture-{image_id}.jpg"
        return self._put(path, lambda: thumbnail(self._sources.picture(image_id), THUMBNAIL))

    def audio(self, key: str) -> str:
        return self._put(f"audio/{key}.mp3", lambda: mp3(self._sources.sound(key)))

    def spectrogram(self, key: str) -> str:
        path = f"samples/spectrogram-{key}.png"
        return self._put(path, lambda: png(spectrogram(self._sources.sound(key)), palette=True))

    def strip(self, key: str, pictures: ByteArray) -> str:
        return self._put(f"samples/drawn-{key}.png", lambda: png(strip(pictures)))

    def known_picture(self, catalog: CatalogIndex) -> Callable[[str], str | None]:
        return lambda item: self.picture(item) if item in catalog.images else None

    def make(self) -> dict[str, bytes]:
        """Every file asked for so far, by path."""
        paths = sorted(self._makers)
        with ThreadPoolExecutor(WORKERS) as pool:
            return dict(zip(paths, pool.map(lambda path: self._makers[path](), paths), strict=True))

    def _put(self, path: str, make: Callable[[], bytes]) -> str:
        self._makers.setdefault(path, make)
        return path


def _grouped(cards: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cards by the reason why they are shown, in the order of their first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for card in cards:
        groups.setdefault(str(card["why"]), []).append(card)
    return [{"title": why.capitalize(), "cards": listed} for why, listed in groups.items()]


def _drawn(
    config: EvaluateConfig, assessment: EvaluationResult, agenda: EvaluationPlan, shelf: _MediaWriter
) -> list[dict[str, Any]]:
    """Galleries of the test set and of the gold set (its seen part is marked on the cards)."""
    metrics = [f"win_rate_{config.picture_judges[0]}", f"ais_winrate_{config.sound_judge}_{config.picture_judges[0]}"]
    sections = []

    def at(sound: int) -> str:
        return shelf.strip(agenda.sounds[sound].key, assessment.drawn[sound])

    for key in ("test", "gold"):
        items = agenda.sets[key]
        cards: list[dict[str, Any]] = []
        if key in assessment.outcomes:
            outcome = assessment.outcomes[key]
            rates = {metric: [row.get(f"{metric}.model") for row in outcome.items] for metric in metrics}
            rates = {name: values for name, values in rates.items() if any(value is not None for value in values)}
            if rates:
                cards = sample_cards(
                    items,
                    agenda.sounds,
                    outcome.partner.tolist(),
                    rates,
                    agenda.seen_classes,
                    shelf.shelf,
                    at,
                    config.gallery_draws,
                )
        sections.append({"key": key, "title": agenda.titles[key], "shown": len(cards), "total": len(items), "cards": cards})
    return sections


def _coverage(tables: StageTables) -> tuple[int, int]:
    return len(tables.pairs), sum(not row["holdout"] for row in tables.images)


def _pairs_rule(total: int, at_most: int) -> str:
    if total <= at_most:
        return f"All {total} pairs, the most certain first."
    third = at_most // 3
    return (
        f"{at_most} of {total} pairs, chosen by rule: the {third} with the highest z, {at_most - 2 * third} drawn at random "
        f"with a fixed seed, and the {third} with the lowest z. z says how many standard deviations a sound's score lies above "
        "random sounds. Purple text is ground truth, which no step before this report has read."
    )


def _sensitivity(evaluation: Row) -> dict[str, Any] | None:
    found = evaluation.get("sensitivity")
    if not found:
        return None
    names = {"other_noise": "same sound, other noise", "other_sound": "other sound, same noise"}
    rows = [
        (
            names.get(name, name.removeprefix("gain_").replace("_db", " dB").replace("-", "\u2212")),
            value,
            "control" if name in names else "model",
        )
        for name, value in found.items()
    ]
    chart = interval_chart(rows, bounds=(0.0, 1.0))
    return {"sounds": next(iter(found.values()))["n"], "chart": chart} if chart else None


def _training(training: TrainingHistory, files: dict[str, bytes]) -> dict[str, Any]:
    charts = []
    for title, prefix, smooth in (
        ("Training loss, mean of 50 steps", "loss", 50),
        ("Training loss by noise level, from little (t0) to nearly pure noise", "loss_t", 200),
        ("Loss on validation pairs, averaged weights", "validation_loss", 1),
    ):
        curves = {name: points for name, points in training.curves.items() if name.rstrip("0123456789") == prefix}
        chart = line_chart(curves, "optimiser steps", smooth)
        if chart:
            charts.append({"title": title, "chart": chart})
    grids = []
    for step, payload in sorted(training.grids.items()):
        path = f"samples/training-{step:07d}.png"
        files[path] = payload
        grids.append({"step": step, "path": path})
    return {"charts": charts, "grids": grids}


def _facts(tables: StageTables, statistics: Row) -> list[dict[str, str]]:
    """What a data-set card would say, counted here from the pair table (leaks and re-use as the pair stage measured them)."""
    counts = {split: sum(row["split"] == split for row in tables.pairs) for split in SPLITS}
    sounds = {track["audio_id"] for row in tables.pairs for track in row["tracks"]}
    groups = {split: {row["audio_group"] for row in tables.pairs if row["split"] == split} for split in SPLITS}
    crossing = sum(len(groups[a] & groups[b]) for a, b in (("train", "val"), ("train", "test"), ("val", "test")))
    facts = [
        ("pairs by split", ", ".join(f"{split} {n}" for split, n in counts.items())),
        ("different sounds used", str(len(sounds))),
        ("sound groups in two splits", str(crossing)),
        (
            "licenses of the pairs (the stricter of both sides)",
            ", ".join(f"{name} {n}" for name, n in license_counts(tables.pairs)),
        ),
    ]
    leaks = statistics.get("leaks")
    if isinstance(leaks, Mapping):
        facts.insert(
            3,
            (
                "leaks found between splits",
                f"{sum(int(n) for n in leaks.values())} ({', '.join(f'{k} {v}' for k, v in leaks.items())})",
            ),
        )
    for key, name in (("top1_baseline", "re-use if each picture took its first choice"), ("assignment", "re-use as assigned")):
        found = statistics.get(key)
        if isinstance(found, Mapping) and {"max_reuse", "gini"} <= set(found):
            facts.append((name, f"a sound at most {found['max_reuse']} times, Gini {found['gini']:.2f}"))
    return [{"name": name, "text": text} for name, text in facts]


def _abstained(tables: StageTables, catalog: CatalogIndex) -> list[dict[str, Any]]:
    pool = {row["image_id"] for row in tables.images if not row["holdout"]}
    rows = [row for row in (*tables.captions_abstained, *tables.pairs_abstained) if row["image_id"] in pool]
    return [
        {
            "id": row["image_id"],
            "item": catalog.images[row["image_id"]]["path"],
            **{k: row[k] for k in ("stage", "code", "reason")},
        }
        for row in sorted(rows, key=lambda row: (row["stage"], row["code"], row["image_id"]))
    ]


def _quarantined(tables: StageTables) -> list[dict[str, Any]]:
    rows = [*tables.quarantine, *tables.captions_quarantine, *tables.embeddings_quarantine]
    return [
        {"id": row["item_id"], "item": row["path"], **{key: row[key] for key in ("stage", "code", "reason")}}
        for row in sorted(rows, key=lambda row: (row["stage"], row["code"], row["path"]))
    ]


def _draw_rows(draws: Mapping[str, FloatArray64]) -> list[dict[str, Any]]:
    """One row a bootstrap repeat, one column a metric; 8 digits are far below the noise of the draws."""
    names = sorted(draws)
    return [
        {name: f"{value:.8g}" if np.isfinite(value) else "" for name, value in zip(names, row, strict=True)}
        for row in zip(*(draws[name].tolist() for name in names), strict=True)
    ]


def _metric_rows(evaluation: Row) -> list[dict[str, Any]]:
    rows = []
    for key, block in evaluation.items():
        if isinstance(block, Mapping) and "rows" in block:
            for row, metrics in block["rows"].items():
                for metric, found in metrics.items():
                    if isinstance(found, Mapping) and found.get("value") is not None:
                        values = {name: found.get(name) for name in ("value", "low", "high", "n", "clusters", "judge", "seed")}
                        rows.append({"set": key, "row": row, "metric": metric, **values})
    return rows


def csv_bytes(rows: Sequence[Row]) -> bytes:
    """Rows as CSV with the union of their keys as header. A text that a spreadsheet would run as a formula gets a leading
    apostrophe (OWASP ASVS 1.2.10)."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: escape_csv(row.get(name)) for name in names})
    return stream.getvalue().encode("utf-8")


def json_bytes(value: Row) -> bytes:
    """Sorted, indented JSON; NaN is refused."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
