"""Clean image names: emoji metadata and openclipart file names to short English phrases."""

import csv
import re
from collections.abc import Iterable, Set
from pathlib import PurePosixPath
from typing import Any

from backbone.config import HERE

VOCABULARY = HERE / "vocabulary"

SKIPPED_EMOJI_CATEGORIES = frozenset({"Flags", "Symbols", "Component"})

# Folders of openclipart that are used, and the noun that each contributes to the caption.
OPENCLIPART_FOLDERS = {
    "animals": "animal",
    "animals/amphibian": "frog",
    "animals/birds": "bird",
    "animals/birds/penguin": "penguin",
    "animals/bugs": "bug",
    "animals/dinosaurs": "dinosaur",
    "animals/fantasy": "dragon",
    "animals/fish": "fish",
    "animals/mammals": "animal",
    "animals/mammals/bears": "bear",
    "animals/mammals/big_cats": "wild cat",
    "animals/mammals/dogs": "dog",
    "animals/mammals/horses": "horse",
    "animals/mammals/housecats": "cat",
    "buildings": "building",
    "buildings/furniture": "furniture",
    "buildings/homes": "house",
    "computer/hardware": "computer",
    "containers": "container",
    "education/books": "book",
    "electronics": "electronics",
    "electronics/bulb": "light bulb",
    "food/beverages": "drink",
    "food/beverages/alcohol": "bottle",
    "geography": "landscape",
    "office": "office",
    "office/telephone": "telephone",
    "people": "person",
    "people/bodypart": "body part",
    "people/smilies": "smiling face",
    "people/stickmen": "person",
    "plants": "plant",
    "plants/trees": "tree",
    "plants/trees/evergreen": "evergreen tree",
    "recreation": "recreation",
    "recreation/holiday": "holiday",
    "recreation/holiday/christmas": "christmas",
    "recreation/holiday/thanksgiving": "turkey",
    "recreation/music": "musical instrument",
    "recreation/party": "party",
    "recreation/sports": "sport",
    "recreation/toys": "toy",
    "science": "science",
    "signs_and_symbols/clocks": "clock",
    "signs_and_symbols/weather": "weather",
    "tools": "tool",
    "tools/weapons": "weapon",
    "transportation": "vehicle",
    "transportation/boating": "boat",
    "transportation/vehicles": "vehicle",
    "transportation/vehicles/hummers": "car",
    "unsorted": "",
}

# Diagrams and abstract signs inside the folders above.
OPENCLIPART_SKIPPED = re.compile(
    r"aiga|blueprint|boating_rules|sailing_(capsize|close|heel|jibe|points|reach|running|tack)|knot_|bullet_hole|smiley1?\d"
    r"|pantyhose|gender|tatoo|_pattern|connector|blueman|sm_0|head\d|note_theory|natural|stripper|sexy|nude|penis|flag|stickyman"
    r"|lane|_ahead|no_|one_?way|turn_|parking|sign|logo|symbol_01|map|icon|button"
)


def _lines(file: str) -> frozenset[str]:
    return frozenset((VOCABULARY / file).read_text(encoding="utf-8").split("\n")) - {""}


def _translations() -> dict[str, str]:
    with (VOCABULARY / "translations.csv").open(encoding="utf-8", newline="") as stream:
        return {row["word"]: row["english"] for row in csv.DictReader(stream)}


# Names that say nothing about the image; such images are not used for training.
GENERIC_NAMES = _lines("generic_names.txt")
# Names that are near a sounding thing by their words only.
MISLEADING_NAMES = _lines("misleading_names.txt")
# Words of openclipart file names in other languages or abbreviated, and their English.
TRANSLATIONS = _translations()
# English words of file names that neither emoji names nor sounding_things.csv contain.
EXTRA_WORDS = _lines("words.txt")

_NUMBERED = re.compile(r"(?<=[a-z])\d+$")


def emoji_names(entry: dict[str, Any]) -> list[str]:
    """Return the distinct names of an emoji from emoji.json, plainest first."""
    name = re.sub(r"[^a-z0-9' -]+", " ", (entry.get("name") or "").lower()).strip()
    names = [re.sub(r"[_-]+", " ", word).strip() for word in entry["short_names"]]
    names = [
        re.sub(r"^(man|woman) (.+)$", r"\2", n) if n.startswith(("man ", "woman ")) and len(n.split()) > 2 else n for n in names
    ]
    return list(dict.fromkeys(n for n in [*names, name] if re.search("[a-z]{2}", n)))


def openclipart_folder(path: PurePosixPath) -> str | None:
    """Return the noun of an openclipart file's folder, or None when the file is not used."""
    noun = OPENCLIPART_FOLDERS.get(str(path.parent))
    return None if noun is None or OPENCLIPART_SKIPPED.search(path.stem.lower()) else noun


def openclipart_name(path: PurePosixPath, vocabulary: Set[str]) -> str | None:
    """Return the English phrase of an openclipart file name.

    Words outside the vocabulary are dropped: they are author names, abbreviations or other languages.
    The folder's noun is appended when the remaining words do not contain it.

    Args:
        path: path relative to the root of the collection.
        vocabulary: accepted words, in lower case.

    Returns:
        The phrase, or None when no word is left and the folder has no noun.
    """
    noun = openclipart_folder(path)
    if noun is None:
        return None
    words: list[str] = []
    for raw in re.split(r"[^a-z0-9]+", path.stem.lower()):
        word = raw if raw in TRANSLATIONS else _NUMBERED.sub("", raw)
        for part in TRANSLATIONS.get(word, word if word in vocabulary or word in EXTRA_WORDS else "").split():
            if part not in words and not part.isdigit() and len(part) > 1:
                words.append(part)
    phrase = " ".join(words)
    if noun and noun not in phrase:
        phrase = f"{phrase}, {noun}" if phrase else noun
    return phrase or None


def is_usable(name: str) -> bool:
    """Return whether a name describes its image well enough to train on."""
    parts = [part.strip() for part in name.split(",")]
    colours = {
        "black",
        "white",
        "red",
        "blue",
        "green",
        "yellow",
        "brown",
        "orange",
        "pink",
        "purple",
        "grey",
        "gold",
        "silver",
    }
    words = set(parts[0].split()) - colours - {"big", "small", "old", "large", "one", "double", "cartoon"}
    return parts[0] not in GENERIC_NAMES and parts[0] not in MISLEADING_NAMES and bool(words)


def vocabulary(phrases: Iterable[str]) -> set[str]:
    """Return the words of phrases, without author-like or meaningless short words."""
    words = {word for phrase in phrases for word in re.findall("[a-z]+", phrase.lower()) if len(word) > 2}
    return words - {
        "architect",
        "the",
        "and",
        "with",
        "for",
        "from",
        "mark",
        "frank",
        "joe",
        "mike",
        "peter",
        "benji",
        "park",
        "dan",
    }
