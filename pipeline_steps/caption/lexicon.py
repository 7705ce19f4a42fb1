"""The sound lexicon: a table from labels to the sounds one would hear, read and checked."""

from __future__ import annotations

import csv
import io

from pipeline_steps.caption.captioners.tagger import COCO, IMAGENET, Lexicon, LexiconEntry
from pipeline_steps.core.errors import DataError

COLUMNS = ("vocabulary", "index", "label", "sound", "source", "visible", "salience", "audibility")


def parse_lexicon(text: str, where: str = "lexicon.csv") -> Lexicon:
    """Parse the CSV text of the lexicon.

    A label that makes no sound has one row whose sound is empty.

    Raises:
        DataError: a column is missing, or a row is malformed, out of range, double, or silent and loud at once.
    """
    reader = csv.DictReader(io.StringIO(text))
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise DataError(f"{where}: columns are {reader.fieldnames}, expected {list(COLUMNS)}")
    entries: dict[tuple[str, int], list[LexiconEntry]] = {}
    silent: set[tuple[str, int]] = set()
    for number, row in enumerate(reader, start=2):
        try:
            key = (row["vocabulary"], int(row["index"]))
            if key[0] not in (IMAGENET, COCO):
                raise ValueError(f"unknown vocabulary {key[0]!r}")
            sounds = entries.setdefault(key, [])
            if not row["sound"]:
                if sounds or key in silent:
                    raise ValueError(f"{row['label']!r} is both silent and listed")
                silent.add(key)
                continue
            entry = LexiconEntry(
                row["sound"], row["source"], _truth(row["visible"]), _share(row["salience"]), _share(row["audibility"])
            )
            if key in silent or any(entry.sound == other.sound for other in sounds):
                raise ValueError(f"{row['label']!r} lists {entry.sound!r} twice or is silent")
            sounds.append(entry)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{where}, line {number}: {error}", "correct this line") from error
    return {key: tuple(sounds) for key, sounds in entries.items()}


def parse_label_prior(text: str, where: str = "label_prior.csv") -> dict[int, float]:
    """Parse the CSV text of the tagger's label prior: index, label, prior (mean probability over many pictures).

    Raises:
        DataError: a row is malformed or out of range, or the priors do not sum to at most 1.
    """
    prior: dict[int, float] = {}
    for number, row in enumerate(csv.DictReader(io.StringIO(text)), start=2):
        try:
            prior[int(row["index"])] = _share(row["prior"])
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{where}, line {number}: {error}", "make it again: python scripts/make_label_prior.py") from error
    if sum(prior.values()) > 1.0 + 1e-3:
        raise DataError(f"{where}: priors sum to {sum(prior.values()):.3f}", "make it again: python scripts/make_label_prior.py")
    return prior


def _truth(value: str) -> bool:
    if value not in ("true", "false"):
        raise ValueError(f"visible is {value!r}, expected true or false")
    return value == "true"


def _share(value: str) -> float:
    number = float(value)
    if not 0.0 < number <= 1.0:
        raise ValueError(f"{value} is not within (0, 1]")
    return number
