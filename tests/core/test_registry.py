"""Registry: lookup by module name, by scan and by entry point; configuration groups of implementations."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from pipeline_steps.core import registry as registry_module
from pipeline_steps.core.config import StageConfig, parse_section
from pipeline_steps.core.errors import ConfigError
from pipeline_steps.core.registry import Registry

SHAPES: Registry[Any] = Registry("shape", "shapes_of_a_test")
MODULE = """
from tests.core.test_registry import SHAPES, GroupConfig
@SHAPES.register({name!r})
class Shape:
    config_class = GroupConfig
"""


class GroupConfig(StageConfig):
    """Group of a shape."""

    corners: int = 3


class SectionConfig(StageConfig):
    """Section that selects a shape."""

    registries: ClassVar = {"shape": SHAPES}

    shape: str = "triangle"
    size: float = 1.0


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with the module `triangle`, and `polygons` that registers `square`."""
    folder = tmp_path / "shapes_of_a_test"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "triangle.py").write_text(MODULE.format(name="triangle"))
    (folder / "polygons.py").write_text(MODULE.format(name="square"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(SHAPES, "_implementations", {})
    yield folder
    for name in [name for name in sys.modules if name.startswith("shapes_of_a_test")]:
        del sys.modules[name]


def test_a_name_imports_its_own_module_alone(shapes: Path) -> None:
    assert SHAPES.get("triangle").config_class is GroupConfig
    assert "shapes_of_a_test.polygons" not in sys.modules


def test_a_name_that_is_no_file_name_is_found_by_scan(shapes: Path) -> None:
    assert SHAPES.get("square").__module__ == "shapes_of_a_test.polygons"
    assert SHAPES.names() == ("square", "triangle")


def test_an_unknown_name_gets_a_suggestion(shapes: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown shape 'triangel. -> did you mean triangle\?"):
        SHAPES.get("triangel")
    assert "circle" not in SHAPES


def test_a_name_has_one_implementation(shapes: Path) -> None:
    SHAPES.get("triangle")
    with pytest.raises(ValueError, match="registered twice"):
        SHAPES.register("triangle")(GroupConfig)


def test_entry_point_is_loaded(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hexagons_of_a_test.py").write_text(MODULE.format(name="hexagon"))

    def points(group: str, name: str | None = None) -> list[EntryPoint]:
        found = [EntryPoint("hexagon", "hexagons_of_a_test", group), EntryPoint("broken", "no_such_module", group)]
        return [point for point in found if group == "seeing_sound.shape" and name in (None, point.name)]

    monkeypatch.setattr(registry_module, "entry_points", points)
    assert SHAPES.get("hexagon").__module__ == "hexagons_of_a_test"
    assert "hexagon" in SHAPES.names()
    with pytest.raises(ConfigError, match="'broken': entry point 'no_such_module' cannot be loaded"):
        SHAPES.get("broken")


def test_the_group_of_an_implementation_is_validated_with_its_own_model(shapes: Path) -> None:
    config = SectionConfig.from_params({"shape": "square", "square": {"corners": 4}})
    assert config.implementation_config("square") == GroupConfig(corners=4)
    assert SectionConfig.from_params({}).implementation_config("triangle") == GroupConfig()
    with pytest.raises(ConfigError, match=r"section\.square\.corner is unknown; did you mean corners\?"):
        parse_section(SectionConfig, "section", {"section": {"square": {"corner": 4}}})
    with pytest.raises(ConfigError, match=r"section\.circle is unknown"):
        parse_section(SectionConfig, "section", {"section": {"circle": {}}})
    with pytest.raises(ConfigError, match=r"unknown shape"):
        parse_section(SectionConfig, "section", {"section": {"shape": "circle"}})
    with pytest.raises(ValidationError):
        SectionConfig.from_params({"shape": 4})


def test_section_with_groups_can_be_pickled(shapes: Path) -> None:
    config = SectionConfig.from_params({"square": {"corners": 4}, "size": 2.0})
    copy = pickle.loads(pickle.dumps(config))
    assert copy.model_dump() == config.model_dump()
    assert copy.implementation_config("square").corners == 4
