"""Captioner `openai_server` against the dialects of vLLM, SGLang, Ollama, llama.cpp's server and OpenAI."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pipeline_steps.caption.captioners.base import CaptionFailure, CaptionOptions
from pipeline_steps.caption.captioners.chat_client import ChatClient, OpenAIServerConfig
from pipeline_steps.caption.captioners.openai_server import OpenAIServerCaptioner
from pipeline_steps.caption.captioners.prompt import YES_NO_SCHEMA, PromptConfig, response_schema
from pipeline_steps.caption.captioners.vlm_response import VlmResponse
from pipeline_steps.core.errors import ConfigError
from tests.factories.chat_server import Ask, ChatServer, Reply, events

pytestmark = pytest.mark.fault

ANSWER = events("a bell ringing")
THOUGHT = "The picture shows a church, so a bell may ring. " * 20


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChatClient, "first_delay_seconds", 0.01)


def captioner_of(server: ChatServer, prompt: dict[str, Any] | None = None, **values: Any) -> OpenAIServerCaptioner:
    config = OpenAIServerConfig(**{"url": server.url, "model": "tiny-vlm", "timeout_seconds": 5.0, **values})
    return OpenAIServerCaptioner(config, CaptionOptions(prompt=PromptConfig(**prompt or {})))


def images(count: int) -> list[np.ndarray]:
    return [np.full((8, 8, 3), shade, np.uint8) for shade in range(count)]


def completion(content: Any, finish_reason: str = "stop", **message: Any) -> Reply:
    """Chat completion with the fields that all of these servers have."""
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": content, **message}}
    usage = {"prompt_tokens": 700, "completion_tokens": 400, "total_tokens": 1100}
    body = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "tiny-vlm", "choices": [choice]}
    return Reply(raw=json.dumps({**body, "usage": usage}).encode())


def thinking(ask: Ask) -> bool:
    """Whether the template of a vLLM, SGLang or llama.cpp server opens a thought."""
    return bool(ask.body.get("chat_template_kwargs", {}).get("enable_thinking", True))


def vllm(ask: Ask) -> Reply:
    if thinking(ask):
        return completion(None, "length", reasoning_content=THOUGHT, refusal=None, tool_calls=[])
    return completion(ANSWER, reasoning_content=None, refusal=None, tool_calls=[])


def sglang(ask: Ask) -> Reply:
    if thinking(ask):
        return completion("", "length", reasoning_content=THOUGHT, tool_calls=None)
    return completion(ANSWER, reasoning_content=None, tool_calls=None)


def llama_cpp(ask: Ask) -> Reply:
    return completion("", "length", reasoning_content=THOUGHT) if thinking(ask) else completion(ANSWER)


def ollama(ask: Ask) -> Reply:
    return completion(ANSWER) if ask.body.get("reasoning_effort") == "none" else completion("", "length", reasoning=THOUGHT)


SERVERS = {
    "vllm": (vllm, {"chat_template_kwargs": {"enable_thinking": False}}),
    "sglang": (sglang, {"chat_template_kwargs": {"enable_thinking": False}}),
    "llama.cpp": (llama_cpp, {"chat_template_kwargs": {"enable_thinking": False}}),
    "ollama": (ollama, {"reasoning_effort": "none"}),
}


@pytest.mark.parametrize("name", SERVERS)
def test_a_response_cut_while_the_model_reasons_says_so_and_can_be_switched_off(name: str) -> None:
    answer, switch = SERVERS[name]
    with ChatServer(answer) as server:
        cut = captioner_of(server).predict(images(3))
        assert len(server.asks) == 3, "no repetition"
        read = captioner_of(server, extra_body=switch).predict(images(3))
    for failure in cut:
        assert isinstance(failure, CaptionFailure)
        assert failure.code == "CAPTION_UNREADABLE"
        assert "characters of reasoning" in failure.reason
        assert "caption.prompt.max_new_tokens" in failure.reason
    assert all(isinstance(one, VlmResponse) and one.events[0].sound == "a bell ringing" for one in read)


def test_further_keys_are_part_of_the_fingerprint() -> None:
    with ChatServer(vllm) as server:
        plain, switched = captioner_of(server), captioner_of(server, extra_body={"top_k": 1})
    assert plain.describe_prediction() != switched.describe_prediction()
    assert "extra" not in plain.describe_prediction(), "caches of servers without further keys stay valid"


@pytest.mark.parametrize(
    ("reply", "code", "words"),
    [
        (completion(None, refusal="I can't help with that."), "CAPTION_REFUSED", "I can't help with that."),
        (completion(None, "content_filter"), "CAPTION_REFUSED", "content_filter"),
        (completion(None, "length"), "CAPTION_UNREADABLE", "before the limit of tokens"),
        (completion("", "stop", reasoning_content=ANSWER), "CAPTION_UNREADABLE", "reasoning parser"),
        (completion(None, "stop"), "CAPTION_UNREADABLE", "finish_reason stop"),
        (completion(None, "tool_calls", tool_calls=[{"id": "1"}]), "CAPTION_UNREADABLE", "tool_calls"),
    ],
)
def test_a_completion_without_text_is_a_failure_of_its_image(reply: Reply, code: str, words: str) -> None:
    with ChatServer(lambda ask: reply if ask.shade == 1 else completion(ANSWER)) as server:
        found = captioner_of(server).predict(images(3))
        assert len(server.asks) == 3
        alone = captioner_of(server).predict(images(2)[1:])
    for failure in (found[1], *alone):  # also if there is no other image: the server answered
        assert isinstance(failure, CaptionFailure)
        assert failure.code == code
        assert words in failure.reason
    assert isinstance(found[0], VlmResponse)
    assert isinstance(found[2], VlmResponse)


def test_text_in_parts_is_joined() -> None:
    parts = [{"type": "text", "text": ANSWER[:20]}, {"type": "text", "text": ANSWER[20:]}]
    with ChatServer(lambda ask: completion(parts)) as server:
        (found,) = captioner_of(server).predict(images(1))
    assert isinstance(found, VlmResponse)


def rejection(message: str, param: str | None = None, code: str | None = None) -> Reply:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return Reply(status=400, raw=json.dumps({"error": error}, indent=2).encode())


def openai(ask: Ask) -> Reply:
    """Current OpenAI models: one rejection names one parameter."""
    if "max_tokens" in ask.body:
        message = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        return rejection(message, "max_tokens", "unsupported_parameter")
    if ask.body.get("temperature", 1) != 1:
        message = (
            "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported."
        )
        return rejection(message, "temperature", "unsupported_value")
    if problem := strict_problem(ask.body["response_format"]["json_schema"]["schema"]):
        return rejection(f"Invalid schema for response_format 'answer': {problem}", "response_format", "invalid_json_schema")
    assert ask.body["max_completion_tokens"] == 400
    return completion(ANSWER, refusal=None, annotations=[])


def strict_problem(schema: dict[str, Any]) -> str:
    """What strict mode rejects: a schema without type, optional properties, lengths of strings."""
    if "type" not in schema:
        return "schema must have a 'type' key."
    if extra := {"minLength", "maxLength"} & set(schema):
        return f"'{extra.pop()}' is not permitted."
    if schema["type"] == "object":
        if schema.get("additionalProperties") is not False or set(schema.get("required", ())) != set(schema["properties"]):
            return "'required' must include every key and 'additionalProperties' must be false."
        return next(filter(None, map(strict_problem, schema["properties"].values())), "")
    return strict_problem(schema["items"]) if schema["type"] == "array" else ""


def test_the_parameters_of_current_openai_models_are_learned_once() -> None:
    with ChatServer(openai) as server:
        captioner = captioner_of(server, concurrency=1)
        found = captioner.predict(images(5))
    assert all(isinstance(one, VlmResponse) for one in found)
    assert len(server.asks) == 5 + 3, "three rejections, for the first image alone"
    with ChatServer(openai) as server:
        assert all(isinstance(one, VlmResponse) for one in captioner_of(server, concurrency=4).predict(images(9)))
        assert len(server.asks) <= 9 + 3 * 4


@pytest.mark.parametrize("schema", [response_schema(5), YES_NO_SCHEMA])
def test_every_part_of_a_schema_has_a_type(schema: dict[str, Any]) -> None:
    def without_lengths(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: without_lengths(inner) for name, inner in value.items() if name not in ("minLength", "maxLength")}

    assert strict_problem(without_lengths(schema)) == ""


def vllm_extra_forbidden(ask: Ask) -> Reply:
    """A server that repeats the request in its rejection."""
    if "seed" not in ask.body:
        return completion(ANSWER)
    problem = {"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted", "input": 0}
    body = json.dumps({"object": "error", "message": str([problem]), "code": 400, "request": {**ask.body, "messages": []}})
    return Reply(status=400, raw=body.encode())


def test_only_the_rejected_parameter_is_omitted() -> None:
    with ChatServer(vllm_extra_forbidden) as server:
        assert all(isinstance(one, VlmResponse) for one in captioner_of(server).predict(images(2)))
    assert "seed" not in server.asks[-1].body
    assert server.asks[-1].body["temperature"] == 0
    assert "max_tokens" in server.asks[-1].body


@pytest.mark.parametrize(
    "message",
    [
        "max_tokens is too large: 400. This model's maximum context length is 512 tokens.",
        "image input is too small",
        "temperature must be positive",
    ],
)
def test_a_rejection_of_a_value_is_no_reason_to_omit_the_parameter(message: str) -> None:
    with ChatServer(lambda ask: rejection(message)) as server:
        (found,) = captioner_of(server).predict(images(1))
    assert isinstance(found, CaptionFailure)
    assert found.code == "CAPTION_REFUSED"
    assert message[:40] in found.reason
    assert len(server.asks) == 1


def test_a_response_format_that_is_rejected_in_every_form_names_the_key() -> None:
    def answer(ask: Ask) -> Reply:
        return rejection("response_format is not supported") if "response_format" in ask.body else completion(ANSWER)

    with ChatServer(answer) as server:
        with pytest.raises(ConfigError, match=r"caption\.openai_server\.response_format"):
            captioner_of(server).predict(images(1))
        assert all(isinstance(one, VlmResponse) for one in captioner_of(server, response_format="none").predict(images(1)))


def test_every_dialect_is_served() -> None:
    answers: list[Callable[[Ask], Reply]] = [vllm, sglang, llama_cpp, ollama, openai]
    for answer in answers:
        switch = {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "none"}
        with ChatServer(answer) as server:
            captioner = captioner_of(server, extra_body=switch).load()
            assert [len(one.events) for one in captioner.predict(images(2)) if isinstance(one, VlmResponse)] == [1, 1]
