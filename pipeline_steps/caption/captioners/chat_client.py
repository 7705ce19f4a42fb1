"""Requests to an OpenAI-compatible server: limits, retries with jitter, and what counts as the server being away."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from time import time
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from pipeline_steps.core.errors import ConfigError, ServiceError

Value = TypeVar("Value")

KEY = "caption.endpoint"
MAX_BODY = 4_000_000
MAX_WAIT = 60.0
"""Seconds; a server that asks for a longer pause (Retry-After) gets at most ten times that."""
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})


class ServerUnavailableError(Exception):
    """No usable reply after all attempts: connection, time-out, 429, 5xx, or a body that is not the protocol's."""


class RequestRejectedError(Exception):
    """The server does not take this request and would not take it again."""


@dataclass
class _RetryableError(Exception):
    reason: str
    after: float | None = None

    def __str__(self) -> str:
        return self.reason


class _ServerUnreachableError(ConfigError):
    """There is nothing at this address."""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where a server is and how it may be used.

    Attributes:
        url: up to and with /v1.
        model: name under which the server serves it.
        key_variable: environment variable that holds the key; empty: no key is sent.
        concurrency: requests in flight.
        requests_per_second: 0 for no limit.
        timeout_seconds: of one request, from start to end.
        attempts: of one request.
        first_wait: seconds, scale of the growing random waits between attempts.
    """

    url: str
    model: str
    key_variable: str = ""
    concurrency: int = 8
    requests_per_second: float = 0.0
    timeout_seconds: float = 120.0
    attempts: int = 6
    first_wait: float = 0.5


class ChatClient:
    """An HTTP client for one server; an asynchronous context manager.

    Raises:
        ConfigError: on entering, when the environment variable of the key is empty.
    """

    def __init__(self, connection: ServerOptions) -> None:
        self._connection = connection
        self._next_place = self._paused_until = 0.0
        self._key = ""
        self._http: httpx.AsyncClient | None = None

    async def __aenter__(self) -> Self:
        variable = self._connection.key_variable
        self._key = os.environ.get(variable, "").strip() if variable else ""
        if variable and not self._key:
            raise ConfigError(f"{KEY}.key_variable: {variable} is not set", f"export {variable}, or set key_variable to ''")
        count = self._connection.concurrency + 1
        self._http = httpx.AsyncClient(
            base_url=self._connection.url.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=self._connection.timeout_seconds,
            limits=httpx.Limits(max_connections=count, max_keepalive_connections=count),
            follow_redirects=False,  # a key must not follow a redirect to somebody else
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._http is not None:
            await self._http.aclose()

    async def chat(self, body: dict[str, Any]) -> tuple[str, str]:
        """Text of the answer and the model's name as the server gives it.

        Raises:
            AwayError, RefusedError: as they say.
            ConfigError: the server refuses key, model or address, so that no other request could do better.
        """
        return await self._retrying(partial(self._chat_once, body))

    async def models(self) -> list[str]:
        """Names of the models served; empty when the server does not tell.

        Raises:
            ServiceError: the server does not answer.
        """
        try:
            return await self._retrying(self._models_once)
        except ServerUnavailableError as error:
            raise ServiceError(
                f"{KEY}.url: {self._connection.url} does not answer: {error}",
                "start the server, or correct the address",
                transient=True,
            ) from error

    async def is_away(self) -> bool:
        """Whether the server, asked something harmless, does not answer either."""
        try:
            await self._models_once()
        except _RetryableError:
            return True
        except ConfigError:
            return False  # it answered
        return False

    async def _retrying(self, call: Callable[[], Awaitable[Value]]) -> Value:
        attempts = AsyncRetrying(
            retry=retry_if_exception_type(_RetryableError),
            stop=stop_after_attempt(self._connection.attempts),
            wait=self._wait,
            reraise=True,
        )
        try:
            return await attempts(call)
        except _RetryableError as error:
            raise ServerUnavailableError(f"{error} ({self._connection.attempts} attempts)") from error

    def _wait(self, state: RetryCallState) -> float:
        """Random and growing, but never before the server allowed it."""
        error = state.outcome.exception() if state.outcome else None
        jitter = wait_random_exponential(multiplier=self._connection.first_wait, max=MAX_WAIT)(state)
        after = error.after if isinstance(error, _RetryableError) and error.after is not None else 0.0
        return max(jitter, after)

    async def _turn(self) -> None:
        """Wait for this request's place under the rate limit and for the end of a pause the server asked for."""
        loop = asyncio.get_running_loop()
        rate = self._connection.requests_per_second
        if rate:
            place = max(loop.time(), self._next_place)
            self._next_place = place + 1 / rate
            await asyncio.sleep(max(0.0, place - loop.time()))
        while (rest := self._paused_until - loop.time()) > 0:
            await asyncio.sleep(rest)

    async def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        assert self._http is not None
        await self._turn()
        try:
            async with asyncio.timeout(self._connection.timeout_seconds):  # httpx's own limit is per read
                async with self._http.stream(method, path, json=body) as reply:
                    payload = b""
                    async for block in reply.aiter_bytes():
                        payload += block
                        if len(payload) > MAX_BODY:
                            raise _RetryableError(f"a reply of more than {MAX_BODY} bytes")
        except TimeoutError as error:
            raise _RetryableError(f"no reply within {self._connection.timeout_seconds:g} s") from error
        except httpx.HTTPError as error:
            raise _RetryableError(f"{type(error).__name__}: {error}") from error
        except httpx.InvalidURL as error:
            raise ConfigError(f"{KEY}.url: {error}", "write http://host:port/v1") from error
        self._judge(reply, payload)
        try:
            return json.loads(payload)
        except (ValueError, RecursionError) as error:
            raise _RetryableError(f"HTTP {reply.status_code} whose body is not JSON: {self._said(payload)}") from error

    def _judge(self, reply: httpx.Response, payload: bytes) -> None:
        status = reply.status_code
        if status in RETRIED:
            after = _retry_after(reply.headers.get("retry-after"))
            if after:  # everybody waits: more requests would only prolong it
                self._paused_until = max(self._paused_until, asyncio.get_running_loop().time() + after)
            raise _RetryableError(f"HTTP {status}: {self._said(payload)}", after)
        if status in {401, 403}:
            where = self._connection.key_variable or "no key_variable is set"
            raise ConfigError(f"{KEY}.key_variable: the server refuses the key ({where}), HTTP {status}", "correct the key")
        if status == 404 or 300 <= status < 400:
            raise _ServerUnreachableError(
                f"{KEY}: HTTP {status} at {reply.url.path}: {self._said(payload)}", "correct url (up to /v1) or model"
            )
        if status >= 400:
            said = self._said(payload)
            if "response_format" in said or "guided" in said:
                raise ConfigError(f"{KEY}.guided: the server does not take it: {said}", "try json_object or none")
            raise RequestRejectedError(f"HTTP {status}: {said}")

    async def _chat_once(self, body: dict[str, Any]) -> tuple[str, str]:
        value = await self._send("POST", "chat/completions", body)
        try:
            text = value["choices"][0]["message"]["content"]
            model = value.get("model") or self._connection.model
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise _RetryableError("a reply that is no chat completion") from error
        if not isinstance(text, str) or not isinstance(model, str):
            raise _RetryableError("a chat completion without a text")
        return text, model[:200]

    async def _models_once(self) -> list[str]:
        try:
            value = await self._send("GET", "models")
        except (_ServerUnreachableError, RequestRejectedError):
            return []
        listed = value.get("data") if isinstance(value, dict) else None
        return (
            [str(item["id"]) for item in listed if isinstance(item, dict) and "id" in item] if isinstance(listed, list) else []
        )

    def _said(self, payload: bytes) -> str:
        """Beginning of a server's words for a message: one line, without the key."""
        text = " ".join(payload[:2000].decode("utf-8", "replace").split())
        return (text.replace(self._key, "***") if self._key else text)[:200]


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header (a number or a date), None when there is none that can be read."""
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
