"""Headline metrics: the few numbers of `reports/metrics.json` that DVC and MLflow compare. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline_steps.core.statistics import CHANCE, is_above_chance
from pipeline_steps.evaluate.metrics.set_metrics import LOOKUP_ROWS

Row = Mapping[str, Any]

SETS = ("test", "gold")
"""Sets whose numbers are headline metrics: pairs of the test split, and true pairs."""


def headline_metrics(evaluation: Row, judge: str, audio_judge: str, num_pairs: int, num_images: int) -> dict[str, Any]:
    """Content of `reports/metrics.json`: a number per name, with its 95 % interval as NAME_low and NAME_high.

    A metric without a value is left out. Nothing in it depends on the machine or on the time.

    Args:
        evaluation: content of `evaluation.json`.
        judge: image judge of the headline.
        audio_judge: of the audio-image agreement.
        num_pairs: images with a sound.
        num_images: images of the pool, without those held out.
    """
    found: dict[str, Any] = {}
    win, ais, kid = f"win_rate_{judge}", f"ais_win_rate_{audio_judge}_{judge}", f"kid_{judge}"
    for name in SETS:
        if name not in evaluation:
            continue
        rows = evaluation[name]["rows"]
        model, lookup = rows["model"], rows.get(LOOKUP_ROWS[1], {})
        numbers = _with_interval("win_rate", model.get(win, {})) | _with_interval("kid", model.get(kid, {}))
        if name == "test":
            numbers |= _with_interval("ais_win_rate", model.get(ais, {}))
            numbers |= _with_interval("gain_over_lookup", lookup.get(win, {}))
        found[name] = numbers | {"clips": evaluation[name]["n_sounds"]}
    if "retrieval" in evaluation:
        found["retrieval"] = _with_interval("recall_at_10", evaluation["retrieval"]["rows"]["pipeline"]["recall_at_10"])
    return found | {"pairs": {"count": num_pairs, "coverage": round(num_pairs / num_images, 6) if num_images else 0.0}}


def chance_warnings(metrics: Row) -> list[str]:
    """One line for each set on which the model's win rate is not above chance: its interval does not lie above 0.5.

    A model without any win rate, because there are too few pairs, gets one line as well.
    """
    if not any("win_rate" in metrics.get(name, {}) for name in SETS):
        return ["no win rate was measured, so nothing shows that the model uses the audio"]
    lines = []
    for name in SETS:
        value, low, high = (metrics.get(name, {}).get(f"win_rate{suffix}") for suffix in ("", "_low", "_high"))
        if value is not None and not is_above_chance(low):
            interval = "without interval" if low is None else f"[{low:.2f}, {high:.2f}]"
            lines.append(f"{name}: the win rate {value:.2f} {interval} is not above chance ({CHANCE})")
    return lines


def _with_interval(name: str, entry: Row) -> dict[str, float]:
    values = {name: entry.get("value"), f"{name}_low": entry.get("low"), f"{name}_high": entry.get("high")}
    return {key: value for key, value in values.items() if value is not None} if entry.get("value") is not None else {}
