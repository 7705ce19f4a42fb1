"""Guides of docs/how-to/extend: they include the modules that the tests run, and the table equals the registries."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline_steps.caption.captioners.base import CAPTIONERS
from pipeline_steps.evaluate.judges.base import AUDIO_JUDGES, IMAGE_JUDGES
from pipeline_steps.models.text_audio.base import TEXT_AUDIO_ENCODERS
from pipeline_steps.retrieve.index.base import INDEXES
from pipeline_steps.train.recipes import RECIPES

PROJECT = Path(__file__).resolve().parents[2]
FOLDER = PROJECT / "docs/how-to/extend"
GUIDES = sorted(FOLDER.glob("add-*.md"))


def test_every_guide_includes_an_example_and_names_a_command_to_check_it() -> None:
    assert len(GUIDES) == 6
    for guide in GUIDES:
        text = guide.read_text(encoding="utf-8")
        included = re.findall(r"```\{literalinclude\} (\S+)", text)
        assert included, guide.name
        assert all((guide.parent / path).is_file() for path in included), guide.name
        commands = re.findall(r"^\$ pytest (.+)$", text.split("## Check your work")[1], re.MULTILINE)
        assert len(commands) == 1, guide.name
        assert all((PROJECT / path).exists() for path in commands[0].split()), guide.name


def test_registries_are_documented_with_folder_and_entry_point_group() -> None:
    page = (FOLDER / "index.md").read_text(encoding="utf-8")
    for registry in (CAPTIONERS, TEXT_AUDIO_ENCODERS, IMAGE_JUDGES, AUDIO_JUDGES, INDEXES, RECIPES):
        assert f"`{registry.entry_point_group}`" in page
        assert f"`{registry.package.replace('.', '/')}/`" in page
