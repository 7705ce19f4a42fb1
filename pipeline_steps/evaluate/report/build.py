"""Build the report: every file by relative path, as a function of the results and the tables. No I/O."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline_steps.core.array_types import ByteArray, DoubleArray, FloatArray
from pipeline_steps.core.escape import escape_csv
from pipeline_steps.evaluate.config import EvaluateConfig
from pipeline_steps.evaluate.evaluation_plan import SET_TITLES, TRAINING_TITLE, EvaluationPlan
from pipeline_steps.evaluate.report import dvc_plots, summary
from pipeline_steps.evaluate.report.ability_cards import ability_cards, curve_rows
from pipeline_steps.evaluate.report.charts import interval_chart, line_chart
from pipeline_steps.evaluate.report.gallery import FIRST_SAMPLES, CatalogIndex, pair_cards, sample_cards
from pipeline_steps.evaluate.report.headline_metrics import headline_metrics
from pipeline_steps.evaluate.report.item_flow import StageTables, audio_flow, find_imbalances, image_flow, license_counts
from pipeline_steps.evaluate.report.media import ReportMedia, png
from pipeline_steps.evaluate.report.page import render_page
from pipeline_steps.evaluate.report.training_curves import TrainingHistory
from pipeline_steps.evaluate.run_evaluation import EvaluationResult

Row = Mapping[str, Any]

SPLITS = ("train", "val", "test")
Z_MEANING = (
    "z is the distance of a sound's score from the mean of random sounds in standard deviations. Purple text is ground truth, "
    "which only this stage reads."
)


def build_report(
    config: EvaluateConfig,
    evaluation: Row,
    result: EvaluationResult,
    plan: EvaluationPlan,
    ranks: Sequence[Row],
    tables: StageTables,
    history: TrainingHistory,
    load_image: Callable[[str], ByteArray],
    load_audio: Callable[[str], FloatArray],
) -> dict[str, bytes]:
    """Files of the report by relative path; the page is the last one.

    Args:
        config: the section `evaluate`.
        evaluation: content of `evaluation.json`.
        result: results of the evaluation.
        plan: pairs and clips.
        ranks: rank of each gold pair in the retrieval.
        tables: of the stages before.
        history: of the training.
        load_image: reads an image by id.
        load_audio: renders audio by the key of a mixture, or by id.
    """
    files: dict[str, bytes] = {}
    media = ReportMedia(load_image, load_audio)
    images, audio = ({row[key]: row for row in rows} for key, rows in (("image_id", tables.images), ("audio_id", tables.audio)))
    catalog = CatalogIndex(images, audio, plan.labels)
    limits, judge = config.report, config.image_judges[0]
    flows = {"images": image_flow(tables), "audio": audio_flow(tables)}
    coverage = (len(tables.pairs), sum(not row["holdout"] for row in tables.images))
    numbers = headline_metrics(evaluation, judge, config.audio_judge, *coverage)
    cards = pair_cards(tables.pairs, tables.events, tables.neighbors, catalog, media, limits.max_pairs, config.seed)
    context = {
        "meta": {
            "samples": config.samples_per_audio,
            "first_samples": FIRST_SAMPLES,
            "num_bootstrap": config.num_bootstrap,
            "reads_text": any(
                block["rows"]["text_oracle"].get("applicable", True) for block in summary.blocks(evaluation).values()
            ),
            "side": result.generated.shape[2],
            "strip_width": config.samples_per_audio * (result.generated.shape[3] + 2) - 2,
        },
        "findings": summary.findings(evaluation, numbers, coverage),
        "headline": summary.headline(evaluation, judge, config.audio_judge, coverage),
        "warnings": [*evaluation["warnings"], *(text for flow in flows.values() for text in find_imbalances(flow))],
        "pairs_rule": _pairs_rule(len(tables.pairs), limits.max_pairs),
        "pairs": _grouped(cards),
        "samples": _samples(config, result, plan, catalog, media),
        "charts": summary.win_charts(evaluation),
        "tables": summary.metric_tables(evaluation),
        "memorisation": {
            "tables": summary.memorisation_tables(evaluation),
            **{key: evaluation.get("memorisation", {}).get(key, 0) for key in ("training_images", "compared_images")},
        },
        "retrieval": summary.retrieval_table(evaluation["retrieval"]) if "retrieval" in evaluation else None,
        "sensitivity": _sensitivity(evaluation),
        "abilities": ability_cards(evaluation["abilities"], result.shown_sweeps, media),
        "training": _training(history, files),
        "flows": flows,
        "facts": _facts(tables),
        "abstained": summary.reason_table(
            _abstained(tables, catalog), limits.max_table_rows, lambda item: media.image(item) if item in images else None
        ),
        "quarantined": summary.reason_table(_quarantined(tables), limits.max_table_rows, lambda _: None),
        "protocol": evaluation["protocol"],
        "judge": judge,
        "ais_r2": evaluation["judges"].get(judge, {}).get("ais_leave_group_out_r2"),
    }
    files |= media.encode()
    files["plots/per_pair.csv"] = csv_bytes(result.per_pair)
    files["plots/bootstrap.csv"] = csv_bytes(_bootstrap_rows(result.bootstrap))
    files["plots/metrics.csv"] = csv_bytes(_metric_rows(evaluation))
    files["plots/abilities.csv"] = csv_bytes(curve_rows(evaluation["abilities"]))
    files["plots/retrieval.csv"] = csv_bytes(ranks)
    files |= _dvc_plots(evaluation, result, plan, history, judge, load_image)
    files["evaluation.json"] = json_bytes(evaluation)
    files["metrics.json"] = json_bytes(numbers)
    files["index.html"] = render_page(context).encode("utf-8")
    return files


def _dvc_plots(
    evaluation: Row,
    result: EvaluationResult,
    plan: EvaluationPlan,
    history: TrainingHistory,
    judge: str,
    load_image: Callable[[str], ByteArray],
) -> dict[str, bytes]:
    """Tables and sample grids that `plots:` of `dvc.yaml` names."""
    tables = {
        "training_loss": dvc_plots.training_rows(history.curves),
        "win_rates": dvc_plots.win_rate_rows(evaluation, judge),
        **{f"abilities/{name}": rows for name, rows in dvc_plots.ability_tables(evaluation["abilities"]).items()},
    }
    files = {f"plots/{name}.csv": csv_bytes(rows) for name, rows in tables.items() if rows}
    grids = dvc_plots.sample_grids(plan, result.generated, load_image)
    files |= {f"plots/samples/{name}.png": png(grid) for name, grid in grids.items()}
    if history.grids:
        files["plots/samples/training.png"] = history.grids[max(history.grids)]
    return files


def _grouped(cards: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cards by the reason why they are shown, in the order of first occurrence."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for card in cards:
        groups.setdefault(str(card["why"]), []).append(card)
    return [{"title": why.capitalize(), "cards": listed} for why, listed in groups.items()]


def _samples(
    config: EvaluateConfig, result: EvaluationResult, plan: EvaluationPlan, catalog: CatalogIndex, media: ReportMedia
) -> list[dict[str, Any]]:
    """Galleries of samples of the test set and of the gold set without the empty ones; of training pairs if both are empty."""
    judge = config.image_judges[0]
    metrics = [f"win_rate_{judge}", f"ais_win_rate_{config.audio_judge}_{judge}"]
    sections = []
    shown = {key: (SET_TITLES[key], plan.sets[key]) for key in ("test", "gold") if plan.sets[key]}
    if plan.shown_training_pairs:
        shown["training"] = (TRAINING_TITLE, plan.shown_training_pairs)
    for key, (title, pairs) in shown.items():
        partner, rates = [-1] * len(plan.clips), {}
        if key in result.sets:
            found = result.sets[key]
            partner = found.partner.tolist()
            measured = {metric: [row.get(f"{metric}.model") for row in found.pairs] for metric in metrics}
            rates = {name: values for name, values in measured.items() if any(value is not None for value in values)}
        cards = sample_cards(plan, pairs, partner, rates, catalog, media, result.generated, config.report.max_samples)
        sections.append({"key": key, "title": title, "shown": len(cards), "total": len(pairs), "cards": cards})
    return sections


def _pairs_rule(total: int, at_most: int) -> str:
    if total <= at_most:
        return f"All {total} pairs, in descending order of z times the confidence of the caption. {Z_MEANING}"
    third = at_most // 3
    return (
        f"{at_most} of {total} pairs, chosen by rule: the {third} with the highest z times the confidence of the caption, "
        f"{at_most - 2 * third} selected at random with a fixed seed, and the {third} with the lowest. {Z_MEANING}"
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
    return {"clips": next(iter(found.values()))["n"], "chart": chart} if chart else None


def _training(history: TrainingHistory, files: dict[str, bytes]) -> dict[str, Any]:
    """Charts of the training curves; the sample grids are added to `files`."""
    charts = []
    for title, prefix, smooth in (
        ("Training loss, mean of 50 steps", "loss", 50),
        ("Training loss by noise level, lowest (t0) to highest", "loss_t", 200),
        ("Loss on validation pairs, averaged weights", "validation_loss", 1),
    ):
        curves = {name: points for name, points in history.curves.items() if name.rstrip("0123456789") == prefix}
        chart = line_chart(curves, "optimizer steps", smooth)
        if chart:
            charts.append({"title": title, "chart": chart})
    grids = []
    for step, payload in sorted(history.grids.items()):
        path = f"samples/training-{step:07d}.png"
        files[path] = payload
        grids.append({"step": step, "path": path})
    return {"charts": charts, "grids": grids}


def _facts(tables: StageTables) -> list[dict[str, str]]:
    """Facts on the data set: counts of the pair table, and leaks and reuse as the stage `pair` measured them."""
    statistics = tables.pair_statistics
    counts = {split: sum(row["split"] == split for row in tables.pairs) for split in SPLITS}
    audio = {track["audio_id"] for row in tables.pairs for track in row["tracks"]}
    groups = {split: {row["audio_group"] for row in tables.pairs if row["split"] == split} for split in SPLITS}
    crossing = sum(len(groups[a] & groups[b]) for a, b in (("train", "val"), ("train", "test"), ("val", "test")))
    facts = [
        ("pairs by split", ", ".join(f"{split} {n}" for split, n in counts.items())),
        ("distinct sounds used", str(len(audio))),
        ("sound groups in two splits", str(crossing)),
    ]
    leaks = statistics.get("leaks")
    if isinstance(leaks, Mapping):
        listed = ", ".join(f"{name} {count}" for name, count in leaks.items())
        facts.append(("leaks found between splits", f"{sum(int(count) for count in leaks.values())} ({listed})"))
    licenses = ", ".join(f"{name} {n}" for name, n in license_counts(tables.pairs))
    facts.append(("licenses of the pairs (the stricter of image and audio)", licenses))
    for key, name in (("top1_baseline", "reuse with the first choice of each image"), ("assignment", "reuse as assigned")):
        found = statistics.get(key)
        if isinstance(found, Mapping) and {"max_reuse", "gini"} <= set(found):
            facts.append((name, f"each sound at most {found['max_reuse']} times, Gini {found['gini']:.2f}"))
    return [{"name": name, "text": text} for name, text in facts]


def _abstained(tables: StageTables, catalog: CatalogIndex) -> list[dict[str, Any]]:
    rows = [
        {"id": row["image_id"], "item": catalog.images[row["image_id"]]["path"], **_reason(row)}
        for row in (*tables.captions_abstained, *tables.pairs_abstained)
        if row["image_id"] in catalog.images and not catalog.images[row["image_id"]]["holdout"]
    ]
    return sorted(rows, key=lambda row: (row["stage"], row["code"], row["id"]))


def _quarantined(tables: StageTables) -> list[dict[str, Any]]:
    rows = [*tables.quarantine, *tables.captions_quarantine, *tables.embeddings_quarantine]
    found = [{"id": row["item_id"], "item": row["path"], **_reason(row)} for row in rows]
    return sorted(found, key=lambda row: (row["stage"], row["code"], row["item"]))


def _reason(row: Row) -> dict[str, Any]:
    return {name: row[name] for name in ("stage", "code", "reason")}


def _bootstrap_rows(bootstrap: Mapping[str, DoubleArray]) -> list[dict[str, Any]]:
    """One row per resample, one column per metric; 8 digits are far below the spread of the resamples."""
    names = sorted(bootstrap)
    return [
        {name: f"{value:.8g}" if np.isfinite(value) else "" for name, value in zip(names, row, strict=True)}
        for row in zip(*(bootstrap[name].tolist() for name in names), strict=True)
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
    """CSV with the union of the rows' keys as header.

    Text that a spreadsheet would run as a formula gets a leading apostrophe (OWASP ASVS 1.2.10).
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: escape_csv(row.get(name)) for name in names})
    return stream.getvalue().encode("utf-8")


def json_bytes(value: Row) -> bytes:
    """Sorted, indented JSON; NaN raises ValueError."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
