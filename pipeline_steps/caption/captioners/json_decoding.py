"""Constrained decoding by a JSON schema: llguidance as a logits processor of transformers' `generate`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pipeline_steps.core.errors import ConfigError

if TYPE_CHECKING:
    import torch

KEY = "caption.vlm.constrained_decoding"
DISABLE = f"set {KEY}: false"


class JsonSchemaGrammar:
    """JSON schema compiled for a tokenizer.

    Args:
        tokenizer: fast tokenizer of the model.
        schema: JSON schema.
        width: scores per token position. Published models pad their output layer beyond the tokenizer's vocabulary.
        eos_token_ids: tokens that end a response.

    Raises:
        ConfigError: llguidance is not installed, or does not support the tokenizer or the schema.
    """

    def __init__(self, tokenizer: Any, schema: dict[str, Any], width: int, eos_token_ids: list[int]) -> None:
        try:
            import llguidance
            import llguidance.hf
        except ImportError as error:
            raise ConfigError(
                f"{KEY} is true, but llguidance is not installed", f"pip install 'seeing-sound[vlm]', or {DISABLE}"
            ) from error
        # Flexible white space is excluded: a model could fill its response with blanks.
        self._grammar = llguidance.LLMatcher.grammar_from_json_schema(
            json.dumps(schema), overrides={"whitespace_flexible": False}
        )
        try:
            self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=width, eos_token=eos_token_ids)
        except ValueError as error:
            raise ConfigError(f"{KEY}: {error}", DISABLE) from error
        problem = llguidance.LLMatcher.validate_grammar(self._grammar, self._tokenizer)
        if problem:
            raise ConfigError(f"{KEY}: {problem}", DISABLE)

    def processor(self, batch_size: int) -> GrammarLogitsProcessor:
        """Logits processor for one call of `generate` on `batch_size` prompts."""
        from llguidance import LLMatcher

        matchers = [LLMatcher(self._tokenizer, self._grammar) for _ in range(batch_size)]
        return GrammarLogitsProcessor(matchers, self._tokenizer.eos_token)


class GrammarLogitsProcessor:
    """Logits processor (transformers calls it by its signature) that masks all tokens which the grammar does not allow."""

    def __init__(self, matchers: list[Any], eos: int) -> None:
        self._matchers = matchers
        self._eos = eos
        self._mask: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import llguidance.torch
        import torch

        if self._mask is None:
            words = (scores.shape[1] + 31) // 32
            self._mask = torch.zeros((len(self._matchers), words), dtype=torch.int32)
        else:
            for matcher, token in zip(self._matchers, input_ids[:, -1].tolist(), strict=True):
                if not matcher.is_stopped():
                    matcher.consume_token(token)
        self._mask.zero_()  # entries beyond the tokenizer's vocabulary stay masked
        for row, matcher in enumerate(self._matchers):
            if matcher.is_stopped():
                self._mask[row, self._eos // 32] = _signed_bit(self._eos % 32)
            else:
                llguidance.torch.fill_next_token_bitmask(matcher, self._mask, row)
        bits = torch.arange(32, dtype=torch.int32, device=scores.device)
        allowed = (self._mask.to(scores.device, non_blocking=True)[:, :, None] >> bits) & 1
        return scores.masked_fill(allowed.flatten(1)[:, : scores.shape[1]] == 0, float("-inf"))


def _signed_bit(place: int) -> int:
    """2 ** place as a signed 32-bit integer."""
    return (1 << place) - (1 << 32 if place == 31 else 0)
