"""Encoder `clap` on small checkpoints of the real architecture, compared with transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline_steps.audio.log_mel import split_windows
from pipeline_steps.core.errors import ConfigError, IntegrityError, ResourceError
from pipeline_steps.models.hub_checkpoint import folder_digest
from pipeline_steps.models.text_audio.base import TextAudioEncoder
from pipeline_steps.models.text_audio.clap import ClapEncoder
from tests.factories.checkpoints.clap import TEXTS, clap_checkpoint, clap_encoder

RANDOM = np.random.default_rng(1)
WINDOW = (0.1 * RANDOM.standard_normal(480_000)).astype(np.float32)
SHORT = (0.5 * np.sin(np.arange(30_000) / 9)).astype(np.float32)
LONG = (0.2 * RANDOM.standard_normal(1_000_000) * np.linspace(1, 0, 1_000_000)).astype(np.float32)
CLIPS = [SHORT, WINDOW, LONG]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("clap")
    return {kind: clap_checkpoint(base / kind, fused=kind == "fused") for kind in ("plain", "fused")}


@pytest.fixture(scope="module")
def clap(folders: dict[str, Path]) -> ClapEncoder:
    return clap_encoder(folders["plain"]).load()


def transformers_vector(folder: Path, clip: np.ndarray) -> np.ndarray:
    """Vector of a clip of at most 10 s by transformers' extractor and model."""
    from transformers import ClapFeatureExtractor, ClapModel

    model = ClapModel.from_pretrained(folder).eval()
    inputs = ClapFeatureExtractor.from_pretrained(folder)(clip, sampling_rate=48_000, return_tensors="pt")
    with torch.inference_mode():  # the extractor marks a random clip of each batch of a fused model as long
        is_longer = torch.zeros_like(torch.as_tensor(inputs["is_longer"]))
        found = model.get_audio_features(inputs["input_features"].float(), is_longer).pooler_output[0]
    return np.asarray(found.numpy())


@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_vectors_equal_those_of_transformers(folders: dict[str, Path], kind: str) -> None:
    encoder = clap_encoder(folders[kind]).load()
    assert isinstance(encoder, TextAudioEncoder)
    vectors = encoder.encode_audio([SHORT, WINDOW])
    for vector, clip in zip(vectors, (SHORT, WINDOW), strict=True):
        assert np.abs(vector - transformers_vector(folders[kind], clip)).max() < 1e-5
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3, "the vectors of different clips differ"


@pytest.mark.parametrize("padding", ["repeatpad", "repeat", "pad"])
def test_a_short_clip_fills_its_window_as_the_checkpoint_says(folders: dict[str, Path], tmp_path: Path, padding: str) -> None:
    folder = tmp_path / padding
    shutil.copytree(folders["plain"], folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "padding": padding}))
    encoder = clap_encoder(folder).load()
    for seconds in (2.0, 3.7):  # 2 s fit five times as a whole, 3.7 s twice
        clip = np.random.default_rng(1).normal(0, 0.1, int(48_000 * seconds)).astype(np.float32)
        assert np.abs(encoder.encode_audio([clip])[0] - transformers_vector(folder, clip)).max() < 1e-5, seconds


def test_a_long_clip_is_the_mean_of_fixed_windows(folders: dict[str, Path], clap: ClapEncoder) -> None:
    mean = np.mean([transformers_vector(folders["plain"], window) for window in split_windows(LONG, 480_000)], axis=0)
    expected = mean / np.linalg.norm(mean)
    np.testing.assert_allclose(clap.encode_audio([LONG])[0], expected, atol=1e-5)


def test_the_same_item_gives_the_same_bytes(clap: ClapEncoder) -> None:
    before = torch.get_num_threads()
    clips, texts = clap.encode_audio(CLIPS), clap.encode_texts(TEXTS * 5)
    for row, clip in enumerate(CLIPS):
        assert np.array_equal(clap.encode_audio([clip])[0], clips[row]), "in any batch"
    for row, text in enumerate(TEXTS):
        assert np.array_equal(clap.encode_texts([text])[0], texts[row])
        assert np.array_equal(texts[row], texts[row + 2 * len(TEXTS)])
    try:
        torch.set_num_threads(3)
        assert np.array_equal(clap.encode_audio(CLIPS[::-1])[::-1], clips), "with any number of cores, in any order"
        assert np.array_equal(clap.encode_texts(TEXTS), texts[: len(TEXTS)])
    finally:
        torch.set_num_threads(before)


def test_texts_equal_those_of_transformers_and_long_texts_are_cut(folders: dict[str, Path], clap: ClapEncoder) -> None:
    from transformers import AutoTokenizer, ClapModel

    model, words = ClapModel.from_pretrained(folders["plain"]).eval(), AutoTokenizer.from_pretrained(folders["plain"])
    texts = [*TEXTS, "x", "a very long story " * 40]
    vectors = clap.encode_texts(texts)
    for vector, text in zip(vectors, texts, strict=True):
        with torch.inference_mode():
            inputs = words(text, truncation=True, max_length=77, return_tensors="pt")
            expected = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output[0].numpy()
        assert np.abs(vector - expected).max() < 1e-5
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3
    assert clap.encode_texts([]).shape == clap.encode_audio([]).shape == (0, clap.dimension)


def test_openvino_gives_the_same_vectors(folders: dict[str, Path], clap: ClapEncoder) -> None:
    pytest.importorskip("openvino")
    fast = clap_encoder(folders["plain"], backend="openvino").load()
    assert np.abs(fast.encode_audio(CLIPS) - clap.encode_audio(CLIPS)).max() < 1e-5
    assert fast.describe_audio() != clap.describe_audio()
    assert fast.describe_texts() == clap.describe_texts()


def test_the_identity_depends_on_content_only(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(folders["plain"], copy)
    here = clap_encoder("elsewhere", root=tmp_path)
    assert here.describe() == clap_encoder(folders["plain"]).describe(), "the path of a folder does not matter"
    assert here.parameters["model"] == "elsewhere"
    assert clap_encoder(copy).parameters == {}, "no absolute path is recorded"
    assert clap_encoder(copy, revision=folder_digest(copy)).identity == here.identity
    with pytest.raises(IntegrityError, match="pinned"):
        clap_encoder(copy, revision="0" * 64).fetch()
    settings = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps({**settings, "frequency_min": 0}))
    assert clap_encoder(copy).describe() != here.describe()


@pytest.mark.parametrize(
    ("file", "change", "error", "words"),
    [
        ("config.json", {"model_type": "clip"}, ConfigError, "not clap"),
        ("config.json", {"auto_map": {"AutoModel": "evil.Model"}}, IntegrityError, "auto_map"),
        ("preprocessor_config.json", {"top_db": 80}, IntegrityError, "top_db"),
        ("preprocessor_config.json", {"padding": "reflect"}, IntegrityError, "padding 'reflect'"),
        ("preprocessor_config.json", {"feature_size": 128}, IntegrityError, "mel bands"),
        ("preprocessor_config.json", None, IntegrityError, "missing"),
        ("tokenizer.json", None, IntegrityError, "tokenizer"),
        ("model.safetensors", None, IntegrityError, "safetensors"),
        ("model.safetensors", b'\x08\0\0\0\0\0\0\0{"a":1}}', IntegrityError, "cannot be loaded"),
    ],
)
def test_invalid_checkpoints_are_rejected(
    folders: dict[str, Path], tmp_path: Path, file: str, change: object, error: type[Exception], words: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(folders["plain"], folder)
    path = folder / file
    if isinstance(change, dict):
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    elif isinstance(change, bytes):
        path.write_bytes(change)
    else:
        path.unlink()
    with pytest.raises(error, match=words):
        clap_encoder(folder).load()


def test_missing_weights_are_an_error(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "holes"
    shutil.copytree(folders["plain"], folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("audio_projection.linear2.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match="audio_projection"):
        clap_encoder(folder).load()


def test_invalid_settings_are_errors(clap: ClapEncoder) -> None:
    with pytest.raises(ConfigError, match="neither a folder nor a hub id"):
        clap_encoder("no such thing").fetch()
    with pytest.raises(ConfigError, match="not a commit"):
        clap_encoder("owner/name", revision="main").fetch()
    with pytest.raises(ValueError, match="finite mono"):
        clap.prepare_audio(np.array([0.0, np.nan], np.float32))
    if not torch.cuda.is_available():
        with pytest.raises(ResourceError, match="no GPU"):
            clap_encoder("owner/name", device="cuda")
