"""Examples of docs/extending.md equal the modules that the tests run, and its table equals the registries."""

import re
from pathlib import Path

from pipeline_steps.caption.captioners.base import CAPTIONERS
from pipeline_steps.evaluate.judges.base import IMAGE_JUDGES
from pipeline_steps.models.text_audio.base import TEXT_AUDIO_ENCODERS
from pipeline_steps.retrieve.index.base import INDEXES
from pipeline_steps.train.recipes import RECIPES

PROJECT = Path(__file__).resolve().parents[2]
PAGE = (PROJECT / "docs/extending.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"<!-- file: (\S+) -->\n```python\n(.*?)```\n", re.DOTALL)


def test_every_python_block_equals_its_file() -> None:
    blocks = BLOCK.findall(PAGE)
    assert len(blocks) == PAGE.count("```python") == 4
    for path, code in blocks:
        assert code == (PROJECT / path).read_text(encoding="utf-8"), path


def test_registries_are_documented_with_folder_and_entry_point_group() -> None:
    for registry in (CAPTIONERS, TEXT_AUDIO_ENCODERS, IMAGE_JUDGES, INDEXES, RECIPES):
        assert f"`{registry.entry_point_group}`" in PAGE
        assert f"`{registry.package.replace('.', '/')}/`" in PAGE


def test_prose_has_at_most_200_lines() -> None:
    assert len(BLOCK.sub("", PAGE).splitlines()) <= 200
