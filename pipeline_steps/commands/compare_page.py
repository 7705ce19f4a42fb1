"""Comparison of two models as one HTML file with embedded images and audio, without scripts or external resources."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline_steps.core.escape import escape_display
from pipeline_steps.evaluate.report.charts import number_text
from pipeline_steps.tracking.registry.evaluation_results import MetricComparison
from pipeline_steps.tracking.registry.model_comparison import ModelComparison

BAR_WIDTH = 150.0
TITLES = {"test": "Test pairs", "gold": "Gold pairs", "gold_seen_classes": "Gold pairs whose class occurs in training"}


def render(comparison: ModelComparison) -> str:
    """Render the page. The template escapes texts; the content policy allows the style sheet by its hash."""
    loader = PackageLoader("pipeline_steps.commands", "templates")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters |= {"shown": escape_display, "number": lambda value: number_text(float(value)), "embed": embed}
    style = loader.get_source(made, "compare.css")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode("utf-8")).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; img-src data:; media-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    groups: dict[str, list[dict[str, Any]]] = {}
    for metric in comparison.metrics:
        groups.setdefault(metric.metric.split("/")[0], []).append({"found": metric, "bar": bar(metric)})
    samples: dict[str, list[Any]] = {}
    for row in comparison.samples:
        samples.setdefault(row.set, []).append(row)
    return made.get_template("compare.html").render(
        policy=policy,
        style=Markup(style),  # noqa: S704 - our own file
        c=comparison,
        groups=groups,
        samples=samples,
        titles=TITLES,
        width=BAR_WIDTH,
    )


def embed(payload: bytes, kind: str) -> str:
    """File bytes as a data URL."""
    return f"data:{kind};base64,{base64.b64encode(payload).decode('ascii')}"


def bar(metric: MetricComparison) -> dict[str, float] | None:
    """The gain's interval as positions in px on an axis with zero in the middle; right is better. None without interval."""
    interval = metric.gain_interval
    if interval is None:
        return None
    reach = max(abs(edge) for edge in (*interval, metric.gain)) * 1.08 or 1.0

    def place(value: float) -> float:
        return round(BAR_WIDTH / 2 * (1 + value / reach), 1)

    return {"low": place(interval[0]), "high": place(interval[1]), "at": place(metric.gain)}
