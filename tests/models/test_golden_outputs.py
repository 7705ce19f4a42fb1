"""Outputs do not change under the same version: results in the memo would go stale unseen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.models.golden_outputs import ENCODERS, GOLDEN, digest, vectors


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_outputs_are_those_of_this_version(name: str, assets: Path, demo: Path) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    assert ENCODERS[name].version == golden["version"], "version was raised: rewrite golden.json (see golden_outputs.py)"
    outputs = vectors(name, assets, demo)
    assert sorted(outputs) == sorted(golden["outputs"])
    for key, values in outputs.items():
        np.testing.assert_allclose(
            digest(values), golden["outputs"][key], rtol=1e-4, atol=1e-4, err_msg=f"{name}.{key} changed: raise its version"
        )


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_an_encoder_describes_itself_without_loading(name: str, assets: Path) -> None:
    encoder = ENCODERS[name](assets)
    description = encoder.describe()
    assert [description[key] for key in ("name", "family", "version")] == [name, encoder.family, encoder.version]
    assert all(len(digest) == 64 for digest in description["sha256"].values())
    with pytest.raises(RuntimeError, match="call load"):
        _ = encoder.weights
