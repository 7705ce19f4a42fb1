"""Tests of the parameters of a run: presets, overrides, seed, validation."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from flows.param_overrides import RunRequest, write_params
from pipeline_steps.core.errors import ConfigError

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copy(PROJECT / "params.yaml", tmp_path / "params.yaml")
    shutil.copytree(PROJECT / "presets", tmp_path / "presets")
    return tmp_path


def loaded(root: Path) -> dict[str, object]:
    return dict(YAML(typ="safe").load((root / "params.yaml").read_text()))


def test_empty_request_keeps_every_byte(root: Path) -> None:
    before = (root / "params.yaml").read_bytes()
    assert write_params(root, RunRequest()) == []
    assert (root / "params.yaml").read_bytes() == before


def test_overrides_are_set_and_reported(root: Path) -> None:
    before = loaded(root)
    changes = write_params(
        root,
        RunRequest(
            overrides=("train.ip_adapter.phases.adapter.batch_size=7", "ingest.metadata=null", "pair.event_pooling=mean")
        ),
    )
    assert sorted(changes) == [
        "ingest.metadata: manifest.csv -> None",
        "pair.event_pooling: max -> mean",
        "train.ip_adapter.phases.adapter.batch_size: 16 -> 7",
    ]
    after = loaded(root)
    after["train"]["ip_adapter"]["phases"]["adapter"]["batch_size"] = 16  # type: ignore[index]
    after["ingest"]["metadata"] = "manifest.csv"  # type: ignore[index]
    after["pair"]["event_pooling"] = "max"  # type: ignore[index]
    assert after == before, "nothing else has changed"


def test_seed_is_set_in_every_section(root: Path) -> None:
    write_params(root, RunRequest(seed=11))
    params = loaded(root)
    seeds = {name: section["seed"] for name, section in params.items() if "seed" in section}  # type: ignore[operator, index]
    assert len(seeds) >= 4
    assert set(seeds.values()) == {11}


def test_override_replaces_a_mapping(root: Path) -> None:
    write_params(root, RunRequest(overrides=("ingest.pool={part: pool}",)))
    assert loaded(root)["ingest"]["pool"] == {"part": "pool"}  # type: ignore[index]


def test_preset_is_applied_before_the_overrides(root: Path) -> None:
    (root / "presets/other.yaml").write_text("retrieve:\n  k: 40\n  seed: 2\n")
    changes = write_params(root, RunRequest(preset="other", overrides=("retrieve.seed=3",)))
    assert changes == ["retrieve.k: 50 -> 40", "retrieve.seed: 0 -> 3"]
    assert "# neighbors per text" in (root / "params.yaml").read_text(), "comments stay"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.leraning_rate=1", "train.leraning_rate is unknown"),
        ("train.ip_adapter.phases.adapter.max_stepz=3", "did you mean max_steps"),
        ("trian.seed=3", "did you mean train"),
        ("retrieve.k=many", "retrieve.k: Input should be a valid integer"),
        ("retrieve.k=-1", "retrieve.k"),
        ("retrieve=3", "is a whole section"),
        ("retrieve.k.deeper=3", "is a value, not a section"),
        ("retrieve.k", "is not KEY=VALUE"),
        ("retrieve.k=[1", "is not a YAML value"),
        ("caption.api_key=hunter2", "looks like a secret"),
    ],
)
def test_invalid_overrides_are_refused(root: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        write_params(root, RunRequest(overrides=(override,)))
    assert message in str(caught.value)


def test_all_problems_are_reported_and_unknown_presets_are_refused(root: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        write_params(root, RunRequest(overrides=("retrieve.kk=1", "pair.sead=2")))
    assert "retrieve.kk" in str(caught.value)
    assert "pair.sead is unknown; did you mean seed?" in str(caught.value)
    with pytest.raises(ConfigError, match="did you mean embedded"):
        write_params(root, RunRequest(preset="embeded"))
