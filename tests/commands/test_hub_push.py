"""Upload to a hub: one commit with every file, a private export to private repositories only, clear errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline_steps.commands.hub_push import push_folder
from pipeline_steps.core.errors import ConfigError, ServiceError
from tests.factories.hub_upload_server import TOKEN, HubUploadServer


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubUploadServer]:
    with HubUploadServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "export/data").mkdir(parents=True)
    (tmp_path / "export/README.md").write_text("---\nlicense: mit\n---\n# Pairs\n")
    (tmp_path / "export/data/train-00000-of-00001.parquet").write_bytes(b"PAR1")
    return tmp_path / "export"


def test_every_file_arrives_in_a_new_repository(hub: HubUploadServer, folder: Path) -> None:
    address = push_folder(folder, "me/pairs", "dataset", private=False)
    assert address.endswith("me/pairs")
    assert hub.kinds == {"me/pairs": "dataset"}
    assert hub.repositories == {"me/pairs": False}
    assert hub.files["me/pairs"] == {
        "README.md": (folder / "README.md").read_bytes(),
        "data/train-00000-of-00001.parquet": b"PAR1",
    }


def test_a_private_export_goes_to_a_private_repository_only(hub: HubUploadServer, folder: Path) -> None:
    push_folder(folder, "me/new", "model", private=True)
    assert hub.repositories["me/new"] is True
    hub.repositories["me/open"] = False
    with pytest.raises(ConfigError, match="is public; a private export is not uploaded"):
        push_folder(folder, "me/open", "model", private=True)
    assert "me/open" not in hub.files


def test_refusals_and_outages_have_their_own_codes(hub: HubUploadServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--push a/b/c: .*; *|--push a/b/c"):
        push_folder(folder, "a/b/c", "dataset", private=False)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ConfigError, match=r"refuses me/pairs \(401\)") as refused:
        push_folder(folder, "me/pairs", "dataset", private=False)
    assert "hf auth login" in refused.value.action
    assert "hf_wrong" not in str(refused.value)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ServiceError, match="was not uploaded") as down:
        push_folder(folder, "me/pairs", "dataset", private=False)
    assert down.value.transient
    assert not hub.files
