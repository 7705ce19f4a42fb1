"""The endpoint captioner against a real server on the loopback that is slow, cuts, refuses, limits and talks nonsense."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest

from pipeline_steps.caption.captioners.base import CaptionFailure, CaptionOptions
from pipeline_steps.caption.captioners.chat_client import ChatClient, OpenAIServerConfig, _retry_after
from pipeline_steps.caption.captioners.openai_server import OpenAIServerCaptioner
from pipeline_steps.caption.captioners.prompt import PromptConfig
from pipeline_steps.caption.captioners.vlm_response import VlmResponse
from pipeline_steps.core.errors import ConfigError, ServiceError
from tests.factories.chat_server import Ask, ChatServer, Reply, events

pytestmark = pytest.mark.fault


def pictures(count: int) -> list[np.ndarray]:
    return [np.full((8, 8, 3), shade, np.uint8) for shade in range(count)]


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChatClient, "first_delay_seconds", 0.01)


def captioner_of(url: str, prompt: dict[str, Any] | None = None, **values: Any) -> OpenAIServerCaptioner:
    config = OpenAIServerConfig(**{"url": url, "model": "tiny-vlm", "timeout_seconds": 5.0, **values})
    return OpenAIServerCaptioner(config, CaptionOptions(prompt=PromptConfig(**prompt or {})))


def phrases(response: VlmResponse | CaptionFailure) -> list[str]:
    assert isinstance(response, VlmResponse), response
    return [event.sound for event in response.events]


def test_answers_keep_their_pictures_whatever_the_order_of_completion() -> None:
    shuffled = random.Random(3)

    def answer(ask: Ask) -> Reply:
        return Reply(events(f"sound {ask.shade}"), wait=shuffled.random() * 0.05)

    with ChatServer(answer) as server:
        captioner = captioner_of(server.url, concurrency=6).load()
        found = captioner.predict(pictures(40))
        came = [name for name, _ in captioner.stream(enumerate(pictures(40)))]
    assert [phrases(one) for one in found] == [[f"sound {shade}"] for shade in range(40)]
    assert sorted(came) == list(range(40))
    assert came != list(range(40)), "the server shuffles"
    assert 2 <= server.most_in_flight <= 6
    assert {one.model for one in found if isinstance(one, VlmResponse)} == {"tiny-vlm-served"}


def test_the_request_asks_for_guided_json_and_nothing_random() -> None:
    with ChatServer(lambda ask: Reply(events("a bell ringing"))) as server:
        captioner_of(server.url).predict(pictures(1))
        captioner_of(server.url, response_format="none").predict(pictures(1))
    first, second = (ask.body for ask in server.asks)
    schema = first["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["events"]["maxItems"] == 5
    assert (first["temperature"], first["seed"], first["model"]) == (0, 0, "tiny-vlm")
    assert "response_format" not in second


def test_cuts_errors_slowness_and_nonsense_are_tried_again() -> None:
    faults = {
        0: Reply(status=500, raw=b"boom"),
        1: Reply(events("x"), cut=True),
        2: Reply(raw=b"<html>gateway</html>"),
        3: Reply(raw=b'{"choices": []}'),
        4: Reply(events("late"), wait=0.6),
        5: Reply(status=503, raw=b"loading"),
        6: Reply(raw=b"9" * 4_500_000),
    }
    seen: Counter[int] = Counter()

    def answer(ask: Ask) -> Reply:
        seen[ask.shade] += 1
        return faults[ask.shade] if seen[ask.shade] == 1 else Reply(events(f"sound {ask.shade}"))

    with ChatServer(answer) as server:
        found = captioner_of(server.url, timeout_seconds=0.4).predict(pictures(7))
    assert [phrases(one) for one in found] == [[f"sound {shade}"] for shade in range(7)]
    assert set(seen.values()) == {2}


def test_a_busy_server_is_left_alone_as_long_as_it_asks() -> None:
    seen: Counter[int] = Counter()

    def answer(ask: Ask) -> Reply:
        seen[ask.shade] += 1
        limited = ask.shade == 0 and seen[0] == 1
        return Reply(status=429, raw=b"slow down", headers={"Retry-After": "0.7"}) if limited else Reply(events("rain falling"))

    with ChatServer(answer) as server:
        found = captioner_of(server.url, concurrency=1).predict(pictures(3))
    assert all(phrases(one) == ["rain falling"] for one in found)
    assert server.asks[1].at - server.asks[0].at >= 0.69, "nobody asks before the pause is over"


def test_the_rate_limit_spaces_requests() -> None:
    with ChatServer(lambda ask: Reply(events("rain falling"))) as server:
        captioner_of(server.url, concurrency=8, requests_per_second=25.0).predict(pictures(8))
    times = [ask.at for ask in server.asks]
    assert times[-1] - times[0] >= 7 / 25 * 0.5, "half of the spacing may be lost where the first request arrives late"


def test_an_answer_that_is_no_json_is_asked_for_once_more_and_then_given_up() -> None:
    def answer(ask: Ask) -> Reply:
        if ask.shade == 0:
            return Reply("I hear a dog.")
        again = "could not be read" in ask.text
        return Reply(events("a dog barking") if again else '{"events": [{"sound": ""}]}')

    with ChatServer(answer) as server:
        bad, good = captioner_of(server.url).predict(pictures(2))
    assert isinstance(bad, CaptionFailure)
    assert bad.code == "CAPTION_UNREADABLE"
    assert "I hear a dog" in bad.reason
    assert phrases(good) == ["a dog barking"]
    assert isinstance(good, VlmResponse)
    assert good.attempts == 2
    assert len(server.asks) == 4


def test_the_empty_list_is_an_answer() -> None:
    with ChatServer(lambda ask: Reply('{"events": []}')) as server:
        captioner = captioner_of(server.url)
        (answer,) = captioner.predict(pictures(1))
    assert phrases(answer) == []
    assert isinstance(answer, VlmResponse)
    assert (captioner.caption(answer).events, captioner.caption(answer).code) == ((), "NO_SOUND")


def test_the_second_question_is_asked_for_each_event() -> None:
    def answer(ask: Ask) -> Reply:
        if "Answer yes or no" in ask.text:
            return Reply('{"heard": true}' if "barking" in ask.text else "No.")
        return Reply(events("a dog barking", "a whale singing"))

    with ChatServer(answer) as server:
        captioner = captioner_of(server.url, {"verify_events": True})
        (found,) = captioner.predict(pictures(1))
    assert isinstance(found, VlmResponse)
    assert [event.verified for event in found.events] == [1.0, 0.0]
    assert [event.phrase for event in captioner.caption(found).events] == ["a dog barking"]


def test_a_picture_the_server_chokes_on_is_that_pictures_trouble() -> None:
    def answer(ask: Ask) -> Reply:
        return Reply(status=500, raw=b"cannot decode") if ask.shade == 2 else Reply(events("wind blowing"))

    with ChatServer(answer) as server:
        found = captioner_of(server.url, max_attempts=2, concurrency=2).predict(pictures(5))
    assert [isinstance(one, CaptionFailure) for one in found] == [False, False, True, False, False]
    assert found[2].code == "CAPTION_UNREACHED"  # type: ignore[union-attr]


def test_a_request_the_server_does_not_take_is_not_repeated() -> None:
    with ChatServer(lambda ask: Reply(status=400, raw=b"image too small")) as server:
        (found,) = captioner_of(server.url).predict(pictures(1))
    assert isinstance(found, CaptionFailure)
    assert (found.code, len(server.asks)) == ("CAPTION_REFUSED", 1)


def test_a_server_that_fails_on_everything_is_away() -> None:
    with (
        ChatServer(lambda ask: Reply(status=502, raw=b"bad gateway")) as server,
        pytest.raises(ServiceError, match="is unavailable: HTTP 502") as caught,
    ):
        captioner_of(server.url, max_attempts=2, concurrency=2).predict(pictures(3))
    assert caught.value.transient
    assert caught.value.exit_code == 5


def test_a_server_that_dies_on_the_way_keeps_what_it_answered() -> None:
    got: list[int] = []
    with ChatServer(lambda ask: Reply(events("wind blowing"), wait=0.02)) as server:
        captioner = captioner_of(server.url, max_attempts=2, concurrency=2)

        def listen() -> None:
            for name, answer in captioner.stream(enumerate(pictures(40))):
                assert isinstance(answer, VlmResponse)
                got.append(name)
                if len(got) == 10:
                    threading.Thread(target=server.close).start()
                    time.sleep(0.3)

        with pytest.raises(ServiceError, match="finished images are in the cache"):
            listen()
    assert 10 <= len(got) < 40


def test_nobody_at_the_address() -> None:
    with ChatServer(lambda ask: Reply("")) as server:
        pass
    with pytest.raises(ServiceError, match="does not answer") as caught:
        captioner_of(server.url, max_attempts=2).load()
    assert caught.value.transient


def test_another_model_is_served() -> None:
    with ChatServer(lambda ask: Reply("")) as server, pytest.raises(ConfigError, match="did you mean tiny-vlm") as caught:
        captioner_of(server.url, model="tiny-vml").load()
    assert caught.value.exit_code == 2
    with ChatServer(lambda ask: Reply(""), models=404) as server:
        captioner_of(server.url, model="anything").load()  # a server need not list what it serves


def test_the_key_comes_from_the_environment_and_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "sk-0123456789abcdef"
    with ChatServer(lambda ask: Reply(status=400, raw=f"bad request by {secret}".encode())) as server:
        captioner = captioner_of(server.url, api_key_env="SONIFY_TEST_KEY")
        with pytest.raises(ConfigError, match="SONIFY_TEST_KEY is not set"):
            captioner.predict(pictures(1))
        monkeypatch.setenv("SONIFY_TEST_KEY", secret)
        (found,) = captioner.predict(pictures(1))
    assert server.asks[0].key == f"Bearer {secret}"
    assert isinstance(found, CaptionFailure)
    assert secret not in found.reason
    assert "***" in found.reason
    assert secret not in str(captioner.describe())


@pytest.mark.parametrize(("status", "words"), [(401, "rejects the key"), (404, "correct url"), (302, "correct url")])
def test_what_no_repetition_can_mend_stops_the_stage(status: int, words: str) -> None:
    reply = Reply(status=status, raw=b"no", headers={"Location": "http://127.0.0.1:9/elsewhere"})
    with ChatServer(lambda ask: reply) as server, pytest.raises(ConfigError) as caught:
        captioner_of(server.url).predict(pictures(2))
    assert words in str(caught.value)


def test_a_schema_the_server_does_not_take_names_the_key_to_change() -> None:
    with (
        ChatServer(lambda ask: Reply(status=400, raw=b"unknown field response_format")) as server,
        pytest.raises(ConfigError, match=r"caption\.openai_server\.response_format"),
    ):
        captioner_of(server.url).predict(pictures(1))


def test_retry_after_is_read_in_both_forms_and_bounded() -> None:
    assert _retry_after("2") == 2.0
    assert _retry_after("1e9") == 600.0
    assert _retry_after("-3") == 0.0
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert [_retry_after(text) for text in (None, "", "soon", "nan")] == [None] * 4


def test_where_the_server_stands_is_no_part_of_the_fingerprint() -> None:
    one = captioner_of("http://a/v1", concurrency=2)
    two = captioner_of("http://b/v1", concurrency=9)
    assert one.describe() == two.describe()
    assert one.describe_prediction() != captioner_of("http://a/v1", model="other").describe_prediction()
    assert one.describe_prediction() != captioner_of("http://a/v1", {"max_new_tokens": 50}).describe_prediction()
