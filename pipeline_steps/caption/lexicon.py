"""Sound lexicon of captioners `tagger` and `text`, label prior and synonyms: package data, parsed and validated."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from pipeline_steps.core.errors import DataError

COLUMNS = ("vocabulary", "index", "label", "sound", "source", "visible", "salience", "audibility")
IMAGENET = "imagenet"
COCO = "coco"
REBUILD_PRIOR = "rebuild it: python scripts/make_label_prior.py"


@dataclass(frozen=True, slots=True)
class LexiconEntry:
    """Sound event of a label.

    Attributes:
        phrase: short acoustic phrase, e.g. "dog barking".
        sound_source: object that makes the sound.
        visible: whether the labelled object itself makes the sound; otherwise the scene around it does.
        salience: 0..1, prominence among the sounds of the label.
        audibility: 0..1, probability that the sound is audible when the label is correct.
    """

    phrase: str
    sound_source: str
    visible: bool
    salience: float
    audibility: float


Lexicon = Mapping[tuple[str, int], Sequence[LexiconEntry]]
"""(vocabulary, label index) -> entries; an empty sequence marks a silent label."""


def load_lexicon() -> Lexicon:
    """Load the lexicon of the package."""
    return parse_lexicon(_package_text("lexicon.csv"))


def load_label_prior() -> dict[int, float]:
    """Load the label prior of the package."""
    return parse_label_prior(_package_text("label_prior.csv"))


def load_synonyms() -> dict[str, str]:
    """Terms of captioner `text` that neither labels nor phrases contain -> term with the same sounds."""
    return {row["term"]: row["means"] for row in csv.DictReader(io.StringIO(_package_text("synonyms.csv")))}


def _package_text(name: str) -> str:
    return resources.files("pipeline_steps.caption").joinpath(name).read_text(encoding="utf-8")


def parse_lexicon(text: str, name: str = "lexicon.csv") -> Lexicon:
    """Parse the CSV text of a lexicon; a silent label has one row with an empty sound.

    Args:
        text: CSV text with the columns `COLUMNS`.
        name: file name for error messages.

    Raises:
        DataError: columns differ, or a row is malformed, out of range, duplicated, or contradicts a silent row.
    """
    reader = csv.DictReader(io.StringIO(text))
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise DataError(f"{name}: columns are {reader.fieldnames}; expected {list(COLUMNS)}")
    lexicon: dict[tuple[str, int], list[LexiconEntry]] = {}
    silent: set[tuple[str, int]] = set()
    for number, row in enumerate(reader, start=2):
        try:
            key = (row["vocabulary"], int(row["index"]))
            if key[0] not in (IMAGENET, COCO):
                raise ValueError(f"unknown vocabulary {key[0]!r}")
            entries = lexicon.setdefault(key, [])
            if not row["sound"]:
                if entries or key in silent:
                    raise ValueError(f"{row['label']!r} is listed again as silent")
                silent.add(key)
                continue
            entry = LexiconEntry(
                row["sound"],
                row["source"],
                _parse_bool(row["visible"]),
                _parse_fraction(row["salience"]),
                _parse_fraction(row["audibility"]),
            )
            if key in silent or any(entry.phrase == other.phrase for other in entries):
                raise ValueError(f"{row['label']!r} lists {entry.phrase!r} twice or is silent")
            entries.append(entry)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{name}, line {number}: {error}", "correct this line") from error
    return {key: tuple(entries) for key, entries in lexicon.items()}


def parse_label_prior(text: str, name: str = "label_prior.csv") -> dict[int, float]:
    """Parse the CSV text of a label prior: mean probability of each ImageNet index over many images.

    Args:
        text: CSV text with the columns index, label and prior.
        name: file name for error messages.

    Raises:
        DataError: a row is malformed or out of range, or the sum is above 1.
    """
    prior: dict[int, float] = {}
    for number, row in enumerate(csv.DictReader(io.StringIO(text)), start=2):
        try:
            prior[int(row["index"])] = _parse_fraction(row["prior"])
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{name}, line {number}: {error}", REBUILD_PRIOR) from error
    if sum(prior.values()) > 1.0 + 1e-3:
        raise DataError(f"{name}: priors sum to {sum(prior.values()):.3f}; expected at most 1", REBUILD_PRIOR)
    return prior


def _parse_bool(value: str) -> bool:
    if value not in ("true", "false"):
        raise ValueError(f"visible is {value!r}, expected true or false")
    return value == "true"


def _parse_fraction(value: str) -> float:
    number = float(value)
    if not 0.0 < number <= 1.0:
        raise ValueError(f"{value} is not within (0, 1]")
    return number
