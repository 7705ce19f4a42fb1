"""HTTP client of an OpenAI-compatible server: rate limit, retries with jitter, dialects, classification of errors."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from time import time
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import httpx
from pydantic import Field
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from pipeline_steps.core.config import StageConfig
from pipeline_steps.core.errors import ConfigError, ServiceError

Value = TypeVar("Value")

KEY = "caption.openai_server"
MAX_BODY = 4_000_000
MAX_WAIT = 60.0
"""Maximum random delay in seconds; a pause requested by the server (Retry-After) is limited to ten times that."""
OPTIONAL_PARAMETERS = ("max_tokens", "temperature", "seed")
"""Parameters of a request that some models reject; current OpenAI models reject the first two."""
_UNSUPPORTED = r"(?:unsupported|not support|unrecognized|unknown|not permitted|not allowed)"
SCHEMA_LIMITS = frozenset({"minLength", "maxLength", "minimum", "maximum", "minItems", "maxItems"})
"""Keywords that some servers reject in a strict schema; the parser of responses has the same limits."""
RETRYABLE_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})


class ServerUnavailableError(Exception):
    """No valid reply after all attempts: connection error, timeout, 429, 5xx, or a body that violates the protocol."""


class RequestRejectedError(Exception):
    """The server rejected the request permanently, or the model refused to respond.

    Attributes:
        reply: text of the rejection, longer than the message.
    """

    def __init__(self, message: str, reply: str = "") -> None:
        super().__init__(message)
        self.reply = reply


class NoResponseError(Exception):
    """A chat completion without a text. The reason says why."""


@dataclass
class _RetryableError(Exception):
    """One attempt failed; `after` is the pause in seconds that the server requested."""

    reason: str
    after: float | None = None

    def __str__(self) -> str:
        return self.reason


class _ServerUnreachableError(ConfigError):
    """The server has no such address."""


class ChatClient:
    """HTTP client for one server; an asynchronous context manager.

    Raises:
        ConfigError: on entering, if the environment variable of the key is empty.
    """

    first_delay_seconds = 0.5
    """Scale of the increasing random delays between attempts."""

    def __init__(self, config: OpenAIServerConfig) -> None:
        self._config = config
        self._next_start = self._paused_until = 0.0
        self._rejected: set[str] = set()
        self._key = ""
        self._http: httpx.AsyncClient | None = None

    async def __aenter__(self) -> Self:
        variable = self._config.api_key_env
        self._key = os.environ.get(variable, "").strip() if variable else ""
        if variable and not self._key:
            raise ConfigError(
                f"{KEY}.api_key_env: environment variable {variable} is not set", f"export {variable}, or set api_key_env to ''"
            )
        count = self._config.concurrency + 1
        self._http = httpx.AsyncClient(
            base_url=self._config.url.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=self._config.timeout_seconds,
            limits=httpx.Limits(max_connections=count, max_keepalive_connections=count),
            follow_redirects=False,  # the key must not be sent to another server
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._http is not None:
            await self._http.aclose()

    async def chat(self, body: dict[str, Any]) -> tuple[str, str]:
        """Request a chat completion; returns the text and the model name reported by the server.

        Raises:
            ServerUnavailableError: all attempts failed.
            RequestRejectedError: the server rejected this request, or the model refused it.
            NoResponseError: the completion has no text.
            ConfigError: the server rejects key, model or address, so that all requests would fail.
        """
        while True:
            adapted = self._adapt(body)
            try:
                return await self._retrying(partial(self._chat_once, adapted))
            except RequestRejectedError as error:
                unsupported = _unsupported_parameter(error.reply, adapted)
                if not unsupported:
                    raise
                self._rejected.add(unsupported)  # later requests of this client go without it

    def _adapt(self, body: dict[str, Any]) -> dict[str, Any]:
        """Body without the parameters that the server has rejected."""
        adapted = {name: value for name, value in body.items() if name not in self._rejected}
        if "max_tokens" in self._rejected:
            adapted.setdefault("max_completion_tokens", body["max_tokens"])
        if "response_format" in self._rejected:
            adapted["response_format"] = _without_limits(body["response_format"])
        return adapted

    async def models(self) -> list[str]:
        """List the names of the served models; empty if the server does not list them.

        Raises:
            ServiceError: the server does not answer.
        """
        try:
            return await self._retrying(self._models_once)
        except ServerUnavailableError as error:
            raise ServiceError(
                f"{KEY}.url: {self._config.url} does not answer: {error}",
                "start the server, or correct the address",
                transient=True,
            ) from error

    async def is_unavailable(self) -> bool:
        """Whether a request for the list of models fails too."""
        try:
            await self._models_once()
        except _RetryableError:
            return True
        except ConfigError:
            return False  # the server answered
        return False

    async def _retrying(self, call: Callable[[], Awaitable[Value]]) -> Value:
        attempts = AsyncRetrying(
            retry=retry_if_exception_type(_RetryableError),
            stop=stop_after_attempt(self._config.max_attempts),
            wait=self._wait,
            reraise=True,
        )
        try:
            return await attempts(call)
        except _RetryableError as error:
            raise ServerUnavailableError(f"{error} ({self._config.max_attempts} attempts)") from error

    def _wait(self, state: RetryCallState) -> float:
        """Random, increasing delay, but at least the pause that the server requested."""
        error = state.outcome.exception() if state.outcome else None
        jitter = wait_random_exponential(multiplier=self.first_delay_seconds, max=MAX_WAIT)(state)
        after = error.after if isinstance(error, _RetryableError) and error.after is not None else 0.0
        return max(jitter, after)

    async def _wait_for_rate_limit(self) -> None:
        """Wait for the next start that the rate limit allows, and for the end of a pause that the server requested."""
        loop = asyncio.get_running_loop()
        rate = self._config.requests_per_second
        if rate:
            start = max(loop.time(), self._next_start)
            self._next_start = start + 1 / rate
            await asyncio.sleep(max(0.0, start - loop.time()))
        while (rest := self._paused_until - loop.time()) > 0:
            await asyncio.sleep(rest)

    async def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        assert self._http is not None
        await self._wait_for_rate_limit()
        try:
            async with asyncio.timeout(self._config.timeout_seconds):  # httpx limits each read only
                async with self._http.stream(method, path, json=body) as reply:
                    payload = b""
                    async for block in reply.aiter_bytes():
                        payload += block
                        if len(payload) > MAX_BODY:
                            raise _RetryableError(f"a reply of more than {MAX_BODY} bytes")
        except TimeoutError as error:
            raise _RetryableError(f"no reply within {self._config.timeout_seconds:g} s") from error
        except httpx.HTTPError as error:
            raise _RetryableError(f"{type(error).__name__}: {error}") from error
        except httpx.InvalidURL as error:
            raise ConfigError(f"{KEY}.url: {error}", "write http://host:port/v1") from error
        self._check_status(reply, payload)
        try:
            return json.loads(payload)
        except (ValueError, RecursionError) as error:
            raise _RetryableError(f"HTTP {reply.status_code} whose body is not JSON: {self._excerpt(payload)}") from error

    def _check_status(self, reply: httpx.Response, payload: bytes) -> None:
        status = reply.status_code
        if status in RETRYABLE_STATUS:
            after = _retry_after(reply.headers.get("retry-after"))
            if after:  # all requests pause: further ones would prolong the overload
                self._paused_until = max(self._paused_until, asyncio.get_running_loop().time() + after)
            raise _RetryableError(f"HTTP {status}: {self._excerpt(payload)}", after)
        if status in {401, 403}:
            source = self._config.api_key_env or "api_key_env is empty"
            raise ConfigError(f"{KEY}.api_key_env: the server rejects the key ({source}), HTTP {status}", "correct the key")
        if status == 404 or 300 <= status < 400:
            raise _ServerUnreachableError(
                f"{KEY}: HTTP {status} at {reply.url.path}: {self._excerpt(payload)}", "correct url (including /v1) or model"
            )
        if status >= 400:
            raise RequestRejectedError(f"HTTP {status}: {self._excerpt(payload)}", self._excerpt(payload, 2000))

    async def _chat_once(self, body: dict[str, Any]) -> tuple[str, str]:
        value = await self._send("POST", "chat/completions", body)
        try:
            choice = value["choices"][0]
            message = choice["message"]
            model, content = str(value.get("model") or self._config.model), message.get("content")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise _RetryableError("a reply that is no chat completion") from error
        if isinstance(content, list):  # parts, as in a request
            content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
        if isinstance(content, str) and content.strip():
            return content, model[:200]
        refusal, reason = message.get("refusal"), choice.get("finish_reason")
        if refusal or reason == "content_filter":
            raise RequestRejectedError(f"the model refuses: {self._excerpt(str(refusal or reason).encode())}")
        raise NoResponseError(_why_empty(message, reason))

    async def _models_once(self) -> list[str]:
        try:
            value = await self._send("GET", "models")
        except (_ServerUnreachableError, RequestRejectedError):
            return []
        listed = value.get("data") if isinstance(value, dict) else None
        return (
            [str(item["id"]) for item in listed if isinstance(item, dict) and "id" in item] if isinstance(listed, list) else []
        )

    def _excerpt(self, payload: bytes, length: int = 200) -> str:
        """Beginning of a reply for messages: one line, without the key."""
        text = " ".join(payload[:4000].decode("utf-8", "replace").split())
        return (text.replace(self._key, "***") if self._key else text)[:length]


def _unsupported_parameter(reply: str, body: Mapping[str, Any]) -> str:
    """Parameter of `body` that a rejection names as unsupported; empty if there is none that can be omitted.

    The name must stand near the word "unsupported" or the like: some servers repeat the whole request in their reply.

    Raises:
        ConfigError: the server rejects the response format, also without the limits of its schema.
    """
    for name in OPTIONAL_PARAMETERS:
        if name in body and re.search(rf"\b{name}\b.{{0,60}}{_UNSUPPORTED}|{_UNSUPPORTED}.{{0,60}}\b{name}\b", reply, re.I):
            return name
    if "response_format" in body and ("response_format" in reply or "guided" in reply):
        if _without_limits(body["response_format"]) != body["response_format"]:
            return "response_format"
        raise ConfigError(f"{KEY}.response_format: the server rejects it: {reply[:200]}", "set it to json_object or none")
    return ""


def _without_limits(schema: Any) -> Any:
    """Copy of a JSON schema without limits of lengths, numbers and list sizes."""
    if isinstance(schema, dict):
        return {name: _without_limits(value) for name, value in schema.items() if name not in SCHEMA_LIMITS}
    return [_without_limits(value) for value in schema] if isinstance(schema, list) else schema


def _why_empty(message: Mapping[str, Any], finish_reason: Any) -> str:
    """Reason of a completion without a text, from the fields of vLLM, SGLang, llama.cpp (`reasoning_content`) and Ollama."""
    thought = next((str(message[name]) for name in ("reasoning_content", "reasoning", "thinking") if message.get(name)), "")
    spent = f"{len(thought)} characters of reasoning and " if thought else ""
    if finish_reason == "length":
        advice = "raise caption.prompt.max_new_tokens, or switch reasoning off by caption.openai_server.extra_body"
        return f"{spent}no response before the limit of tokens; {advice}"
    advice = "; switch reasoning off by caption.openai_server.extra_body, or use a server without a reasoning parser"
    return f"{spent}no response (finish_reason {finish_reason}){advice if thought else ''}"


def _retry_after(value: str | None) -> float | None:
    """Parse a Retry-After header (number or date) to seconds; None if it is missing or malformed."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time()
        except (ValueError, TypeError):
            return None
    return min(max(seconds, 0.0), 10 * MAX_WAIT) if seconds == seconds else None


class OpenAIServerConfig(StageConfig):
    """Group `caption.openai_server`. The key is read from the environment only."""

    url: str = Field(
        default="http://127.0.0.1:8000/v1", pattern=r"^https?://[^\s@]+$", description="address of the server, including /v1"
    )
    model: str = Field(default="", max_length=500, description="model name on the server")
    vision_families: list[str] = Field(
        default_factory=list, description="families of the model's vision tower, e.g. [clip]; judges of these are rejected"
    )
    api_key_env: str = Field(
        default="", pattern=r"^[A-Za-z0-9_]*$", description="environment variable that contains the key; empty: no key"
    )
    response_format: Literal["json_schema", "json_object", "none"] = Field(
        default="json_schema", description="format that the server is requested to enforce"
    )
    extra_body: dict[str, Any] = Field(
        default_factory=dict, description="further keys of a request, e.g. {chat_template_kwargs: {enable_thinking: false}}"
    )
    concurrency: int = Field(default=8, ge=1, le=1024, description="concurrent requests")
    requests_per_second: float = Field(default=0.0, ge=0, le=10_000, description="rate limit; 0: no limit")
    timeout_seconds: float = Field(default=120.0, gt=0, le=3600, description="time limit of one request")
    max_attempts: int = Field(default=6, ge=1, le=20, description="attempts per request, with increasing delays")
