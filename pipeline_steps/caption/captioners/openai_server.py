"""Captioner `openai_server`: a vision-language model on an OpenAI-compatible server (vLLM, SGLang, Ollama, llama.cpp)."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

from pipeline_steps.caption.captioners.base import CAPTIONERS, CaptionFailure, Name
from pipeline_steps.caption.captioners.chat_client import (
    KEY,
    ChatClient,
    NoResponseError,
    OpenAIServerConfig,
    RequestRejectedError,
    ServerUnavailableError,
)
from pipeline_steps.caption.captioners.prompt import (
    YES_NO_SCHEMA,
    ResponseParseError,
    parse_yes_no,
)
from pipeline_steps.caption.captioners.vlm_response import (
    GenerativeCaptioner,
    VlmResponse,
    verification_prompts,
    with_verification,
)
from pipeline_steps.core.array_types import ByteArray
from pipeline_steps.core.errors import ConfigError, ServiceError, suggest_name


@CAPTIONERS.register("openai_server")
class OpenAIServerCaptioner(GenerativeCaptioner):
    """Captioner from an OpenAI-compatible server; responses arrive in any order, each with the name of its image."""

    config_class = OpenAIServerConfig
    name = "endpoint"  # former name of this captioner; part of the fingerprint of existing caches
    version = 1

    @classmethod
    def check_config(cls, config: OpenAIServerConfig, executor: str) -> None:
        if not config.model:
            raise ValueError("openai_server.model is empty; captioner 'openai_server' requires the model name on the server")
        if executor != "local":
            raise ValueError(
                f"executor is {executor!r}; captioner 'openai_server' requires 'local', because its limits apply per process"
            )

    @property
    def families(self) -> tuple[str, ...]:
        """Model name and configured families."""
        return tuple(sorted({*self.config.vision_families, self.config.model}))

    @property
    def families_complete(self) -> bool:
        return len(self.families) > 1

    def describe_prediction(self) -> dict[str, Any]:
        # Without the address: the same model may be served elsewhere.
        decoding = {"temperature": 0, "guided": self.config.response_format}
        if self.config.extra_body:
            decoding["extra"] = self.config.extra_body
        model = {"name": self.name, "version": self.version, "model": self.config.model}
        return {**model, **decoding, **self.describe_prompt()}

    def load(self) -> Self:
        """Check that the server is available, accepts the key and serves the model, if it lists its models.

        Raises:
            ConfigError: the key is missing or rejected, or the model is not served.
            ServiceError: the server does not answer.
        """
        with asyncio.Runner() as runner:
            served = runner.run(self._served_models())
        model = self.config.model
        if served and model not in served:
            action = suggest_name(model, served, f"choose one of {', '.join(served[:5])}")
            raise ConfigError(f"{KEY}.model: the server does not serve {model}", action)
        return self

    async def _served_models(self) -> list[str]:
        async with ChatClient(self.config) as client:
            return await client.models()

    def stream(
        self, images: Iterable[tuple[Name, ByteArray]], texts: Mapping[Name, str] | None = None
    ) -> Iterator[tuple[Name, VlmResponse | CaptionFailure]]:
        """Responses with the names of their images, in order of completion, from `concurrency` concurrent requests.

        An error is a failure of one image if the server answers for other images; otherwise the server is unavailable.

        Raises:
            ConfigError: the server rejects key, model or address.
            ServiceError: the server is unavailable; results yielded before stay valid.
        """
        source = iter(images)
        tasks: dict[asyncio.Task[VlmResponse | CaptionFailure], Name] = {}
        concurrency = self.config.concurrency
        with asyncio.Runner() as runner:
            loop = runner.get_loop()
            client = ChatClient(self.config)
            runner.run(client.__aenter__())
            try:
                exhausted = False
                answered, unreached = False, 0
                while True:
                    while not exhausted and len(tasks) < concurrency:
                        try:
                            name, image = next(source)
                        except StopIteration:
                            exhausted = True
                        else:
                            words = (texts or {}).get(name, "")
                            tasks[loop.create_task(self._respond(client, image, words))] = name
                    if not tasks:
                        break
                    done, _ = runner.run(_first_completed(list(tasks)))
                    # Completed responses are yielded before the error of another request is raised.
                    for task in sorted(done, key=lambda task: task.exception() is not None):
                        name = tasks.pop(task)
                        result = task.result()
                        if isinstance(result, CaptionFailure) and result.code == "CAPTION_UNREACHED":
                            unreached += 1
                            if unreached > concurrency:
                                raise self._unavailable_error(result.reason)
                        else:
                            answered, unreached = True, 0
                        yield name, result
                if unreached and not answered:
                    raise self._unavailable_error(result.reason)
            finally:
                for task in tasks:
                    task.cancel()
                if tasks:
                    runner.run(_gather_ignoring_errors(list(tasks)))
                runner.run(client.__aexit__(None, None, None))

    def predict(self, images: Sequence[ByteArray]) -> list[VlmResponse | CaptionFailure]:
        results = dict(self.stream(enumerate(images)))
        return [results[place] for place in range(len(images))]

    async def _respond(self, client: ChatClient, pixels: ByteArray, words: str) -> VlmResponse | CaptionFailure:
        image = {"type": "image_url", "image_url": {"url": _data_url(pixels)}}
        prompt = self.options.prompt
        parse_error = ""
        try:
            for attempt in (1, 2):
                text, model = await self._chat(
                    client, image, self.prompt(words, parse_error), self.response_schema, prompt.max_new_tokens
                )
                try:
                    response = self.parse(text, model, attempt)
                except ResponseParseError as error:
                    parse_error = str(error)
                    continue
                return await self._verify(client, image, response) if prompt.verify_events else response
            return CaptionFailure("CAPTION_UNREADABLE", f"{parse_error}, twice; the response begins: {text[:80]!r}")
        except RequestRejectedError as error:
            return CaptionFailure("CAPTION_REFUSED", str(error))
        except NoResponseError as error:
            return CaptionFailure("CAPTION_UNREADABLE", str(error))
        except ServerUnavailableError as error:
            if await client.is_unavailable():
                raise self._unavailable_error(str(error)) from error
            return CaptionFailure("CAPTION_UNREACHED", str(error))

    def _unavailable_error(self, reason: str) -> ServiceError:
        action = "start the server and run again; finished images are in the cache"
        return ServiceError(f"{KEY}.url: {self.config.url} is unavailable: {reason}", action, transient=True)

    async def _verify(self, client: ChatClient, image: dict[str, Any], response: VlmResponse) -> VlmResponse | CaptionFailure:
        probabilities: list[float] = []
        for question in verification_prompts(response):
            text, _ = await self._chat(client, image, question, YES_NO_SCHEMA, 32)
            try:
                probabilities.append(1.0 if parse_yes_no(text) else 0.0)
            except ResponseParseError as error:
                return CaptionFailure("CAPTION_UNREADABLE", f"second question: {error}: {text[:80]!r}")
        return with_verification(response, probabilities)

    async def _chat(
        self, client: ChatClient, image: dict[str, Any], text: str, schema: dict[str, Any], max_tokens: int
    ) -> tuple[str, str]:
        body: dict[str, Any] = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": [image, {"type": "text", "text": text}]}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "seed": 0,
            **self.config.extra_body,
        }
        if self.config.response_format == "json_schema":
            named = {"name": "answer", "schema": schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        elif self.config.response_format == "json_object":
            body["response_format"] = {"type": "json_object"}
        return await client.chat(body)


async def _first_completed(tasks: list[asyncio.Task[Any]]) -> tuple[set[asyncio.Task[Any]], set[asyncio.Task[Any]]]:
    return await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


async def _gather_ignoring_errors(tasks: list[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


def _data_url(pixels: ByteArray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
