"""Encoder `pe_av` on small checkpoints of the true classes, compared with transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline_steps.core.errors import ConfigError, IntegrityError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.embed.config import EmbedConfig
from pipeline_steps.embed.stage import run
from pipeline_steps.models.text_audio.base import recorded_encoder
from pipeline_steps.models.text_audio.pe_av import PeAvEncoder
from tests.factories.catalog import bytes_below, write_catalog
from tests.factories.checkpoints.clap import TEXTS
from tests.factories.checkpoints.pe_av import clips, pe_av_checkpoint, pe_av_encoder, settings
from tests.factories.events import CLIPS, write_events


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pe_av_checkpoint(tmp_path_factory.mktemp("pe_av") / "small")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> PeAvEncoder:
    return pe_av_encoder(folder).load()


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    """PeAudioModel with the weights of the checkpoint, loaded by name and not by `from_pretrained`."""
    from safetensors.torch import load_file
    from transformers import PeAudioConfig, PeAudioModel

    config = json.loads((folder / "config.json").read_text())
    model = PeAudioModel(
        PeAudioConfig(text_config=config["text_config"], audio_config=config["audio_video_config"]["audio_config"])
    )
    weights = {name.removeprefix("audio_model."): value for name, value in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(weights)
    return model.eval()


def unit(rows: torch.Tensor) -> np.ndarray:
    return np.asarray(torch.nn.functional.normalize(rows, dim=-1).numpy())


def test_audio_vectors_equal_those_of_transformers(folder: Path, encoder: PeAvEncoder, reference: Any) -> None:
    from transformers import PeAudioFeatureExtractor

    extractor = PeAudioFeatureExtractor.from_pretrained(folder)
    for clip in clips()[:2]:
        inputs = extractor(clip, sampling_rate=48_000, return_tensors="pt")
        assert inputs["input_values"].shape[-1] % 1920 == 0
        with torch.inference_mode():
            expected = unit(reference.get_audio_embeds(inputs["input_values"]))
        assert np.abs(encoder.encode_audio([clip]) - expected).max() < 1e-5


def test_a_long_clip_is_the_mean_of_windows_of_30_s(encoder: PeAvEncoder) -> None:
    clip = clips()[2]
    first, last = encoder.encode_audio([clip[: 30 * 48_000], clip[-30 * 48_000 :]])
    mean = (first + last) / np.linalg.norm(first + last)
    assert np.abs(encoder.encode_audio([clip])[0] - mean).max() < 1e-5


def test_text_vectors_are_the_class_token_before_the_final_norm(encoder: PeAvEncoder, reference: Any) -> None:
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(encoder.fetch())
    last: list[Any] = []
    tower = reference.text_model
    hook = tower.layers[-1].register_forward_hook(lambda _module, _inputs, output: last.append(output))
    expected, normed = [], []
    with torch.inference_mode():
        for text in TEXTS:
            read = words(text, return_tensors="pt")
            after = tower(read["input_ids"], read["attention_mask"]).last_hidden_state[:, 0]
            before = last[-1][0] if isinstance(last[-1], tuple) else last[-1]
            expected.append(reference.text_audio_head(before[:, 0]))
            normed.append(reference.text_audio_head(after))
    hook.remove()
    vectors = encoder.encode_texts(TEXTS)
    assert np.abs(vectors - unit(torch.cat(expected))).max() < 1e-4
    assert np.abs(unit(torch.cat(normed)) - unit(torch.cat(expected))).max() > 1e-4, "the norm changes the vectors"


def test_a_vector_does_not_depend_on_the_other_items(encoder: PeAvEncoder) -> None:
    many = encoder.encode_audio([*clips()[:2], *clips()[:2]])
    assert np.array_equal(many[:2], many[2:])
    assert np.array_equal(encoder.encode_audio(clips()[:1])[0], many[0])
    assert np.array_equal(encoder.encode_texts(TEXTS[:1])[0], encoder.encode_texts(TEXTS)[0])
    for broken in (np.zeros(0, np.float32), np.array([np.nan], np.float32), np.zeros((2, 2), np.float32)):
        with pytest.raises(ValueError, match="finite mono"):
            encoder.prepare_audio(broken)
    assert encoder.encode_audio([np.ones(1, np.float32)]).shape == (1, 32)


def test_the_stage_writes_vectors_and_the_encoder_is_rebuilt_from_meta(tmp_path: Path, demo: Path, assets: Path) -> None:
    layout = ProjectPaths(tmp_path)
    write_catalog(layout, demo, [], CLIPS[:2], assets=assets)
    write_events(layout, {"a" * 32: TEXTS[0], "b" * 32: TEXTS[1]})
    pe_av_checkpoint(tmp_path / "models/pe")
    report = run(EmbedConfig.from_params({"encoder": "pe_av", "pe_av": {"model": "models/pe"}}), layout)
    report.check_balance()
    assert (report.n_ok, report.cache_misses) == (4, 4)
    meta = json.loads(bytes_below(layout.embeddings)["meta.json"])
    assert (meta["encoder"], meta["families"], meta["dimension"]) == ("pe_av", ["pe_av"], 32)
    assert meta["space"].startswith("pe_av@")
    kind = recorded_encoder(meta)
    rebuilt = kind.from_parameters(meta["parameters"], layout)
    assert isinstance(rebuilt, PeAvEncoder)
    expected = rebuilt.load().encode_texts([TEXTS[0]])
    texts = np.load(layout.embeddings / "text.npy")
    assert any(np.array_equal(expected[0], row) for row in texts)


def test_another_checkpoint_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"needs pe_av\.model"):
        EmbedConfig.from_params({"encoder": "pe_av"})
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (other / "config.json").write_text('{"model_type": "clap"}')
    with pytest.raises(ConfigError, match=r"embed\.pe_av\.model: .* is of type clap, not pe_audio_video"):
        pe_av_encoder(other).fetch()
    (other / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(IntegrityError, match="lacks sampling_rate"):
        pe_av_encoder(other).fetch()


def test_the_true_class_with_its_video_encoder_loads_as_well(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    encoder = pe_av_encoder(pe_av_checkpoint(tmp_path / "whole", video=True)).load()
    assert encoder.encode_audio(clips()[:1]).shape == (1, settings(9)["text_config"]["hidden_size"])
