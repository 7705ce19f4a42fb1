"""Decoding that can only write JSON of a schema. The grammar engine is llguidance's; here it meets transformers' `generate`."""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import LogitsProcessor

from pipeline_steps.core.errors import ConfigError


class JsonSchemaGrammar:
    """A schema compiled against a tokenizer; `processor` gives a fresh state for each call of `generate`.

    Args:
        tokenizer: fast tokenizer of the model.
        schema: JSON schema.

    Raises:
        ConfigError: llguidance is not installed, or cannot work with this tokenizer or schema.
    """

    def __init__(self, tokenizer: Any, schema: dict[str, Any]) -> None:
        try:
            import llguidance
            import llguidance.hf
        except ImportError as error:
            raise ConfigError(
                "caption.vlm.constrain needs llguidance, which is not installed",
                "pip install 'seeing-sound[vlm]', or set caption.vlm.constrain: false",
            ) from error
        # No free white space: a model that likes blanks would fill its answer with them.
        self._grammar = llguidance.LLMatcher.grammar_from_json_schema(
            json.dumps(schema), overrides={"whitespace_flexible": False}
        )
        try:
            self._tokenizer = llguidance.hf.from_tokenizer(tokenizer)
        except ValueError as error:
            raise ConfigError(f"caption.vlm.constrain: {error}", "set caption.vlm.constrain: false") from error
        problem = llguidance.LLMatcher.validate_grammar(self._grammar, self._tokenizer)
        if problem:
            raise ConfigError(f"caption.vlm.constrain: {problem}", "set caption.vlm.constrain: false")

    def processor(self, batch: int) -> LogitsProcessor:
        """State for one call of `generate` on `batch` prompts."""
        from llguidance import LLMatcher

        return _GrammarLogitsProcessor(
            [LLMatcher(self._tokenizer, self._grammar) for _ in range(batch)], self._tokenizer.eos_token
        )


class _GrammarLogitsProcessor(LogitsProcessor):  # type: ignore[misc]
    def __init__(self, matchers: list[Any], eos: int) -> None:
        self._matchers = matchers
        self._eos = eos
        self._mask: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import llguidance.torch

        if self._mask is None:
            words = (scores.shape[1] + 31) // 32
            self._mask = torch.zeros((len(self._matchers), words), dtype=torch.int32)
        else:
            for matcher, token in zip(self._matchers, input_ids[:, -1].tolist(), strict=True):
                if not matcher.is_stopped():
                    matcher.consume_token(token)
        self._mask.zero_()  # beyond the tokenizer's vocabulary nothing is allowed
        for row, matcher in enumerate(self._matchers):
            if matcher.is_stopped():
                self._mask[row, self._eos // 32] = _bit(self._eos % 32)
            else:
                llguidance.torch.fill_next_token_bitmask(matcher, self._mask, row)
        bits = torch.arange(32, dtype=torch.int32, device=scores.device)
        allowed = (self._mask.to(scores.device, non_blocking=True)[:, :, None] >> bits) & 1
        return scores.masked_fill(allowed.flatten(1)[:, : scores.shape[1]] == 0, float("-inf"))


def _bit(place: int) -> int:
    """2 ** place as a signed 32-bit number."""
    return (1 << place) - (1 << 32 if place == 31 else 0)
