"""A tiny data folder with the layout that the stages write."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ruamel.yaml import YAML
from transformers import BertConfig, BertModel, BertTokenizer

from backbone.autoencoder import create_autoencoder, encode_all
from backbone.config import params
from backbone.text import MAX_TOKENS, TextEncoder

CAPTIONS = ["", "dog", "a drawing of a dog", "cat", "a drawing of a cat", "bell", "church bell"]
ROOT = Path(__file__).parents[2]


def write_tiny_text_encoder(folder: Path) -> None:
    """A BERT with random weights and a vocabulary of letters."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({w for c in CAPTIONS for w in c.split()})]
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=MAX_TOKENS).save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=384, num_hidden_layers=1, num_attention_heads=6, intermediate_size=64
    )
    config.use_attention_mask = True
    BertModel(config).save_pretrained(folder / "text_encoder")


@pytest.fixture(scope="session")
def tiny_params(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """params.yaml of a model that trains in seconds."""
    path = tmp_path_factory.mktemp("params") / "params.yaml"
    unet = params("unet") | {"block_out_channels": [32, 32, 32], "attention_head_dim": [1, 1, 1], "time_embedding_dim": 32}
    train = params("train") | {"batch_size": 4, "checkpoint_seconds": 0, "grid_seconds": 1e9, "warmup_steps": 2}
    train |= {"grid_prompts": ["dog", "church bell"], "num_inference_steps": 2, "validation_every": 100}
    with path.open("w") as stream:
        YAML(typ="safe").dump({"unet": unet, "train": train}, stream)
    return path


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data folder with 12 random images, latents and token states."""
    folder = tmp_path_factory.mktemp("backbone")
    write_tiny_text_encoder(folder / "dataset" / "text")
    images = np.random.default_rng(0).integers(0, 255, (12, 64, 64, 3), dtype=np.uint8)
    np.save(folder / "dataset" / "images.npy", images)
    np.save(folder / "dataset" / "token_states.npy", TextEncoder(folder / "dataset" / "text").token_states(CAPTIONS))
    rows = [
        {
            "thing": ("dog", "cat", "church bell")[i % 3],
            "similarity": 0.9,
            "sounds": i != 5,
            "split": "validation" if i == 4 else "train",
            "captions": [1 + 2 * (i % 3), 2 + 2 * (i % 3)],
            "sampling_weight": 0.0 if i in (4, 5) else 0.5,
        }
        for i in range(12)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "dataset" / "items.parquet")
    scenes = [{"first": 0, "second": 1, "weight": 0.6}, {"first": 2, "second": -1, "weight": 0.3}]
    pq.write_table(pa.Table.from_pylist(scenes), folder / "dataset" / "scenes.parquet")
    settings = params("autoencoder") | {"block_out_channels": [8, 8, 8, 8], "resolution": 64}
    vae = create_autoencoder(settings).eval()
    (folder / "autoencoder").mkdir()
    vae.save_pretrained(folder / "autoencoder" / "vae")
    latents = np.stack([encode_all(vae, images, mirrored=m) for m in (False, True)], axis=1)
    np.save(folder / "autoencoder" / "latents.npy", latents)
    np.save(folder / "autoencoder" / "scene_latents.npy", latents[:2] + 1)
    return folder


@pytest.fixture
def environment(tiny_data: Path) -> dict[str, str]:
    """Environment of a stage that reads and writes the tiny data folder."""
    return {
        **os.environ,
        "BACKBONE_DATA": str(tiny_data),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
