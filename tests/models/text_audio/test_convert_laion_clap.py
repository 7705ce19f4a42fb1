"""Conversion of laion-clap checkpoints: no unpickling of code, and no partial output."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline_steps.core.errors import ConfigError, DataError, IntegrityError
from pipeline_steps.core.hashing import sha256_file
from pipeline_steps.models.text_audio.convert_laion_clap import (
    clap_configuration,
    convert,
    infer_architecture,
    load_text_config,
    main,
    read_laion,
    rename_keys,
)
from tests.factories.checkpoints.clap import TEXTS, clap_encoder
from tests.factories.checkpoints.laion import laion_checkpoint, laion_encoder, laion_state, text_folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_folder(tmp_path_factory.mktemp("roberta"))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_converted_checkpoint_loads(tmp_path: Path, text: Path, fused: bool) -> None:
    checkpoint = laion_checkpoint(tmp_path / "laion.pt", fused)
    folder = convert(checkpoint, text, tmp_path / "made", sha256_file(checkpoint))
    encoder = clap_encoder(folder).load()
    assert encoder.front_end == infer_architecture(read_laion(checkpoint)).front_end
    assert (encoder.front_end.low, encoder.front_end.scale) == (50, "htk" if fused else "slaney")
    texts, clips = encoder.encode_texts(TEXTS), encoder.encode_audio([np.sin(np.arange(9000) / 5).astype(np.float32)])
    assert texts.shape == (5, 24)
    assert clips.shape == (1, 24)
    assert not list(folder.glob("*.pt")), "the output has no pickle"


def test_the_architecture_is_inferred_from_the_weights(text: Path) -> None:
    shape = infer_architecture(laion_state(True))
    assert (shape.width, shape.depths, shape.heads, shape.window) == (16, (2, 2, 2, 2), (2, 2, 4, 4), 8)
    assert (shape.fused, shape.dimension) == (True, 24)
    config = clap_configuration(laion_state(), load_text_config(text))
    assert config.text_config.layer_norm_eps == 1e-5, "RoBERTa's, not ClapTextConfig's default"
    assert (config.audio_config.hidden_size, config.text_config.num_hidden_layers) == (128, 2)


def test_query_key_and_value_are_split(text: Path) -> None:
    state = laion_state()
    made = rename_keys(state)
    whole = state["audio_branch.layers.1.blocks.0.attn.qkv.weight"]
    prefix = "audio_model.audio_encoder.layers.1.blocks.0.attention.self"
    assert torch.equal(torch.cat([made[f"{prefix}.{part}.weight"] for part in ("query", "key", "value")]), whole)
    assert not [name for name in made if "tscam" in name or "audio_transform" in name or "melW" in name]


class FolderOnUnpickling:
    """Object whose unpickling creates a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


@pytest.mark.fault
def test_a_pickle_with_code_is_rejected_and_not_run(tmp_path: Path, text: Path) -> None:
    checkpoint = laion_checkpoint(tmp_path / "evil.pt", extra=FolderOnUnpickling(tmp_path / "owned"))
    with pytest.raises(IntegrityError, match="cannot be read"):
        convert(checkpoint, text, tmp_path / "made")
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "made").exists()


@pytest.mark.fault
@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"PK\x03\x04 not a zip", b"hello"])
def test_a_file_that_is_no_checkpoint_is_rejected(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"bad\.pt"):
        read_laion(tmp_path / "bad.pt")


def test_other_models_and_damaged_files_are_errors(tmp_path: Path, text: Path) -> None:
    with pytest.raises(DataError, match="missing"):
        read_laion(tmp_path / "none.pt")
    checkpoint = laion_checkpoint(tmp_path / "laion.pt")
    with pytest.raises(IntegrityError, match="sha256"):
        read_laion(checkpoint, "0" * 64)
    torch.save({"state_dict": {"other": torch.ones(2)}}, tmp_path / "other.pt")
    with pytest.raises(IntegrityError, match="HTSAT"):
        read_laion(tmp_path / "other.pt")
    with pytest.raises(ConfigError, match=r"config\.json"):
        convert(checkpoint, tmp_path, tmp_path / "made")
    with pytest.raises(ConfigError, match="not empty"):
        convert(checkpoint, text, text)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("module.audio_branch.norm.weight", None, "do not fit ClapModel"),
        ("module.audio_branch.surprise", torch.ones(3), "surprise"),
        ("module.audio_branch.norm.weight", torch.ones(3), "audio_encoder.norm.weight"),
        ("module.audio_branch.logmel_extractor.melW", torch.ones(513, 64), "mel filters"),
    ],
)
def test_unknown_weights_are_an_error(tmp_path: Path, text: Path, name: str, value: torch.Tensor | None, words: str) -> None:
    state = {f"module.{key}": tensor for key, tensor in laion_state().items()}
    state.pop(name, None)
    torch.save({"state_dict": state if value is None else {**state, name: value}}, tmp_path / "odd.pt")
    with pytest.raises(IntegrityError, match=words):
        convert(tmp_path / "odd.pt", text, tmp_path / "made")
    assert not (tmp_path / "made").exists(), "there is no partial output"


def test_command(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = laion_checkpoint(tmp_path / "laion.pt")
    monkeypatch.setattr("sys.argv", ["laion_convert", str(checkpoint), str(text), str(tmp_path / "made")])
    main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "made")
    assert (tmp_path / "made/model.safetensors").is_file()


@pytest.mark.skipif(importlib.util.find_spec("laion_clap") is not None, reason="laion-clap is installed")
def test_without_the_package_the_error_names_an_alternative(tmp_path: Path, text: Path) -> None:
    encoder = laion_encoder(laion_checkpoint(tmp_path / "laion.pt"), text)
    assert encoder.dimension == 24
    with pytest.raises(ConfigError, match="laion-clap is not installed") as caught:
        encoder.load()
    assert "convert" in str(caught.value)
