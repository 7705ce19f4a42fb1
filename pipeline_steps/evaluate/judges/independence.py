"""Reject judges whose model family was also used for captioning, retrieval or conditioning; their scores would be circular."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pipeline_steps.core.errors import ConfigError


def families_in(description: Any) -> set[str]:
    """Values of the keys `family` (a string) and `families` (a list) anywhere in a nested `meta.json`."""
    found: set[str] = set()
    if isinstance(description, Mapping):
        for key, value in description.items():
            if key == "family" and isinstance(value, str):
                found.add(value)
            elif key == "families" and isinstance(value, Iterable) and not isinstance(value, (str, Mapping)):
                found.update(str(name) for name in value)
            else:
                found |= families_in(value)
    elif isinstance(description, (list, tuple)):
        for value in description:
            found |= families_in(value)
    return found


def overlapping_families(judges: Mapping[str, str], used: Mapping[str, set[str]]) -> list[str]:
    """One sentence for each judge whose family is also used elsewhere, sorted.

    Args:
        judges: judge name -> family.
        used: part of the pipeline -> families used there.
    """
    return sorted(
        f"judge {judge} has model family {family}, which is also used in {part}"
        for judge, family in judges.items()
        for part, families in used.items()
        if family in families
    )


VISION_LANGUAGE = frozenset({"clip", "dinov2", "siglip"})
"""Families of the vision encoders of vision-language models."""


def undeclared_family_warnings(judges: Mapping[str, str], captions_meta: Mapping[str, Any]) -> list[str]:
    """Warnings about judges whose family may be that of the captioner's vision tower.

    A captioner on a server cannot name the vision tower of its model: its `families_complete` is false unless its
    configuration names the families. Then a judge that vision-language models contain can be neither accepted nor rejected.

    Args:
        judges: judge name -> family.
        captions_meta: `meta.json` of the captions.
    """
    if captions_meta.get("families_complete", True):
        return []
    captioner = captions_meta["captioner"]
    return [
        f"judge {judge} has model family {family}, and the vision tower of captioner {captioner} is not declared: "
        f"set caption.{captioner}.vision_families"
        for judge, family in sorted(judges.items())
        if family in VISION_LANGUAGE
    ]


def check_judge_independence(judges: Mapping[str, str], used: Mapping[str, set[str]], allow: bool) -> list[str]:
    """Sentences of `overlapping_families`, or an error if there are any and `allow` is false.

    Raises:
        ConfigError: a judge shares a family with a part of the pipeline that made the data or the model.
    """
    shared = overlapping_families(judges, used)
    if shared and not allow:
        raise ConfigError(
            "evaluate.image_judges/audio_judge: " + "; ".join(shared),
            "choose a judge of another family, or set evaluate.allow_shared_family: true to flag its numbers",
        )
    return shared
