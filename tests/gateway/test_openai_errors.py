"""What the engine refuses or breaks, as a client of the OpenAI door hears of it."""

import json

import openai
import pytest


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_429_with_retry_after(gateway, stream):
    gateway.engine.fail(8, "the queue is full", retry_after_s=1.2)
    with pytest.raises(openai.RateLimitError) as caught:
        gateway.openai.completions.create(model="tiny", prompt="a", stream=stream)
    assert caught.value.response.headers["retry-after"] == "2"
    assert caught.value.body["message"] == "the queue is full"


def test_the_engines_refusal_names_the_field(gateway):
    gateway.engine.fail(3, "max_tokens is more than a group holds", field="max_tokens")
    with pytest.raises(openai.BadRequestError) as caught:
        gateway.openai.completions.create(model="tiny", prompt="a")
    assert caught.value.body["param"] == "max_tokens"


@pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
def test_a_fault_of_ours_is_500_and_not_shown(gateway, prompt):
    gateway.engine.fail(15, "secret state at 0x1234")
    with pytest.raises(openai.InternalServerError) as caught:
        gateway.openai.completions.create(model="tiny", prompt=prompt)
    assert "secret" not in caught.value.response.text


def test_an_error_amid_a_stream_is_an_event(start_gateway, loop):
    with start_gateway(max_outage_s=0) as gateway:
        gateway.engine.say("the quick fox", hold_after=1)
        with gateway.http.stream("POST", "/v1/completions", json={"prompt": "a", "stream": True}) as response:
            lines = (line for line in response.iter_lines() if line)
            assert json.loads(next(lines)[6:])["choices"][0]["text"]
            loop.call(gateway.engine.break_sessions)
            rest = list(lines)
    assert json.loads(rest[0][6:])["error"]["type"] == "service_unavailable_error"
    assert rest[1:] == ["data: [DONE]"]
