"""Sentence encoder all-MiniLM-L6-v2 (Apache-2.0, https://arxiv.org/abs/2002.10957, fine-tuned by sentence-transformers)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from pipeline_steps.audio.log_mel import map_threads
from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.models.bundled_weights import BundledModel

LAYERS = 6
HEADS = 12
EPSILON = 1e-12
MAX_TOKENS = 256
"""Limit of the published model; longer texts are cut."""
BATCH_SIZE = 64
"""Texts per forward pass of `encode_batched`."""


class MiniLM(BundledModel):
    """Encoder of texts as unit vectors of 384 numbers; the inner product is the cosine similarity."""

    name = "minilm"
    family = "minilm"
    version = 2
    files = ("minilm.safetensors", "minilm_tokenizer.json")
    dimension = 384

    def _prepare(self, payloads: dict[str, bytes]) -> None:
        self._tokenizer = Tokenizer.from_str(payloads["minilm_tokenizer.json"].decode("utf-8"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(MAX_TOKENS)

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """Unit rows [N, 384]: mean over tokens of the last layer, L2-normalized.

        Texts are encoded one by one, each on one core, so a row's bytes depend neither on the other texts nor on the number of
        threads.
        """
        rows = map_threads(self._encode_one, texts, torch.get_num_threads())
        return np.stack(rows) if rows else np.zeros((0, self.dimension), np.float32)

    def encode_batched(self, texts: Sequence[str]) -> FloatArray:
        """Unit rows [N, 384] of a fixed list of texts, such as the names of tags; several times faster than one by one.

        A batch has texts with the same number of tokens, so there is no padding. A row depends on the other texts by rounding.
        """
        by_length: dict[int, list[int]] = {}
        tokens = [self._tokenizer.encode(text).ids for text in texts]
        for row, ids in enumerate(tokens):
            by_length.setdefault(len(ids), []).append(row)
        parts = [rows[at : at + BATCH_SIZE] for _, rows in sorted(by_length.items()) for at in range(0, len(rows), BATCH_SIZE)]
        encoded = map_threads(lambda part: self._forward([tokens[row] for row in part]), parts, torch.get_num_threads())
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        for part, found in zip(parts, encoded, strict=True):
            vectors[part] = found
        return vectors

    def _encode_one(self, text: str) -> FloatArray:
        row: FloatArray = self._forward([self._tokenizer.encode(text).ids])[0]
        return row

    @torch.inference_mode()
    def _forward(self, tokens: list[list[int]]) -> FloatArray:
        """Unit rows [B, 384] of token ids [B, T] without padding."""
        weights, ids = self.weights, torch.tensor(tokens, device=self.device)
        batch, length = ids.shape
        hidden = (
            weights["embeddings.word_embeddings.weight"][ids]
            + weights["embeddings.position_embeddings.weight"][:length]
            + weights["embeddings.token_type_embeddings.weight"][0]
        )
        hidden = self._norm(hidden, "embeddings.LayerNorm")
        for layer in range(LAYERS):
            prefix = f"encoder.layer.{layer}"
            query, key, value = (
                self._linear(hidden, f"{prefix}.attention.self.{part}").view(batch, length, HEADS, -1).transpose(1, 2)
                for part in ("query", "key", "value")
            )
            attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, length, -1)
            attended = self._linear(attended, f"{prefix}.attention.output.dense")
            hidden = self._norm(hidden + attended, f"{prefix}.attention.output.LayerNorm")
            widened = F.gelu(self._linear(hidden, f"{prefix}.intermediate.dense"))
            hidden = self._norm(hidden + self._linear(widened, f"{prefix}.output.dense"), f"{prefix}.output.LayerNorm")
        vectors: FloatArray = F.normalize(hidden.mean(1), dim=1).cpu().numpy()
        return vectors

    def _linear(self, inputs: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(inputs, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, inputs: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(inputs, inputs.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], EPSILON)
