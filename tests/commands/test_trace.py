"""Tests of `sonify trace`: lineage of models, uses of items, checkout with the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline_steps.core.errors import DataError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.lineage.dvc_digests import hash_path, lock_outs, read_lock
from pipeline_steps.tracking.lineage.lock_history import DvcCache, find_lock, stage_lineage
from tests.factories.cli_project import Sonify, commit, dvc, git, json_output


def stage(deps: dict[str, str], outs: dict[str, str], **params: object) -> dict[str, object]:
    """One stage of a lock: path -> md5 of its inputs and outs."""
    entries = [[{"path": path, "md5": md5} for path, md5 in side.items()] for side in (deps, outs)]
    return {"deps": entries[0], "outs": entries[1], "params": {"params.yaml": params}}


LOCK = {
    "schema": "2.0",
    "stages": {
        "pair": stage({"raw": "1", "pipeline_steps/pair": "9"}, {"pairs": "2"}),
        "evaluate": stage({"model": "3", "raw": "1"}, {"report": "4"}),
        "train": stage({"pairs": "2"}, {"model": "3"}, train={"seed": 1}),
        "other": stage({"raw": "1"}, {"unrelated": "5"}),
    },
}


def test_lineage_is_ordered_from_raw_data_to_evaluation() -> None:
    steps = stage_lineage(LOCK, "model")
    assert [step.stage for step in steps] == ["pair", "train", "evaluate"]
    assert steps[0].raw == ("raw",)
    assert steps[0].code == {"pipeline_steps/pair": "9"}
    assert steps[1].params == {"train": {"seed": 1}}
    assert steps[2].reads == {"model": "3", "raw": "1"}
    with pytest.raises(DataError, match="no out nothing"):
        stage_lineage(LOCK, "nothing")


@pytest.fixture
def traced(pool: ProjectPaths) -> ProjectPaths:
    """Two commits with different models, both registered."""
    from pipeline_steps.tracking.settings import REGISTERED_MODEL
    from tests.factories.registered_models import client_of, register

    for version in (1, 2):
        (pool.model / "weights.txt").write_text(f"weights {version}")
        outs: dict[str, str] = {}
        commit(pool, outs, f"model {version}")
        register(pool, [0.5, 0.6], pairs=outs["data/pairs"], version=version)
        client_of(pool).set_model_version_tag(REGISTERED_MODEL, str(version), "dvc.md5", outs["models/audio2image"])
    return pool


def test_lineage_and_checkout_of_a_model(traced: ProjectPaths, sonify: Sonify, tmp_path: Path) -> None:
    first = git(traced.root, "rev-list", "--max-parents=0", "HEAD").strip()
    found = json_output(sonify("trace", "1", "--json"))
    assert found["lock_commit"] == first
    assert [step["stage"] for step in found["steps"]] == ["pair", "train", "evaluate"]
    assert found["steps"][0]["raw"] == ["data/demo"]
    assert found["differs_from_mlflow"] == []

    target = tmp_path / "then"
    back = json_output(sonify("trace", "1", "--checkout", str(target), "--json"))
    assert (target / "models/audio2image/weights.txt").read_text() == "weights 1"
    locked = lock_outs(read_lock(target / "dvc.lock"))
    assert locked["models/audio2image"] == found["md5"]
    assert {path: back["checkout"]["outs"][path] for path in locked} == locked
    assert back["checkout"]["outs"]["data/demo"] == hash_path(traced.root / "data/demo")
    assert sonify("trace", "2", "--checkout", str(target)).exit_code == 2


def test_checkout_of_an_uncommitted_lock_has_its_reports(traced: ProjectPaths, sonify: Sonify, tmp_path: Path) -> None:
    """Git tracks reports (`cache: false`), so a clone has those of the last commit, or none."""
    from pipeline_steps.tracking.settings import REGISTERED_MODEL
    from tests.factories.registered_models import client_of, register

    register(traced, [0.5, 0.6], version=3)
    (traced.model / "weights.txt").write_text("weights 3")
    (traced.root / "reports").mkdir(exist_ok=True)
    (traced.root / "reports/train.json").write_text('{"steps": 3}')
    graph = YAML(typ="safe").load(traced.root / "dvc.yaml")
    graph["stages"]["train"]["metrics"] = [{"reports/train.json": {"cache": False}}]
    YAML().dump(graph, traced.root / "dvc.yaml")
    dvc(traced.root, "commit", "-f")
    client_of(traced).set_model_version_tag(REGISTERED_MODEL, "3", "dvc.md5", hash_path(traced.model))
    kept = DvcCache(traced).path(hash_path(traced.root / "reports/train.json"))
    assert kept is not None, "DVC's memory of runs keeps reports as well"
    for name in ("cache", "tree"):
        target = tmp_path / name
        result = sonify("trace", "3", "--checkout", str(target), "--json")
        assert result.exit_code == 0, result.output
        assert (target / "reports/train.json").read_text() == '{"steps": 3}'
        assert (target / "models/audio2image/weights.txt").read_text() == "weights 3"
        kept.unlink(missing_ok=True)
    (traced.root / "reports/train.json").write_text('{"steps": 4}')
    assert sonify("trace", "3", "--checkout", str(tmp_path / "later")).exit_code == 3, "the work tree holds another report"


def test_digest_that_differs_in_mlflow_is_reported(traced: ProjectPaths, sonify: Sonify) -> None:
    from pipeline_steps.tracking.settings import REGISTERED_MODEL
    from tests.factories.registered_models import client_of, register

    register(traced, [0.5, 0.6], pairs="f" * 32 + ".dir", version=3)
    md5 = hash_path(traced.model)
    client_of(traced).set_model_version_tag(REGISTERED_MODEL, "3", "dvc.md5", md5)
    found = json_output(sonify("trace", "3", "--json"))
    assert len(found["differs_from_mlflow"]) == 1
    assert "data/pairs: MLflow ffff" in found["differs_from_mlflow"][0]


def test_model_without_a_lock_is_an_error(traced: ProjectPaths, sonify: Sonify) -> None:
    from tests.factories.registered_models import register

    register(traced, [0.5, 0.6], version=3)
    result = sonify("trace", "3")
    assert result.exit_code == 3
    with pytest.raises(DataError, match=r"no dvc\.lock in this repository contains"):
        find_lock(traced, "models/audio2image", "0" * 32)


@pytest.mark.parametrize("name", ["id", "prefix", "path", "disk"])
def test_uses_of_an_item(traced: ProjectPaths, sonify: Sonify, ids: dict[str, str], name: str) -> None:
    item = ids["i-dog-000"]
    raw = traced.root / "data/demo/i-dog-000.webp"
    said = {"id": item, "prefix": item[:10], "path": "i-dog-000.webp", "disk": str(raw)}[name]
    found = json_output(sonify("trace", said, "--json"))
    assert found["item"]["item_id"] == item
    (pair,) = found["pairs"]
    assert (pair["split"], pair["others"]) == ("train", [ids["s-dog-000"]])
    assert [(use["version"], use["splits"]) for use in found["versions"]] == [("1", {"train": 1}), ("2", {"train": 1})]
    sound = json_output(sonify("trace", ids["s-cow-000"], "--json"))
    assert (sound["item"]["kind"], sound["pairs"][0]["others"]) == ("audio", [ids["i-cow-000"]])


def test_uses_in_older_pairs_are_read_from_the_cache(traced: ProjectPaths, sonify: Sonify, ids: dict[str, str]) -> None:
    import shutil

    shutil.rmtree(traced.pairs)
    shutil.rmtree(traced.catalog)
    found = json_output(sonify("trace", ids["i-dog-000"][:12], "--json"))
    assert found["item"]["state"] == "in an older catalog"
    assert found["pairs"] == []
    assert found["versions"][0]["splits"] == {"train": 1}


def test_unknown_names_are_errors(traced: ProjectPaths, sonify: Sonify) -> None:
    result = sonify("trace", "no-such-thing")
    assert result.exit_code == 2
    assert "is no item of any catalog here" in result.output
    assert sonify("trace").exit_code == 2
    assert len(json_output(sonify("trace", "--list", "--json"))["versions"]) == 2
