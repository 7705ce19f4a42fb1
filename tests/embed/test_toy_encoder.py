"""An encoder of another package runs through the stage and the label oracle by its registered name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline_steps.core.config import config_class, parse_section
from pipeline_steps.core.errors import ConfigError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.embed.stage import embed_texts, run
from pipeline_steps.evaluate.retrieval.label_oracle import label_vectors
from tests.factories.catalog import write_catalog
from tests.factories.events import CLIPS, write_events
from tests.factories.toy_encoder import ToyEncoder, ToyEncoderConfig

PARAMS = {"embed": {"encoder": "toy", "toy": {"bands": 12}}}


def test_an_encoder_of_another_package_is_selected_by_name(tmp_path: Path, demo: Path, assets: Path) -> None:
    layout = ProjectPaths(tmp_path)
    write_catalog(layout, demo, ["dog-000"], CLIPS, assets=assets)
    write_events(layout, {"a" * 32: "dog barking", "b" * 32: "sheep bleating"})
    config = parse_section(config_class("embed"), "embed", PARAMS)
    report = run(config, layout)  # type: ignore[arg-type]
    report.check_balance()
    assert (report.n_ok, report.cache_misses, report.cache_hits) == (6, 6, 0)
    meta = json.loads((layout.embeddings / "meta.json").read_text())
    assert (meta["encoder"], meta["dimension"], meta["parameters"]) == ("toy", 12, {"bands": 12})
    assert np.load(layout.embeddings / "audio.npy").shape == (4, 12)
    again = run(config, layout)  # type: ignore[arg-type]
    assert (again.cache_misses, again.cache_hits) == (0, 6)
    encoder = ToyEncoder(ToyEncoderConfig(bands=12), layout)
    vectors, computed, _ = embed_texts(encoder, config, layout, ["dog barking", "a bell"])  # type: ignore[arg-type]
    assert (vectors.shape, computed) == ((2, 12), 1)
    found = label_vectors(layout, str(layout.result_cache), meta, ["dog", "bell"], "dog barking", vectors[0])
    assert found is not None
    assert np.array_equal(found["bell"], encoder.encode_texts(["bell"])[0])


def test_the_group_of_an_encoder_is_validated() -> None:
    with pytest.raises(ConfigError, match=r"embed\.toy\.band is unknown; did you mean bands\?"):
        parse_section(config_class("embed"), "embed", {"embed": {"encoder": "toy", "toy": {"band": 3}}})
    with pytest.raises(ConfigError, match=r"unknown text-audio encoder 'toys'"):
        parse_section(config_class("embed"), "embed", {"embed": {"encoder": "toys"}})
    with pytest.raises(ConfigError, match=r"embed: .*encoder clap needs"):
        parse_section(config_class("embed"), "embed", {"embed": {"encoder": "clap"}})
