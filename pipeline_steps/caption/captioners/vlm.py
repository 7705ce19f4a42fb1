"""Captioner `vlm`: an image-text-to-text model of transformers, prompted for sound events as JSON."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import Field

from pipeline_steps.caption.captioners.base import CAPTIONERS, CaptionFailure, CaptionOptions
from pipeline_steps.caption.captioners.prompt import ResponseParseError
from pipeline_steps.caption.captioners.vlm_processor import check_model_type, load_processor
from pipeline_steps.caption.captioners.vlm_response import (
    GenerativeCaptioner,
    VlmResponse,
    verification_prompts,
    with_verification,
)
from pipeline_steps.core.array_types import ByteArray
from pipeline_steps.core.config import StageConfig
from pipeline_steps.core.gpu_memory import gpu_memory_guard, is_out_of_memory
from pipeline_steps.models.hub_checkpoint import (
    HubModel,
    check_checkpoint,
    load_weights,
    resolve_device,
    resolve_dtype,
    vision_families,
)

log = logging.getLogger(__name__)

Output = TypeVar("Output")

KEY = "caption.vlm"
MEMORY_KEYS = f"{KEY}.model, {KEY}.dtype, ingest.image.max_side"
"""Parameters that determine the memory of a batch of one image."""
MORE_MEMORY = "choose a smaller model or a larger GPU, or set caption.captioner to openai_server"
_OPEN_THOUGHT = re.compile(r"<think>\s*$")
YES = ("yes", "Yes", "YES", " yes", " Yes")
NO = ("no", "No", "NO", " no", " No")


class VlmConfig(StageConfig):
    """Group `caption.vlm`."""

    model: str = Field(default="", max_length=500, description="hub id or local folder")
    revision: str = Field(
        default="",
        max_length=64,
        description="commit of a hub id (40 hex digits), or sha256 of a folder (64), which is checked if given",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if there is one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(default="auto", description="auto: bfloat16 on a GPU")
    constrained_decoding: bool = Field(default=True, description="decode by the JSON schema (requires the extra `vlm`)")


@CAPTIONERS.register("vlm")
class VlmCaptioner(GenerativeCaptioner, HubModel):
    """Captioner from a vision-language model whose type is one of `vlm_processor.MODEL_TYPES`.

    Decoding is greedy with left padding. Code of the checkpoint is not executed.
    """

    config_class = VlmConfig
    name = "vlm"
    version = 2

    def __init__(self, config: VlmConfig, options: CaptionOptions) -> None:
        GenerativeCaptioner.__init__(self, config, options)
        HubModel.__init__(self, config.model, config.revision, KEY, options.root)
        self.device = resolve_device(config.device, KEY)
        self.dtype = resolve_dtype(config.dtype, self.device)
        self._model_config: dict[str, Any] = {}
        self._model: Any = None
        self._processor: Any = None
        self._grammar: Any = None
        self._fitting_batch: dict[str, int] = {}

    @classmethod
    def check_config(cls, config: VlmConfig, executor: str) -> None:
        if not config.model:
            raise ValueError("vlm.model is empty; captioner 'vlm' requires a hub id or a folder")

    def _accept(self, folder: Path) -> None:
        self._model_config = check_checkpoint(folder)
        check_model_type(str(self._model_config.get("model_type")))

    @property
    def families(self) -> tuple[str, ...]:
        """Families of the model and of its vision tower."""
        self.fetch()
        return vision_families(self._model_config)

    def describe_prediction(self) -> dict[str, Any]:
        decoding = {"sample": False, "precision": self.dtype, "constrain": self.config.constrained_decoding}
        return {"name": self.name, "version": self.version, **self.identity, **decoding, **self.describe_prompt()}

    def load(self) -> Self:
        """Load processor and weights; repeated calls have no effect.

        Raises:
            ConfigError: the type of the checkpoint is not supported, or a file of its processor is missing.
            IntegrityError: weights are missing, damaged or have another shape than the configuration.
            ResourceError: the weights do not fit into GPU memory.
        """
        if self._model is not None:
            return self
        import torch
        from transformers import AutoModelForImageTextToText, GenerationConfig

        folder = self.fetch()
        self._processor = load_processor(folder, str(self._model_config.get("model_type")))
        model = load_weights(AutoModelForImageTextToText, folder, KEY, getattr(torch, self.dtype))
        with gpu_memory_guard(MEMORY_KEYS, MORE_MEMORY):
            model = model.to(self.device).eval()
        tokenizer = self._processor.tokenizer
        stop = model.generation_config.eos_token_id
        stop_ids = sorted({tokenizer.eos_token_id, *(stop if isinstance(stop, list) else [stop])} - {None})
        # `generate` fills every unset value from the model's own configuration (repetition penalty, beams, suppressed tokens).
        # So that is replaced: only settings in the fingerprint may change a response.
        model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.options.prompt.max_new_tokens,
            eos_token_id=stop_ids,
            pad_token_id=tokenizer.pad_token_id,
        )
        if self.config.constrained_decoding:
            from pipeline_steps.caption.captioners.json_decoding import JsonSchemaGrammar

            width = model.get_output_embeddings().weight.shape[0]
            self._grammar = JsonSchemaGrammar(tokenizer, self.response_schema, width, stop_ids)
        self._model = model
        return self

    def predict(self, images: Sequence[ByteArray]) -> list[VlmResponse | CaptionFailure]:
        """Response for each image, or a failure. An image whose response cannot be parsed is prompted once more."""
        return self.predict_with_text(images, [""] * len(images))

    def predict_with_text(self, images: Sequence[ByteArray], texts: Sequence[str]) -> list[VlmResponse | CaptionFailure]:
        responses = self._prompt_model(images, [self.prompt(words) for words in texts])
        results = [self._parse(*one) for one in zip(images, texts, responses, strict=True)]
        if self.options.prompt.verify_events:
            self._verify(images, results)
        return results

    def _parse(self, image: ByteArray, words: str, text: str) -> VlmResponse | CaptionFailure:
        try:
            return self.parse(text, self._model_name)
        except ResponseParseError as error:
            retry_prompt = self.prompt(words, str(error))
        text = self._prompt_model([image], [retry_prompt])[0]
        try:
            return self.parse(text, self._model_name, 2)
        except ResponseParseError as error:
            return CaptionFailure("CAPTION_UNREADABLE", f"{error}, twice; the response begins: {text[:80]!r}")

    @property
    def _model_name(self) -> str:
        """Hub id and commit, or digest of a folder; never a path."""
        return "@".join(self.identity.values())

    def _verify(self, images: Sequence[ByteArray], results: list[VlmResponse | CaptionFailure]) -> None:
        """Add the probabilities of yes to the responses, in place; questions are processed in batches of `len(images)`."""
        questions = [
            (place, text)
            for place, result in enumerate(results)
            if isinstance(result, VlmResponse)
            for text in verification_prompts(result)
        ]
        probabilities: list[float] = []
        for start in range(0, len(questions), max(1, len(images))):
            batch = questions[start : start + max(1, len(images))]
            batch_images, texts = [images[place] for place, _ in batch], [text for _, text in batch]
            probabilities += self._in_fitting_batches(self._yes_probabilities, batch_images, texts)
        remaining = iter(probabilities)
        for place, result in enumerate(results):
            if isinstance(result, VlmResponse):
                results[place] = with_verification(result, [next(remaining) for _ in result.events])

    def _prompt_model(self, images: Sequence[ByteArray], texts: Sequence[str]) -> list[str]:
        return self._in_fitting_batches(self._generate, images, texts)

    def _in_fitting_batches(
        self,
        function: Callable[[Sequence[ByteArray], Sequence[str]], list[Output]],
        images: Sequence[ByteArray],
        texts: Sequence[str],
    ) -> list[Output]:
        """Results of `function(images, texts)`, in batches that fit into GPU memory.

        A batch that does not fit is split in halves, and no later batch is larger than the half.
        """
        import torch

        results: list[Output] = []
        while len(results) < len(images):
            limit = self._fitting_batch.get(function.__name__, len(images))
            batch = slice(len(results), min(len(results) + limit, len(images)))
            size = batch.stop - batch.start
            try:
                found = function(images[batch], texts[batch])
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    with gpu_memory_guard(MEMORY_KEYS, MORE_MEMORY):
                        raise
                found = None
            if found is None:  # outside of the handler, whose traceback holds the tensors of the failed batch
                torch.cuda.empty_cache()
                self._fitting_batch[function.__name__] = half = size // 2
                log.warning("GPU out of memory: batches of %d images are used; lower caption.batch_size from %d", half, size)
                continue
            if len(found) != size:  # results could no longer be matched to images
                raise RuntimeError(f"the model returned {len(found)} results for {size} images")
            results += found
        return results

    def _encode(self, images: Sequence[ByteArray], texts: Sequence[str]) -> Any:
        import torch
        from PIL import Image

        content = [[{"type": "image"}, {"type": "text", "text": text}] for text in texts]
        prompts = [self._render([{"role": "user", "content": part}]) for part in content]
        bos = self._processor.tokenizer.bos_token
        inputs = self._processor(
            text=prompts,
            images=[[Image.fromarray(image)] for image in images],
            padding=True,
            return_tensors="pt",
            add_special_tokens=not (bos and prompts[0].startswith(bos)),  # templates of Gemma and Llama begin with it
        )
        return inputs.to(self.device, dtype=getattr(torch, self.dtype))

    def _render(self, messages: list[dict[str, Any]]) -> str:
        """Prompt in the format of the checkpoint, with thinking switched off.

        A template that opens a thought in every prompt gets an empty one: constrained decoding starts after it.
        """
        switch = {"enable_thinking": False} if "enable_thinking" in str(self._processor.chat_template) else {}
        prompt: str = self._processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **switch)
        return _OPEN_THOUGHT.sub("<think>\n\n</think>\n\n", prompt)

    def _generate(self, images: Sequence[ByteArray], texts: Sequence[str]) -> list[str]:
        import torch

        with torch.inference_mode():
            inputs = self._encode(images, texts)
            processors = [self._grammar.processor(len(images))] if self._grammar is not None else []
            output = self._model.generate(**inputs, logits_processor=processors)
        responses = output[:, inputs["input_ids"].shape[1] :]
        return list(self._processor.tokenizer.batch_decode(responses, skip_special_tokens=True))

    def _yes_probabilities(self, images: Sequence[ByteArray], texts: Sequence[str]) -> list[float]:
        """Probability of yes, against no, as the next token of each prompt."""
        import torch

        tokenizer = self._processor.tokenizer
        first_tokens = [{tokenizer.encode(word, add_special_tokens=False)[0] for word in words} for words in (YES, NO)]
        yes, no = sorted(first_tokens[0] - first_tokens[1]), sorted(first_tokens[1] - first_tokens[0])
        with torch.inference_mode():
            logits = self._model(**self._encode(images, texts), logits_to_keep=1).logits[:, -1].float()
            scores = torch.stack([torch.logsumexp(logits[:, words], dim=1) for words in (yes, no)], dim=1)
        return [float(probability) for probability in scores.softmax(dim=1)[:, 0]]
