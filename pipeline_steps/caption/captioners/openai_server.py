"""Captioner `endpoint`: any OpenAI-compatible server (vLLM, SGLang, Ollama) with a vision-language model behind it."""

from __future__ import annotations

import asyncio
import base64
import difflib
import io
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self, TypeVar

from pipeline_steps.caption.captioners.base import CaptionResult, EventSelection
from pipeline_steps.caption.captioners.chat_client import (
    ChatClient,
    RequestRejectedError,
    ServerOptions,
    ServerUnavailableError,
)
from pipeline_steps.caption.captioners.prompt import (
    PROMPT_VERSION,
    VERDICT_SCHEMA,
    CaptionFailure,
    ResponseParseError,
    answer_schema,
    caption_prompt,
    parse_answer,
    parse_yes_no,
)
from pipeline_steps.caption.captioners.vlm_response import (
    VlmPromptOptions,
    VlmResponse,
    select_events,
    verification_prompts,
    with_verification,
)
from pipeline_steps.core.array_types import ByteArray
from pipeline_steps.core.errors import ConfigError, ServiceError
from pipeline_steps.models.base import SoundEvent

log = logging.getLogger(__name__)

KEY = "caption.endpoint"
Name = TypeVar("Name")


class OpenAIServerCaptioner:
    """`SoundCaptioner` by a server. Answers come as they come; each carries the name of its picture.

    Args:
        connection: address, model, key and limits.
        families: of the model's vision tower, as the user knows them; no judge may be of one.
        guided: what the server is asked to keep: json_schema, json_object or none.
        rules: how an answer becomes a caption.
        asking: how it is asked.
    """

    name = "endpoint"
    version = 1

    def __init__(
        self,
        connection: ServerOptions,
        families: Sequence[str] = (),
        guided: str = "json_schema",
        rules: EventSelection | None = None,
        asking: VlmPromptOptions | None = None,
    ) -> None:
        self.connection, self.guided = connection, guided
        self.rules, self.asking = rules or EventSelection(), asking or VlmPromptOptions()
        self._families = tuple(sorted(set(families)))

    @property
    def families(self) -> tuple[str, ...]:
        """The model's name and the families the user gave."""
        return tuple(sorted({*self._families, self.connection.model}))

    @property
    def family(self) -> str:
        """The families in one word."""
        return "+".join(self.families)

    def describe_answers(self) -> dict[str, Any]:
        """Everything but the picture that shapes an answer, as far as one can know it of a server: not where it stands."""
        asking = [self.asking.max_events, self.asking.max_new, self.asking.verify]
        prompt = {"version": PROMPT_VERSION, "text": caption_prompt(self.asking.max_events)}
        decoding = {"temperature": 0, "guided": self.guided}
        model = {"name": self.name, "version": self.version, "model": self.connection.model}
        return {**model, "asking": asking, **decoding, "prompt": prompt}

    def describe(self) -> dict[str, Any]:
        """`describe_answers`, the family, and the rules that turn an answer into a caption."""
        rules = [self.rules.max_events, self.rules.min_confidence, self.rules.min_share, self.asking.min_verified]
        return {**self.describe_answers(), "family": self.family, "rules": rules}

    def load(self) -> Self:
        """Check that the server is there, takes the key and serves the model, as far as it says.

        Raises:
            ConfigError: no key in the environment, the key is refused, or the model is not served.
            ServiceError: the server does not answer.
        """
        with asyncio.Runner() as runner:
            served = runner.run(self._served())
        if served and self.connection.model not in served:
            close = difflib.get_close_matches(self.connection.model, served, n=1)
            raise ConfigError(
                f"{KEY}.model: the server does not serve {self.connection.model}",
                f"did you mean {close[0]}?" if close else f"it serves {', '.join(served[:5])}",
            )
        return self

    async def _served(self) -> list[str]:
        async with ChatClient(self.connection) as client:
            return await client.models()

    def stream(self, pictures: Iterable[tuple[Name, ByteArray]]) -> Iterator[tuple[Name, VlmResponse | CaptionFailure]]:
        """Answers with the names of their pictures, in order of completion; `concurrency` pictures are on their way at a time.

        A picture that the server fails on while it answers others is that picture's trouble; a server that is away is not.

        Raises:
            ConfigError: the server refuses key, model or address.
            ServiceError: the server is away; what was yielded stays valid.
        """
        source = iter(pictures)
        tasks: dict[asyncio.Task[VlmResponse | CaptionFailure], Name] = {}
        with asyncio.Runner() as runner:
            loop = runner.get_loop()
            client = ChatClient(self.connection)
            runner.run(client.__aenter__())
            try:
                exhausted = False
                answered, unreached = False, 0
                while True:
                    while not exhausted and len(tasks) < self.connection.concurrency:
                        try:
                            name, picture = next(source)
                        except StopIteration:
                            exhausted = True
                        else:
                            tasks[loop.create_task(self._answer(client, picture))] = name
                    if not tasks:
                        break
                    done, _ = runner.run(_first(list(tasks)))
                    # What was answered is handed out before an error of a neighbour ends it all.
                    for task in sorted(done, key=lambda task: task.exception() is not None):
                        name = tasks.pop(task)
                        result = task.result()
                        if isinstance(result, CaptionFailure) and result.code == "CAPTION_UNREACHED":
                            unreached += 1
                            if unreached > self.connection.concurrency:
                                raise self._away(result.reason)
                        else:
                            answered, unreached = True, 0
                        yield name, result
                if unreached and not answered:
                    raise self._away(result.reason)
            finally:
                for task in tasks:
                    task.cancel()
                if tasks:
                    runner.run(_gather_ignoring_errors(list(tasks)))
                runner.run(client.__aexit__(None, None, None))

    def look(self, images: Sequence[ByteArray]) -> list[VlmResponse | CaptionFailure]:
        """Answer to each picture, in their order, or why there is none."""
        found = dict(self.stream(enumerate(images)))
        return [found[place] for place in range(len(images))]

    def caption(self, images: Sequence[ByteArray]) -> list[list[SoundEvent]]:
        """Events of each picture, most prominent first; an empty list when it suggests no sound or gave no answer."""
        answers = self.look(images)
        return [[] if isinstance(answer, CaptionFailure) else list(self.compose(answer).events) for answer in answers]

    def compose(self, answer: VlmResponse) -> CaptionResult:
        """The caption of an answer, with this captioner's rules."""
        return select_events(answer, self.rules, self.asking.min_verified)

    async def _answer(self, client: ChatClient, picture: ByteArray) -> VlmResponse | CaptionFailure:
        image = {"type": "image_url", "image_url": {"url": _data_url(picture)}}
        count = self.asking.max_events
        unreadable = ""
        try:
            for attempt in (1, 2):
                text, model = await self._say(
                    client, image, caption_prompt(count, unreadable), answer_schema(count), self.asking.max_new
                )
                try:
                    answer = VlmResponse(parse_answer(text, count), model, attempt)
                except ResponseParseError as error:
                    unreadable = str(error)
                    continue
                return await self._verified(client, image, answer) if self.asking.verify else answer
            return CaptionFailure("CAPTION_UNREADABLE", f"{unreadable}, twice; the answer begins: {text[:80]!r}")
        except RequestRejectedError as error:
            return CaptionFailure("CAPTION_REFUSED", str(error))
        except ServerUnavailableError as error:
            if await client.is_away():
                raise self._away(str(error)) from error
            return CaptionFailure("CAPTION_UNREACHED", str(error))

    def _away(self, reason: str) -> ServiceError:
        action = "start the server and run again; finished pictures are kept"
        return ServiceError(f"{KEY}.url: {self.connection.url} is away: {reason}", action, transient=True)

    async def _verified(self, client: ChatClient, image: dict[str, Any], answer: VlmResponse) -> VlmResponse | CaptionFailure:
        chances: list[float] = []
        for question in verification_prompts(answer):
            text, _ = await self._say(client, image, question, VERDICT_SCHEMA, 32)
            try:
                chances.append(1.0 if parse_yes_no(text) else 0.0)
            except ResponseParseError as error:
                return CaptionFailure("CAPTION_UNREADABLE", f"second question: {error}: {text[:80]!r}")
        return with_verification(answer, chances)

    async def _say(
        self, client: ChatClient, image: dict[str, Any], text: str, schema: dict[str, Any], max_new: int
    ) -> tuple[str, str]:
        body: dict[str, Any] = {
            "model": self.connection.model,
            "messages": [{"role": "user", "content": [image, {"type": "text", "text": text}]}],
            "max_tokens": max_new,
            "temperature": 0,
            "seed": 0,
        }
        if self.guided == "json_schema":
            described = {"name": "answer", "schema": schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": described}
        elif self.guided == "json_object":
            body["response_format"] = {"type": "json_object"}
        return await client.chat(body)


async def _first(tasks: list[asyncio.Task[Any]]) -> tuple[set[asyncio.Task[Any]], set[asyncio.Task[Any]]]:
    return await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


async def _gather_ignoring_errors(tasks: list[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


def _data_url(picture: ByteArray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
