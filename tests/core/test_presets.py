"""Presets are overlays: values, comments, order, extension, errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline_steps.core.config import load_params
from pipeline_steps.core.errors import ConfigError
from pipeline_steps.core.presets import changed_values, load_overlay, preset_names, render_params, validate_params
from pipeline_steps.core.project_paths import PACKAGED

PARAMS = """# parameters
retrieve:
  k: 50      # neighbors per text
  seed: 0
pair:
  seed: 0    # of ties
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "params.yaml").write_text(PARAMS)
    folder = tmp_path / "presets"
    folder.mkdir()
    (folder / "large.yaml").write_text("retrieve:\n  k: 200\n")
    (folder / "larger.yaml").write_text("extends: large\nretrieve:\n  seed: 3\n")
    (folder / "lost.yaml").write_text("extends: larg\n")
    (folder / "round.yaml").write_text("extends: robin\n")
    (folder / "robin.yaml").write_text("extends: round\n")
    return tmp_path


def test_an_overlay_changes_its_values_and_keeps_comments(root: Path) -> None:
    text = render_params(PARAMS, load_overlay(root, "large"))
    assert text == PARAMS.replace("k: 50      #", "k: 200     #")


def test_a_preset_extends_another(root: Path) -> None:
    assert load_overlay(root, "larger") == {"retrieve": {"k": 200, "seed": 3}}


def test_an_overlay_without_change_keeps_every_byte(root: Path) -> None:
    text = PARAMS.replace("k: 50", "k:    200")
    assert render_params(text, load_overlay(root, "large")) == text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("larg", "there is no preset 'larg' -> did you mean large"),
        ("lost", r"presets/lost\.yaml: extends: there is no preset 'larg'"),
        ("round", "extends itself: round -> robin -> round"),
    ],
)
def test_a_preset_that_cannot_be_loaded(root: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_overlay(root, name)
    own = {"large", "larger", "lost", "robin", "round"}
    packaged = {path.stem for path in (PACKAGED / "presets").glob("*.yaml")}
    assert preset_names(root) == tuple(sorted(own | packaged))


def test_a_section_that_params_lack_is_an_error(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"section 'retriev' of the preset is not in params.yaml -> did you mean retrieve"):
        render_params(PARAMS, {"retriev": {"k": 1}})


def test_changes_are_listed_by_key(root: Path) -> None:
    old = load_params(root / "params.yaml")
    new = {"retrieve": {"k": 200, "seed": 0}, "pair": {"seed": 0, "max_reuse": 2}}
    assert changed_values(old, new) == ["retrieve.k: 50 -> 200", "pair.max_reuse: unset -> 2"]


def test_every_problem_is_named(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"retrieve\.kk is unknown; did you mean k\?; pair\.cap is unknown") as caught:
        validate_params({"retrieve": {"kk": 1}, "pair": {"cap": 2}, "elsewhere": {}}, "correct presets/large.yaml")
    assert caught.value.action == "correct presets/large.yaml"
