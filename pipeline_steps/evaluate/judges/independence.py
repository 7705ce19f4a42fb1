"""No judge from a family that captioned, retrieved or conditioned: such a score would praise its own taste."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pipeline_steps.core.errors import ConfigError


def families_in(description: Any) -> set[str]:
    """Every value of a key `family` (a text) or `families` (a list) anywhere in a nested description (a `meta.json`)."""
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


def overlapping_families(judges: Mapping[str, str], took_part: Mapping[str, set[str]]) -> list[str]:
    """Sentences naming each judge whose family also took part somewhere, sorted.

    Args:
        judges: judge name -> family.
        took_part: stage name -> families used there.
    """
    return sorted(
        f"judge {judge} is of family {family}, which also took part in {stage}"
        for judge, family in judges.items()
        for stage, families in took_part.items()
        if family in families
    )


VISION_LANGUAGE = frozenset({"clip", "dinov2"})
"""Families that vision-language models look with."""


def undeclared_family_warnings(judges: Mapping[str, str], captioner: Mapping[str, Any]) -> list[str]:
    """Sentences about judges that may be of the captioner's family without anybody having said so.

    A captioner on a server cannot name the vision tower of its model: its `families_complete` is false unless its
    configuration names the families. Then a judge that vision-language models contain can be neither accepted nor rejected.
    """
    if captioner.get("families_complete", True):
        return []
    return [
        f"judge {judge} is of family {family}, and the vision tower of captioner {captioner['captioner']} is not declared: "
        f"set caption.{captioner['captioner']}.vision_families"
        for judge, family in sorted(judges.items())
        if family in VISION_LANGUAGE
    ]


def check_judge_independence(judges: Mapping[str, str], took_part: Mapping[str, set[str]], allow: bool) -> list[str]:
    """`shared_families`, or an error if there are any and `allow` is false.

    Raises:
        ConfigError: a judge shares a family with a stage that made the data or the model.
    """
    shared = overlapping_families(judges, took_part)
    if shared and not allow:
        raise ConfigError(
            "evaluate.picture_judges/sound_judge: " + "; ".join(shared),
            "choose a judge of another family, or set evaluate.allow_shared_family: true to have its numbers flagged",
        )
    return shared
