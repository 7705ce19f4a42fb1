"""Untrusted text (phrases, license strings, file names, authors) in Markdown, CSV, HTML pages and on terminals."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

MAX_TEXT = 160
"""Characters of an untrusted text that a page shows."""

_MARKDOWN = re.compile(r"[\\`*_{}\[\]()<>#!|~$&]")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f\u0085\u2028\u2029]+")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def clean_text(text: str, max_chars: int) -> str:
    """Normalize `text` to NFC with single spaces, without characters of category C, in at most `max_chars` characters.

    Category C has control, format (bidirectional), surrogate and unassigned characters. Leading `=`, `+`, `-` and `@` are
    removed, because spreadsheets interpret them as formulas.
    """
    normal = unicodedata.normalize("NFC", " ".join(text[: 16 * max_chars].split()))
    kept = "".join(character for character in normal if unicodedata.category(character)[0] != "C")
    return " ".join(kept.split()).lstrip("=+-@ ")[:max_chars].strip()


def escape_markdown(text: object) -> str:
    """One line of Markdown that shows `text` literally: it cannot start a link, an image, HTML or a table cell."""
    flat = _CONTROL.sub(" ", str(text))
    escaped = _MARKDOWN.sub(lambda match: _ENTITIES.get(match.group(), f"\\{match.group()}"), flat)
    return escaped.replace("://", ":\u200b//")


def escape_csv(value: Any) -> Any:
    """CSV cell that a spreadsheet does not run: text with a leading = + - @ tab or line break gets a `'` (OWASP ASVS 1.2.10).

    None becomes an empty text; numbers stay numbers.
    """
    if isinstance(value, str) and value.startswith(_FORMULA):
        return f"'{value}"
    return "" if value is None else value


def escape_terminal(text: str) -> str:
    """`text` with control characters (e.g. terminal sequences in file names) and bidirectional controls as escapes."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else character.encode("unicode_escape").decode("ascii")
        for character in text.encode("utf-8", "backslashreplace").decode("utf-8")
    )


def escape_display(text: object, limit: int = MAX_TEXT) -> str:
    """`text` for an HTML page: control and bidirectional characters as escapes, cut to `limit`.

    The template escapes HTML. This function escapes what HTML escaping keeps, e.g. U+202E, which reverses the rest of a line.
    """
    raw = "" if text is None else str(text)
    clean = "".join(f"\\u{ord(char):04x}" if unicodedata.category(char).startswith("C") else char for char in raw)
    return clean if len(clean) <= limit else clean[: limit - 1] + "\u2026"
