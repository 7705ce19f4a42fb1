"""Captioner `vlm`: any image-text-to-text model of transformers, asked for sound events as JSON."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from pipeline_steps.caption.captioners.base import CaptionResult, EventSelection
from pipeline_steps.caption.captioners.prompt import (
    PROMPT_VERSION,
    CaptionFailure,
    ResponseParseError,
    answer_schema,
    caption_prompt,
    parse_answer,
)
from pipeline_steps.caption.captioners.vlm_processor import load_processor
from pipeline_steps.caption.captioners.vlm_response import (
    VlmPromptOptions,
    VlmResponse,
    select_events,
    verification_prompts,
    with_verification,
)
from pipeline_steps.core.array_types import ByteArray
from pipeline_steps.core.errors import ConfigError, IntegrityError, ResourceError
from pipeline_steps.models.base import SoundEvent
from pipeline_steps.models.hub_checkpoint import HubModel, check_checkpoint, resolve_device, resolve_dtype, vision_families

log = logging.getLogger(__name__)

KEY = "caption.vlm"
YES = ("yes", "Yes", "YES", " yes", " Yes")
NO = ("no", "No", "NO", " no", " No")


class VlmCaptioner(HubModel):
    """`SoundCaptioner` by a vision-language model (LLaVA, Qwen-VL, SmolVLM and other families).

    Greedy decoding, left padding, weights from safetensors alone, no code of the checkpoint.

    Args:
        model: hub id or local folder.
        revision: commit of a hub id; sha256 of a folder, checked when given.
        rules: how an answer becomes a caption.
        asking: how it is asked.
        device: auto, cpu or cuda.
        precision: auto (bfloat16 on GPU, float32 on CPU), float32, bfloat16 or float16.
        constrain: whether decoding is bound to the JSON schema.
    """

    name = "vlm"
    version = 1

    def __init__(
        self,
        model: str,
        revision: str = "",
        rules: EventSelection | None = None,
        asking: VlmPromptOptions | None = None,
        device: str = "auto",
        precision: str = "auto",
        constrain: bool = True,
    ) -> None:
        super().__init__(model, revision, KEY)
        self.rules, self.asking = rules or EventSelection(), asking or VlmPromptOptions()
        self.constrain = constrain
        self.device = resolve_device(device, KEY)
        self.precision = resolve_dtype(precision, self.device)
        self._config: dict[str, Any] = {}
        self._model: Any = None
        self._processor: Any = None
        self._constraint: Any = None
        self._options: Any = None

    def _accept(self, folder: Path) -> None:
        self._config = check_checkpoint(folder)

    @property
    def families(self) -> tuple[str, ...]:
        """Families of the model and of its vision tower: none of them may judge pictures later."""
        self.fetch()
        return vision_families(self._config)

    @property
    def family(self) -> str:
        """The families in one word."""
        return "+".join(self.families)

    def describe_answers(self) -> dict[str, Any]:
        """Everything but the picture that shapes an answer."""
        asking = [self.asking.max_events, self.asking.max_new, self.asking.verify]
        decoding = {"sample": False, "precision": self.precision, "constrain": self.constrain}
        prompt = {"version": PROMPT_VERSION, "text": caption_prompt(self.asking.max_events)}
        return {"name": self.name, "version": self.version, **self.identity, "asking": asking, **decoding, "prompt": prompt}

    def describe(self) -> dict[str, Any]:
        """`describe_answers`, the family, and the rules that turn an answer into a caption."""
        rules = [self.rules.max_events, self.rules.min_confidence, self.rules.min_share, self.asking.min_verified]
        return {**self.describe_answers(), "family": self.family, "rules": rules}

    def load(self) -> Self:
        """Load processor and weights; calling it again does nothing.

        Raises:
            ConfigError: no image-text-to-text model of a kind that transformers knows.
            IntegrityError: weights are missing or have another shape than the configuration says.
        """
        if self._model is not None:
            return self
        from safetensors import SafetensorError
        from transformers import AutoModelForImageTextToText, GenerationConfig

        folder = self.fetch()
        self._processor = load_processor(folder, str(self._config.get("model_type")))
        try:
            model, info = AutoModelForImageTextToText.from_pretrained(
                folder,
                dtype=getattr(torch, self.precision),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
        except (ValueError, KeyError, ImportError) as error:
            raise ConfigError(
                f"{KEY}.model: {' '.join(str(error).split())[:300]}", "choose an image-text-to-text model of transformers"
            ) from error
        except (OSError, RuntimeError, SafetensorError) as error:  # the last: a header that lies
            reason = f"{KEY}.model: the weights cannot be loaded: {' '.join(str(error).split())[:300]}"
            raise IntegrityError(reason, "fetch the checkpoint again") from error
        absent = sorted([*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])])
        if absent:  # transformers would draw them at random and go on
            raise IntegrityError(
                f"{KEY}.model: {len(absent)} weights are not in the checkpoint (first: {absent[0]})", "fetch it again"
            )
        self._model = model.to(self.device).eval()
        tokenizer = self._processor.tokenizer
        ends = (
            model.generation_config.eos_token_id if model.generation_config.eos_token_id is not None else tokenizer.eos_token_id
        )
        # A checkpoint's own sampling settings must not leak in: only what is described here shapes an answer.
        self._options = GenerationConfig(
            do_sample=False, max_new_tokens=self.asking.max_new, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
        )
        if self.constrain:
            from pipeline_steps.caption.captioners.json_decoding import JsonSchemaGrammar

            self._constraint = JsonSchemaGrammar(tokenizer, answer_schema(self.asking.max_events))
        return self

    def look(self, images: Sequence[ByteArray]) -> list[VlmResponse | CaptionFailure]:
        """Answer to each picture, or why there is none. An answer that cannot be read is asked for once more."""
        results: list[VlmResponse | CaptionFailure] = []
        for image, text in zip(images, self._ask(images, [caption_prompt(self.asking.max_events)] * len(images)), strict=True):
            results.append(self._read(image, text))
        if self.asking.verify:
            self._verify(images, results)
        return results

    def caption(self, images: Sequence[ByteArray]) -> list[list[SoundEvent]]:
        """Events of each picture, most prominent first; an empty list when it suggests no sound or gave no answer."""
        answers = self.look(images)
        return [[] if isinstance(answer, CaptionFailure) else list(self.compose(answer).events) for answer in answers]

    def compose(self, answer: VlmResponse) -> CaptionResult:
        """The caption of an answer, with this captioner's rules."""
        return select_events(answer, self.rules, self.asking.min_verified)

    def _read(self, image: ByteArray, text: str) -> VlmResponse | CaptionFailure:
        count = self.asking.max_events
        try:
            return VlmResponse(parse_answer(text, count), self.model_name)
        except ResponseParseError as error:
            first = str(error)
        again = self._ask([image], [caption_prompt(count, first)])[0]
        try:
            return VlmResponse(parse_answer(again, count), self.model_name, 2)
        except ResponseParseError as error:
            return CaptionFailure("CAPTION_UNREADABLE", f"{error}, twice; the answer begins: {again[:80]!r}")

    @property
    def model_name(self) -> str:
        """Who answered: hub id and commit, or a folder's digest. Never a path."""
        return "@".join(self._identity.values())

    def _verify(self, images: Sequence[ByteArray], results: list[VlmResponse | CaptionFailure]) -> None:
        asked = [
            (place, text)
            for place, it in enumerate(results)
            if isinstance(it, VlmResponse)
            for text in verification_prompts(it)
        ]
        chances: list[float] = []
        for start in range(0, len(asked), max(1, len(images))):
            part = asked[start : start + max(1, len(images))]
            chances += self._halving(self._chances, [images[place] for place, _ in part], [text for _, text in part])
        given = iter(chances)
        for place, it in enumerate(results):
            if isinstance(it, VlmResponse):
                results[place] = with_verification(it, [next(given) for _ in it.heard])

    def _ask(self, images: Sequence[ByteArray], texts: Sequence[str]) -> list[str]:
        return self._halving(self._generate, images, texts)

    def _halving(self, function: Callable[..., list[Any]], images: Sequence[ByteArray], texts: Sequence[str]) -> list[Any]:
        """`function(images, texts)`, on halves when the GPU's memory does not hold the whole batch."""
        if not len(images):
            return []
        try:
            results = function(images, texts)
        except torch.OutOfMemoryError as error:
            if len(images) == 1:
                raise ResourceError("GPU memory does not hold one picture", "choose a smaller model or a larger GPU") from error
        else:
            if len(results) != len(images):  # a shifted caption would be worse than none
                raise RuntimeError(f"the model gave {len(results)} results for {len(images)} pictures")
            return results
        torch.cuda.empty_cache()
        half = len(images) // 2
        log.warning("GPU memory is short: a batch of %d goes through in halves; lower caption.batch_size", len(images))
        return self._halving(function, images[:half], texts[:half]) + self._halving(function, images[half:], texts[half:])

    def _inputs(self, images: Sequence[ByteArray], texts: Sequence[str]) -> Any:
        from PIL import Image

        content = [[{"type": "image"}, {"type": "text", "text": text}] for text in texts]
        prompts = [
            self._processor.apply_chat_template([{"role": "user", "content": part}], add_generation_prompt=True, tokenize=False)
            for part in content
        ]
        pictures = [[Image.fromarray(image)] for image in images]
        inputs = self._processor(text=prompts, images=pictures, padding=True, return_tensors="pt")
        return inputs.to(self.device, dtype=getattr(torch, self.precision))

    @torch.inference_mode()
    def _generate(self, images: Sequence[ByteArray], texts: Sequence[str]) -> list[str]:
        inputs = self._inputs(images, texts)
        processors = [self._constraint.processor(len(images))] if self._constraint is not None else []
        written = self._model.generate(**inputs, generation_config=self._options, logits_processor=processors)
        answers = written[:, inputs["input_ids"].shape[1] :]
        return list(self._processor.tokenizer.batch_decode(answers, skip_special_tokens=True))

    @torch.inference_mode()
    def _chances(self, images: Sequence[ByteArray], texts: Sequence[str]) -> list[float]:
        """Probability of yes against no as the next word, per picture and question."""
        tokenizer = self._processor.tokenizer
        firsts = [{tokenizer.encode(word, add_special_tokens=False)[0] for word in words} for words in (YES, NO)]
        yes, no = sorted(firsts[0] - firsts[1]), sorted(firsts[1] - firsts[0])
        logits = self._model(**self._inputs(images, texts), logits_to_keep=1).logits[:, -1].float()
        shares = torch.stack([torch.logsumexp(logits[:, words], dim=1) for words in (yes, no)], dim=1)
        return [float(chance) for chance in shares.softmax(dim=1)[:, 0]]
