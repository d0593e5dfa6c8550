"""The prefix cache as clients see it: cached tokens in every usage, and salts."""

import grpc
import pytest
from octavo.proto.generation_pb2 import GenerateRequest, SamplingParams

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("n", [1, 3])
def test_over_grpc(gateway, n):
    gateway.engine.say("fox", num_cached_tokens=16)
    responses = list(gateway.generation.Generate(GenerateRequest(text="a", sampling_params=SamplingParams(n=n))))
    assert responses[-1].usage.cached_tokens == 16


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_prompts", [1, 3])
def test_completions_add_their_prompts_up(gateway, stream, num_prompts):
    gateway.engine.say("fox", num_cached_tokens=16)
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = gateway.openai.completions.create(model="tiny", prompt=["a"] * num_prompts, n=2, **options)
    usage = list(answer)[-1].usage if stream else answer.usage
    assert usage.prompt_tokens_details.cached_tokens == 16 * num_prompts


@pytest.mark.parametrize("stream", [False, True])
def test_chat(gateway, stream):
    gateway.engine.say("fox", num_cached_tokens=16)
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = gateway.openai.chat.completions.create(model="tiny", messages=MESSAGES, **options)
    usage = list(answer)[-1].usage if stream else answer.usage
    assert usage.prompt_tokens_details.cached_tokens == 16


def test_nothing_cached_is_said_too(gateway):
    gateway.engine.say("fox")
    usage = gateway.http.post("/v1/completions", json={"prompt": "a"}).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


def test_the_salt_reaches_the_engine(gateway):
    salt = "é" * 32  # 64 bytes
    list(gateway.generation.Generate(GenerateRequest(text="a", cache_salt=salt)))
    gateway.openai.completions.create(model="tiny", prompt="a", extra_body={"cache_salt": salt})
    gateway.openai.chat.completions.create(model="tiny", messages=MESSAGES, extra_body={"cache_salt": salt})
    gateway.openai.chat.completions.create(model="tiny", messages=MESSAGES)
    assert [submit.cache_salt for submit in gateway.engine.submits] == [salt.encode()] * 3 + [b""]


@pytest.mark.parametrize("salt", ["é" * 32 + "a", "", 5])
def test_a_wrong_salt(gateway, salt):
    for path, body in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": MESSAGES})):
        response = gateway.http.post(f"/v1/{path}", json={**body, "cache_salt": salt})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "cache_salt")
    assert not gateway.engine.submits


def test_a_long_salt_over_grpc(gateway):
    with pytest.raises(grpc.RpcError) as caught:
        list(gateway.generation.Generate(GenerateRequest(text="a", cache_salt="a" * 65)))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "cache_salt" in caught.value.details()
