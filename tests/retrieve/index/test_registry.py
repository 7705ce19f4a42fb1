"""Registry of vector indexes, and an index of another package in the stage."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline_steps.core.config import parse_section
from pipeline_steps.core.errors import ConfigError
from pipeline_steps.core.schemas import NEIGHBORS
from pipeline_steps.core.tables import read_table
from pipeline_steps.retrieve.index.base import INDEXES
from pipeline_steps.retrieve.stage import RetrieveConfig, run
from tests.factories.toy_index import ToyIndex
from tests.retrieve.synthetic_embeddings import make


def test_registered_indexes() -> None:
    assert set(INDEXES.names()) >= {"annoy", "exact", "ivf", "torch"}
    assert INDEXES.get("toy") is ToyIndex


def test_configuration_is_validated_without_torch() -> None:
    program = """
import sys
from pipeline_steps.retrieve.config import RetrieveConfig
RetrieveConfig.from_params({"index": "torch", "ivf": {}, "annoy": {}})
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_index_of_another_package_is_selected_by_name(tmp_path: Path) -> None:
    tables = []
    for index in ("exact", "toy"):
        layout = make(tmp_path / index)
        config = parse_section(RetrieveConfig, "retrieve", {"retrieve": {"index": index, "k": 7}})
        report = run(config, layout)
        tables.append(read_table(layout.retrieval / "neighbors.parquet", NEIGHBORS))
    assert tables[0]["audio_id"] == tables[1]["audio_id"]
    assert report.metrics["index"] == "toy"
    assert report.metrics["toy"] == report.metrics["toy_among_texts"] == {"dimensions": 4096}


def test_the_group_of_an_index_is_validated() -> None:
    with pytest.raises(ConfigError, match=r"retrieve\.ivf\.min_recal is unknown; did you mean min_recall\?"):
        parse_section(RetrieveConfig, "retrieve", {"retrieve": {"ivf": {"min_recal": 0.9}}})
    with pytest.raises(ConfigError, match=r"unknown vector index 'anoy' -> did you mean annoy\?"):
        parse_section(RetrieveConfig, "retrieve", {"retrieve": {"index": "anoy"}})
