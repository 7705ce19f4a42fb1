"""Report page: texts are escaped, and nothing loads from another origin."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import StrictUndefined, UndefinedError

from pipeline_steps.core.escape import escape_display
from pipeline_steps.evaluate.report.charts import curves_with_intervals, interval_chart, line_chart, nice_ticks, number_text
from pipeline_steps.evaluate.report.page import environment, interval_text, render_page

HOSTILE = [
    "<script>alert(1)</script>",
    '"><svg onload=alert(1)>',
    "javascript:alert(1)",
    "{{7*7}}",
    "{% raw %}",
    "\u202egpj.exe",
    "</style><img src=x onerror=alert(1)>",
    "a\x00b\x1b[31m",
]


def context(text: str = "a dog") -> dict[str, Any]:
    """Context of a page whose untrusted values are all `text`."""
    sound = {"audio": "audio/x.mp3", "spectrogram": "samples/x.png"}
    event = {"phrase": text, "sound_source": text, "confidence": 0.5, "chosen": True}
    hit = {"audio": "audio/x.mp3", "score": 0.1, "z_score": 2.0, "corrected_score": 0.2, "label": text, "chosen": True}
    pair = {
        "image_id": "abc", "image_file": text, "audio_file": text, "picture": "samples/p.jpg", "sound": sound, "phrase": text,
        "score": 0.1, "z_score": 3.0, "split": "test",
        "why": "all pairs", "events": [event], "top": [hit], "chosen_in_top": True, "truth": text, "image_license": text,
        "image_author": text, "audio_license": text, "audio_author": text,
    }  # fmt: skip
    sample = {
        "label": text, "image_file": text, "audio_file": text, "seen": True, "sound": sound,
        "picture": "samples/p.jpg", "real": "samples/d.png",
        "shuffled": "samples/e.png", "shuffled_label": text,
        "rates": [{"metric": "win_rate_x", "name": "win rate", "value": 0.7}],
    }  # fmt: skip
    reasons = {
        "counts": [{"stage": "pair", "code": text, "count": 1, "example": text}],
        "rows": [{"item": text, "stage": "pair", "code": text, "reason": text, "picture": None}],
        "hidden": 0,
    }
    entry = {"value": 0.6, "low": 0.5, "high": 0.7, "n": 4}
    curve = [{"at": at, **entry} for at in (-6.0, 0.0, 6.0)]
    sweep = {
        "name": "sweep", "control": False, "strip": "samples/d.png", "width": 100, "height": 32, "audio": ["audio/x.mp3"],
    }  # fmt: skip
    ability = {
        "title": "Loudness", "verdict": "flat", "text": "Not found.", "score": "area", "range": "gain, dB: -6 to 6",
        "chart": curves_with_intervals({"sweep": curve, "control": curve}, "gain"),
        "items": [{"caption": text, "sweeps": [sweep, {**sweep, "control": True}]}],
    }  # fmt: skip
    step = {"name": "in the pool", "n_in": 3, "n_out": 2, "removed": (("abstained", text, 1),)}
    return {
        "meta": {"samples": 4, "first_samples": 12, "num_bootstrap": 2000, "side": 64, "strip_width": 262, "reads_text": True},
        "findings": [text],
        "headline": [{"title": "t", "value": "0.6", "interval": "", "text": "s", "limit": "l", "tone": "good"}],
        "warnings": [text],
        "pairs_rule": "all",
        "pairs": [{"title": "All", "cards": [pair]}],
        "samples": [{"key": "test", "title": "Test", "shown": 1, "total": 1, "cards": [sample]}],
        "charts": [{"title": "win", "chart": interval_chart([("model", entry, "model")], 0.5)}],
        "tables": [],
        "memorisation": {"tables": [], "training_images": 0, "compared_images": 0},
        "retrieval": None,
        "sensitivity": None,
        "abilities": [ability],
        "training": {"charts": [{"title": "loss", "chart": line_chart({text: [(1, 2.0), (2, 1.0)]}, "steps")}], "grids": []},
        "flows": {"images": [step], "audio": [step]},
        "facts": [{"name": "licenses", "text": text}],
        "abstained": reasons,
        "quarantined": {"counts": [], "rows": [], "hidden": 0},
        "judge": "ssd",
        "ais_r2": 0.01,
        "protocol": {
            "audio_judge": "aisfx", "density_k": 5, "num_bootstrap": 10, "seed": 0, "samples_per_audio": 4,
            "num_inference_steps": 25, "guidance_scale": 3.0, "sample_rate_hz": 16000, "side_px": 64, "image_judges": ["ssd"],
            "families_that_took_part": ["yamnet"], "shared_families": [], "model_index_sha256": "0" * 64,
        },
    }  # fmt: skip


class Elements(HTMLParser):
    """Every element and attribute of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_autoescape_is_on_and_undefined_names_are_errors() -> None:
    made = environment()
    assert made.autoescape is True
    assert made.undefined is StrictUndefined
    with pytest.raises(UndefinedError):
        render_page({})


@pytest.mark.parametrize("text", HOSTILE)
def test_markup_in_text_is_escaped(text: str) -> None:
    clean, attacked = Elements(render_page(context())), Elements(render_page(context(text)))
    assert attacked.tags == clean.tags
    assert [(tag, name) for tag, name, _ in attacked.attributes] == [(tag, name) for tag, name, _ in clean.attributes]
    assert not [name for _, name, _ in attacked.attributes if name.startswith("on")]
    assert "script" not in attacked.tags
    assert any(escape_display(text) in part for part in attacked.text)
    assert "\u202e" not in "".join(attacked.text)
    assert "\x00" not in "".join(attacked.text)


@settings(deadline=None, max_examples=15)
@given(st.text(min_size=1, max_size=60))
def test_text_does_not_change_the_structure_of_the_page(text: str) -> None:
    assert Elements(render_page(context(text))).tags == Elements(render_page(context())).tags


def test_nothing_loads_from_another_origin() -> None:
    page = render_page(context())
    parsed = Elements(page)
    policy = next(
        value for tag, name, value in parsed.attributes if tag == "meta" and name == "content" and value and "default" in value
    )
    assert policy.startswith("default-src 'none'")
    style = re.search(r"<style>(.*)</style>", page, re.S)
    assert style
    digest = base64.b64encode(hashlib.sha256(style.group(1).encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    links = [value or "" for _, name, value in parsed.attributes if name in {"src", "href"}]
    assert links
    assert all(re.fullmatch(r"(samples|audio)/[a-z0-9.-]+|#[a-z-]+", link) for link in links)
    assert "style" not in {name for _, name, _ in parsed.attributes}
    assert not re.search(r"url\(|@import|https?:", style.group(1))


def test_display_text_is_truncated_and_has_no_control_characters() -> None:
    assert escape_display("\u202eabc") == "\\u202eabc"
    assert escape_display(None) == ""
    assert len(escape_display("x" * 1000)) == 160


def test_text_of_numbers() -> None:
    assert [number_text(value) for value in (0, 0.5, -0.25, 12.34, 123.4, 12345.0, 0.00012)] == [
        "0", "0.5", "\u22120.25", "12.3", "123", "12,345", "0.00012",
    ]  # fmt: skip
    assert interval_text({"value": 0.6, "low": 0.5, "high": 0.7}) == "0.60 [0.50, 0.70]"
    assert interval_text({"value": None}) == "\u2013"


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_span_the_values(low: float, width: float) -> None:
    high = low + width
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 13
    step = ticks[1] - ticks[0]
    slack = step * 1e-6 + 8 * math.ulp(max(abs(low), abs(high)))  # resolution of floats of this size
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack


def test_charts_place_values_in_order_inside_the_box() -> None:
    rows = [
        ("a", {"value": 0.7, "low": 0.6, "high": 0.8}, "model"),
        ("b", {"value": 0.5}, "control"),
        ("c", {"value": None}, "x"),
    ]
    chart = interval_chart(rows, reference=0.5)
    assert chart is not None
    assert [row.label for row in chart.rows] == ["a", "b"]
    assert chart.reference == chart.rows[1].at < chart.rows[0].low < chart.rows[0].at < chart.rows[0].high < 400
    assert interval_chart([("c", {"value": None}, "x")]) is None
    far = interval_chart([("d", {"value": 1.15, "low": -0.2, "high": 1.3}, "control")], bounds=(0.0, 1.0))
    assert far is not None
    assert 14 <= far.rows[0].low < far.rows[0].at < far.rows[0].high < 400, "bounds do not hide what lies beyond them"
    assert line_chart({"loss": [(1, 1.0)]}, "steps") is None
    points = [{"at": at, "value": at / 10, "low": at / 10 - 0.1, "high": None} for at in (-6.0, 0.0, 6.0)]
    curves = curves_with_intervals({"sweep": points, "empty": [{"at": 0.0, "value": None}]}, "gain")
    assert curves is not None
    corners = [tuple(map(float, corner.split(","))) for corner in curves.bands[0].points.split()]
    middle = [tuple(map(float, corner.split(","))) for corner in curves.lines[0].points.split()]
    assert corners[:3] == middle  # without an upper end the band ends at the curve
    assert [x for x, _ in corners] == [56.0, 220.0, 384.0, 384.0, 220.0, 56.0]
    assert all(below > y for (_, below), (_, y) in zip(corners[3:], middle[::-1], strict=True))
    assert curves_with_intervals({"sweep": []}, "gain") is None
    curve = line_chart({"loss": [(0, 3.0), (10, 1.0)]}, "steps")
    assert curve is not None
    (x0, y0), (x1, y1) = (tuple(map(float, point.split(","))) for point in curve.lines[0].points.split())
    assert x0 < x1
    assert y0 < y1  # a falling curve goes down on the screen
