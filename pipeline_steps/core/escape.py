"""Untrusted text (phrases, license strings, authors) inside Markdown and CSV."""

from __future__ import annotations

import re

_SPECIAL = re.compile(r"([\\`*_{}\[\]()<>#!|~$&])")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\u0085\u2028\u2029]+")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def markdown(text: object) -> str:
    """One line of Markdown that shows `text` literally: no link, picture, HTML or table cell can be started by it."""
    flat = _CONTROL.sub(" ", str(text))
    return _SPECIAL.sub(lambda match: "&amp;" if match.group() == "&" else f"\\{match.group()}", flat).replace(
        "://", ":\u200b//"
    )


def cell(text: object) -> str:
    """A CSV cell that no spreadsheet runs: `'` before a leading = + - @ tab or line break (OWASP ASVS 1.2.10)."""
    value = "" if text is None else str(text)
    return f"'{value}" if value.startswith(_FORMULA) else value
