"""Render the report as one HTML page that works from disk: no script, no network, every text escaped."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline_steps.core.escape import escape_display
from pipeline_steps.evaluate.report.charts import number_text


def environment() -> Environment:
    """Jinja environment that escapes every value and rejects undefined names."""
    loader = PackageLoader("pipeline_steps.evaluate.report", "templates")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters["shown"] = escape_display
    made.filters["number"] = lambda value: "\u2013" if value is None else number_text(float(value))
    made.filters["interval"] = interval_text
    made.filters["basename"] = lambda path: " + ".join(name.rpartition("/")[2] for name in path.split(" + "))
    return made


def render_page(context: Mapping[str, Any]) -> str:
    """HTML of the page. The style sheet is inline and allowed by its hash; media load from the folder of the page only."""
    made = environment()
    assert made.loader is not None
    style = made.loader.get_source(made, "style.css")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode("utf-8")).digest()).decode("ascii")
    # `file:` is listed because browsers differ in what 'self' means for a page opened from disk.
    policy = (
        f"default-src 'none'; img-src 'self' file:; media-src 'self' file:; style-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return made.get_template("report.html").render(**context, policy=policy, style=Markup(style))  # noqa: S704


def interval_text(entry: Mapping[str, Any]) -> str:
    """Text of an entry of evaluation.json, e.g. "0.61 [0.55, 0.67]", rounded by the interval; a dash without a value."""
    if entry.get("value") is None:
        return "\u2013"
    value = float(entry["value"])
    if entry.get("low") is None or entry.get("high") is None:
        return number_text(value)
    low, high = float(entry["low"]), float(entry["high"])
    digits = 3 if high <= low else max(0, min(5, 1 - math.floor(math.log10(high - low))))
    text = f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
    return text.replace("-", "\u2212")
