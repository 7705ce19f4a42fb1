"""Texts, tables and charts of the page from `evaluation.json` and the tables. No I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline_steps.core.statistics import is_above_chance
from pipeline_steps.evaluate.evaluation_plan import SET_TITLES
from pipeline_steps.evaluate.metrics.set_metrics import LOOKUP_ROWS, ROWS
from pipeline_steps.evaluate.report.charts import interval_chart
from pipeline_steps.evaluate.report.headline_metrics import SETS
from pipeline_steps.evaluate.report.page import interval_text

Row = Mapping[str, Any]
DIFFERENCE = LOOKUP_ROWS[1]
"""Row of differences; the chart of win rates leaves it out."""
KINDS = {"model": "model", "real_images": "truth", "text_oracle": "truth"}


def findings(evaluation: Row, numbers: Row, pool: tuple[int, int]) -> list[str]:
    """Sentences that say what the report found, flat results too.

    Args:
        evaluation: content of `evaluation.json`.
        numbers: `headline_metrics` of it.
        pool: (paired images, all images).
    """
    found = [f"{pool[0]} of {pool[1]} images of the pool are paired with a sound."]
    for name in SETS:
        metrics = numbers.get(name, {})
        if "win_rate" not in metrics:
            continue
        value, low, high = (metrics.get(f"win_rate{suffix}") for suffix in ("", "_low", "_high"))
        shown = "" if is_above_chance(low) else "It is not shown that "
        interval = "" if low is None else f" [{100 * low:.0f}, {100 * high:.0f}]"
        limit = "; too few to rank models" if evaluation[name]["too_small_to_rank"] else ""
        found.append(
            f"{shown}{'the' if shown else 'The'} images follow the sound on {metrics['clips']} {name} sounds: an image "
            "generated from the sound of a pair is nearer to the real image than one from another sound in "
            f"{100 * value:.0f} %{interval} of the comparisons (chance: 50 %{limit})."
        )
    if "gain_over_lookup" in numbers.get("test", {}):
        low, high = numbers["test"].get("gain_over_lookup_low"), numbers["test"].get("gain_over_lookup_high")
        verdict = "not shown to differ from"
        if low is not None and low > 0:
            verdict = "better than"
        elif high is not None and high < 0:
            verdict = "worse than"
        found.append(f"On the test pairs the model is {verdict} a lookup of the training image whose sound is nearest.")
    if len(found) == 1:
        reasons = [text for text in evaluation["warnings"] if text.startswith("too few to judge")]
        found.append(f"The model was not judged: {reasons[0] if reasons else 'no win rate was measured'}.")
    return found


def headline(evaluation: Row, judge: str, audio_judge: str, pool: tuple[int, int]) -> list[dict[str, Any]]:
    """Cards of the key figures, each with its meaning and its limits; `pool` is (paired images, all images)."""
    win, ais = f"win_rate_{judge}", f"ais_win_rate_{audio_judge}_{judge}"
    cards = []
    for name, title in (
        ("test", "Win rate on test pairs"),
        ("gold_seen_classes", "Win rate on gold pairs of classes seen in training"),
    ):
        block = evaluation.get(name)
        if not block:
            continue
        found = block["rows"]["model"].get(win, {})
        truth = block["rows"]["real_images"].get(win, {})
        cards.append(
            _card(
                title,
                found,
                "How often an image generated from the pair's sound is nearer to the real image than one generated from "
                "another sound. 0.5 is chance.",
                "With other real images of the class instead of generated ones: "
                f"{interval_text(truth)} on the {truth.get('n', 0)} of {block['n_pairs']} pairs that have one.",
                0.5,
            )
        )
    if "test" in evaluation:
        rows = evaluation["test"]["rows"]
        if rows["model"].get(ais, {}).get("value") is not None:
            truth = rows["real_images"].get(ais, {})
            cards.append(
                _card(
                    "Audio-image agreement on test pairs",
                    rows["model"][ais],
                    "Win rate without the real image: its features are predicted from the sound by a linear regression "
                    "that is fitted on the real media of the training pairs.",
                    f"With the pairs' own real images: {interval_text(truth)}, n={truth.get('n', 0)}. On sound groups left "
                    "out of the fit the regression predicts "
                    f"{100 * evaluation['judges'][judge]['ais_leave_group_out_r2']:.1f} % of the variance of image features.",
                    0.5,
                )
            )
        kid = rows["model"].get(f"kid_{judge}", {})
        cards.append(
            _card(
                "Distance of generated to real images (KID)",
                kid,
                f"Generated without audio: {interval_text(rows['unconditional'].get(f'kid_{judge}', {}))}. "
                f"Training images: {interval_text(rows['real_images'].get(f'kid_{judge}', {}))}.",
                "Lower is better. It uses the features of this judge and is not comparable with KID or FID from papers.",
            )
        )
        difference = rows[DIFFERENCE].get(win, {})
        if difference.get("value") is not None:
            cards.append(
                _card(
                    "Gain over the nearest training image, test pairs",
                    difference,
                    "Win rate of the generated images minus that of the training image whose sound is nearest.",
                    f"The lookup: {interval_text(rows[LOOKUP_ROWS[0]][win])}. Zero or less: no gain over the lookup.",
                    0.0,
                )
            )
    if copies := evaluation.get("memorisation", {}).get("sets", {}).get("test"):
        real = copies["held_out_images"]["copy_fraction"]
        cards.append(
            _card(
                "Copies of training images",
                copies["model"]["copy_fraction"],
                "Fraction of the images generated from test sounds that lie within 25 gray levels of a training image.",
                f"Held-out real images: {interval_text(real)}.",
            )
        )
    retrieval = evaluation.get("retrieval")
    if retrieval:
        own, random = retrieval["rows"]["pipeline"]["recall_at_10"], retrieval["rows"]["random"]["recall_at_10"]
        oracle = retrieval["rows"].get("label_oracle", {}).get("recall_at_10", {})
        cards.append(
            _card(
                "Recall of the gold sound at 10",
                own,
                f"Gold images as queries among {retrieval['candidates']} sounds; chance {interval_text(random)}, "
                f"with the true label as the query {interval_text(oracle)}.",
                "Only the image's own recording counts; another recording of the same class does not.",
                float(random["value"]),
            )
        )
    paired, total = pool
    fraction = {"value": paired / total if total else None}
    cards.append(
        _card(
            "Images paired with a sound",
            fraction,
            f"{paired} of {total} in the pool.",
            "The section on abstained images lists the reasons of the others.",
        )
    )
    return cards


def _card(title: str, found: Row, meaning: str, limit: str, chance: float | None = None) -> dict[str, Any]:
    """Card of a value; `tone` is "good" if its whole interval is above `chance` and "bad" otherwise, if both are known."""
    value, _, interval = interval_text(found).partition(" ")
    n = f"n={found['n']}" if found.get("n") else ""
    tone = "" if chance is None or found.get("low") is None else "good" if float(found["low"]) > chance else "bad"
    shown = [f"95 % interval {interval}" if interval else "", n]
    return {
        "title": title,
        "value": value,
        "interval": " \u00b7 ".join(part for part in shown if part),
        "text": meaning,
        "limit": limit,
        "tone": tone,
    }


def metric_tables(evaluation: Row) -> list[dict[str, Any]]:
    """One table per set: a line per metric, a column per row of the protocol."""
    tables = []
    for name, block in blocks(evaluation).items():
        metrics = list(dict.fromkeys(metric for row in ROWS[:4] for metric in block["rows"][row]))
        lines = [
            {"name": metric, "better": better(metric), "cells": [_cell(block["rows"][row], metric) for row in ROWS]}
            for metric in metrics
        ]
        columns = [column.replace("_", " ") for column in ROWS]
        facts = {"title": SET_TITLES[name], "pairs": block["n_pairs"], "sounds": block["n_sounds"]}
        tables.append({**facts, "columns": columns, "lines": lines})
    return tables


def better(metric: str) -> str:
    """Direction in which a metric is better, as a word for the table."""
    if metric.startswith(("kid", "cmmd", "mmd", "fd")):
        return "lower"
    return "higher" if metric.startswith(("win", "ais", "coverage")) else "near 1"


def _cell(row: Row, metric: str) -> dict[str, Any]:
    if row.get("applicable") is False:
        return {"text": "n/a", "reason": row["reason"], "n": None}
    found = row.get(metric, {"value": None, "reason": "not measured"})
    n = found.get("n")
    return {"text": interval_text(found), "reason": found.get("reason"), "n": n}


MEMORISATION_LINES = {
    "nearest_rmse": "distance to the nearest training image, gray levels",
    "copy_fraction": "fraction within 25 gray levels: copies",
    "recalled_fraction": "fraction of the training images that are the nearest one of some image",
    "diverse_fraction": "fraction of sounds without two samples within 20 gray levels",
}


def memorisation_tables(evaluation: Row) -> list[dict[str, Any]]:
    """One table per set: generated images beside held-out real ones."""
    columns = ("model", "held_out_images")
    return [
        {
            "title": SET_TITLES[key],
            "lines": [
                {"name": text, "cells": [_cell(rows[column], metric) for column in columns]}
                for metric, text in MEMORISATION_LINES.items()
                if metric in rows["model"]
            ],
        }
        for key, rows in evaluation.get("memorisation", {}).get("sets", {}).items()
    ]


def blocks(evaluation: Row) -> dict[str, Row]:
    """Blocks of the evaluated sets by name."""
    return {name: evaluation[name] for name in SET_TITLES if name in evaluation}


def win_charts(evaluation: Row) -> list[dict[str, Any]]:
    """One interval chart per win-rate metric: rows of every set."""
    metrics = list(
        dict.fromkeys(
            metric
            for block in blocks(evaluation).values()
            for metric in block["rows"]["model"]
            if metric.startswith(("win_rate", "ais_win_rate"))
        )
    )
    charts = []
    for metric in metrics:
        rows = [
            (
                f"{name.replace('_', ' ')}: {row.replace('_', ' ')}, n={found.get('n', 0)}",
                found,
                KINDS.get(row, "control"),
            )
            for name, block in blocks(evaluation).items()
            for row in ROWS
            if row != DIFFERENCE and block["rows"][row].get("applicable") is not False
            for found in (block["rows"][row].get(metric, {}),)
        ]
        chart = interval_chart(rows, reference=0.5, bounds=(0.3, 0.9))
        if chart:
            charts.append({"title": metric, "chart": chart})
    return charts


def retrieval_table(retrieval: Row) -> dict[str, Any]:
    """Lines of the retrieval table; seen and unseen classes have lines of their own."""
    names = {
        "pipeline": "sound events of the image",
        "pipeline_seen": "the same, classes seen in training",
        "pipeline_unseen": "the same, classes not seen",
        "label_oracle": "true label as text (oracle)",
        "random": "random order",
    }
    columns = {"recall_at_1": "R@1", "recall_at_5": "R@5", "recall_at_10": "R@10", "mrr": "MRR", "median_rank": "median rank"}
    lines = [
        {"name": text, "cells": [interval_text(retrieval["rows"][name][metric]) for metric in columns]}
        for name, text in names.items()
        if name in retrieval["rows"]
    ]
    return {
        "queries": retrieval["queries"],
        "candidates": retrieval["candidates"],
        "columns": list(columns.values()),
        "lines": lines,
    }


def reason_table(rows: Sequence[Row], at_most: int, thumbnail: Callable[[str], str | None]) -> dict[str, Any]:
    """Counts by (stage, code) with an example, and the first rows; `thumbnail` returns a path for an item or None."""
    counts = Counter((str(row["stage"]), str(row["code"])) for row in rows)
    example = {(str(row["stage"]), str(row["code"])): row["reason"] for row in reversed(rows)}
    return {
        "counts": [
            {"stage": stage, "code": code, "count": count, "example": example[stage, code]}
            for (stage, code), count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
        ],
        "rows": [{**row, "picture": thumbnail(str(row["id"]))} for row in rows[:at_most]],
        "hidden": max(0, len(rows) - at_most),
    }
