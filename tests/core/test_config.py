"""Tests of the configuration: errors name the key, the value and a suggestion."""

from pathlib import Path

import pytest
from pydantic import Field

from pipeline_steps.core.config import StageConfig, load_params, parse_section
from pipeline_steps.core.errors import ConfigError


class Inner(StageConfig):
    depth: int = Field(1, ge=1)


class Example(StageConfig):
    learning_rate: float = Field(1e-3, gt=0)
    steps: int = Field(10, ge=1)
    inner: Inner = Inner()


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    return path


def test_unknown_key_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"train\.leraning_rate is unknown; did you mean learning_rate"):
        parse_section(Example, "train", {"train": {"leraning_rate": 1}})
    with pytest.raises(ConfigError, match=r"train\.inner\.dept is unknown; did you mean depth"):
        parse_section(Example, "train", {"train": {"inner": {"dept": 1}}})


def test_all_errors_are_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_section(Example, "train", {"train": {"learning_rate": -1, "steps": "many", "inner": {"depth": 0}}})
    assert all(name in str(caught.value) for name in ("learning_rate", "steps", "inner.depth"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0, "fast"])
def test_values_out_of_range_are_errors(value: object) -> None:
    with pytest.raises(ConfigError, match="learning_rate"):
        parse_section(Example, "train", {"train": {"learning_rate": value}})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: 1\na: 2\n", "not valid YAML"),
        ("a:\n\t- 1\n", "not valid YAML"),
        ("- 1\n", "one section per stage"),
        ("a: &x [1]\nb: [*x, *x]\n", "aliases"),
        ("caption: {api_key: abc}\n", "looks like a secret"),
        ("caption: {api_key_envs: abc}\n", "looks like a secret"),
        ("x: " + "y" * 1_100_000, "larger than"),
    ],
)
def test_invalid_files_are_errors(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_params(write(tmp_path, text))


def test_yaml_1_2_numbers_and_words(tmp_path: Path) -> None:
    assert load_params(write(tmp_path, "a: {rate: 1e-4, word: yes}\n")) == {"a": {"rate": 1e-4, "word": "yes"}}
