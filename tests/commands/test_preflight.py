"""Checkpoints and servers are checked before the first stage, against a local hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from pipeline_steps.cli import app
from pipeline_steps.commands.preflight import named_checkpoints, run_preflight
from pipeline_steps.core.config import load_params
from pipeline_steps.core.presets import load_overlay, merge
from pipeline_steps.core.project_paths import ProjectPaths
from tests.factories.chat_server import ChatServer, Reply
from tests.factories.checkpoints.clap import TEXTS, clap_checkpoint, clap_encoder
from tests.factories.hub_server import HubServer
from tests.models.test_pickled_weights import pickled

PROJECT = Path(__file__).resolve().parents[2]
CLAP = ("owner/clap", "1" * 40)
PICKLED = ("owner/clap", "2" * 40)
EMPTY = ("owner/clap", "3" * 40)

pytestmark = pytest.mark.fault


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    plain = clap_checkpoint(tmp_path / "served/clap")
    bare = pickled(plain, tmp_path / "served/bare")
    (bare / "pytorch_model.bin").unlink()
    with HubServer({CLAP: plain, PICKLED: pickled(plain, tmp_path / "served/bin"), EMPTY: bare}) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield server


def project_of(folder: Path, **sections: dict[str, Any]) -> ProjectPaths:
    """Project whose parameters have these values."""
    folder.mkdir(exist_ok=True)
    params = load_params(PROJECT / "params.yaml")
    merge(params, sections)
    with (folder / "params.yaml").open("w") as handle:
        YAML().dump(params, handle)
    (folder / "dvc.yaml").write_text("stages: {}\n")
    return ProjectPaths(folder)


def clap_params(model: tuple[str, str]) -> dict[str, Any]:
    return {"encoder": "clap", "clap": {"model": model[0], "revision": model[1]}}


def test_only_checkpoints_of_selected_implementations_are_named() -> None:
    params = load_params(PROJECT / "params.yaml")
    assert named_checkpoints(params) == {}
    merge(params, load_overlay(PROJECT, "full"))
    assert set(named_checkpoints(params)) == {
        "caption.vlm", "embed.clap", "train.audio.ast", "train.ip_adapter.backbone", "evaluate.judge_checkpoints.dinov2",
    }  # fmt: skip
    merge(params, {"caption": {"captioner": "tagger"}, "train": {"recipe": "another"}})
    assert not {"caption.vlm", "train.ip_adapter.backbone"} & set(named_checkpoints(params))


@pytest.mark.parametrize("model", [CLAP, PICKLED])
def test_a_commit_with_all_files_passes_and_is_fetched(hub: HubServer, tmp_path: Path, model: tuple[str, str]) -> None:
    layout = project_of(tmp_path / "project", embed=clap_params(model))
    (result,) = run_preflight(layout)
    assert (result.name, result.status) == ("embed.clap", "ok")
    assert not hub.fetched, "files are listed and not fetched"
    encoder = clap_encoder(model[0], layout.root, revision=model[1]).load()
    assert encoder.encode_texts(TEXTS).shape == (len(TEXTS), 24)
    assert ("pytorch_model.bin" in hub.fetched) == (model == PICKLED)
    assert "(cached, " in run_preflight(layout)[0].found


@pytest.mark.parametrize(
    ("model", "words", "code"),
    [
        (EMPTY, "has no *.safetensors or pytorch_model.bin", 6),
        (("owner/clap", "4" * 40), "the hub has no owner/clap at 444", 2),
        (("owner/nothing", "1" * 40), "the hub has no owner/nothing", 2),
        (("owner/clap", "main"), "'main' is not a commit", 2),
    ],
)
def test_a_fault_is_one_line_and_stops_the_run_before_its_first_stage(
    hub: HubServer, tmp_path: Path, model: tuple[str, str], words: str, code: int
) -> None:
    layout = project_of(tmp_path / "project", embed=clap_params(model))
    (result,) = run_preflight(layout)
    assert (result.status, result.exit_code) == ("fail", code)
    assert words in result.found
    assert run_preflight(layout, ["ingest", "caption"]) == []
    ran = CliRunner().invoke(app, ["--project", str(layout.root), "run"])
    assert ran.exit_code == code, ran.output
    assert words in ran.output
    assert "no stage was run" in ran.output


def test_a_hub_that_does_not_answer_is_a_service_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    layout = project_of(tmp_path / "project", embed=clap_params(CLAP))
    (result,) = run_preflight(layout)
    assert (result.status, result.exit_code) == ("fail", 5)


def test_a_folder_is_checked_too(tmp_path: Path) -> None:
    folder = clap_checkpoint(tmp_path / "project/models/clap")
    layout = project_of(tmp_path / "project", embed=clap_params(("models/clap", "")))
    assert run_preflight(layout)[0].status == "ok"
    (folder / "preprocessor_config.json").unlink()
    assert "preprocessor_config.json" in run_preflight(layout)[0].found
    shutil.rmtree(folder)
    assert run_preflight(layout)[0].status == "fail"


def test_the_server_of_the_captioner_is_asked(tmp_path: Path) -> None:
    with ChatServer(lambda ask: Reply("")) as server:
        server_params = {"url": server.url, "model": "tiny-vlm", "max_attempts": 1}
        layout = project_of(tmp_path / "project", caption={"captioner": "openai_server", "openai_server": server_params})
        assert run_preflight(layout)[0].status == "ok"
        other = {**server_params, "model": "tiny-vml"}
        layout = project_of(tmp_path / "project", caption={"captioner": "openai_server", "openai_server": other})
        result = run_preflight(layout)[0]
        assert (result.exit_code, result.fix) == (2, "did you mean tiny-vlm?")
    layout = project_of(tmp_path / "project", caption={"captioner": "openai_server", "openai_server": server_params})
    assert run_preflight(layout)[0].exit_code == 5


def test_doctor_prints_the_checks_on_request(hub: HubServer, tmp_path: Path) -> None:
    layout = project_of(tmp_path / "project", embed=clap_params(EMPTY))
    said = CliRunner().invoke(app, ["--project", str(layout.root), "doctor", "--online", "--json"])
    findings = {finding["name"]: finding for finding in json.loads(said.output)["findings"]}
    assert findings["embed.clap"]["status"] == "fail"
    said = CliRunner().invoke(app, ["--project", str(layout.root), "doctor", "--json"])
    assert "embed.clap" not in {finding["name"] for finding in json.loads(said.output)["findings"]}
