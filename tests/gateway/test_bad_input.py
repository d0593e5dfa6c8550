"""Everything wrong that a client can send is refused by name at both doors, and the server goes on."""

import json

import grpc
import openai
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from octavo.errors import InvalidArgumentError
from octavo.gateway.sampling import ModelLimits, SamplingRequest, resolve_sampling
from octavo.gateway.text import load_text_model
from octavo.proto import generation_pb2
from octavo.proto.generation_pb2 import ChatMessage, ChatPrompt, GenerateRequest, SamplingParams, TokenIds

NAN, INFINITY = float("nan"), float("inf")

# field: values, the same at both doors.
BAD_SAMPLING = {
    "n": [0, -1, 129],
    "best_of": [0, -1, 129],
    "num_beams": [-1, 65],
    "length_penalty": [-10.5, 10.5, NAN, 2.0],  # the last for want of beams
    "temperature": [-0.5, NAN, INFINITY, 101],
    "top_p": [0, -0.1, 1.5, NAN, 1e-50],
    "top_k": [-2],
    "min_p": [-0.1, 1.1, NAN],
    "presence_penalty": [-2.5, 2.5, NAN],
    "frequency_penalty": [-2.5, 2.5, NAN],
    "repetition_penalty": [0, -1, 2.5, NAN],
    "logit_bias": [{400: 1}, {5: 101}, {5: NAN}, dict.fromkeys(range(1025), 1)],
    "stop": [[""], ["a"] * 17, ["a" * 1025]],
    "stop_token_ids": [[-1], [384], [5] * 129],
    "max_tokens": [0, -1, 257, 2**31 - 1],
    "min_tokens": [-1, 257],
    "bad_words": [[""], ["a"] * 129, ["a" * 257]],
    "prompt_logprobs": [-1, 21],
}
CASES = [
    pytest.param(name, value, id=f"{name}-{i}")
    for name, values in BAD_SAMPLING.items()
    for i, value in enumerate(values)
]


def refused(gateway, request, method="Generate"):
    """The fields that a gRPC refusal names."""
    with pytest.raises(grpc.RpcError) as caught:
        list(getattr(gateway.generation, method)(request))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, caught.value.details()
    bad = error_details_pb2.BadRequest()
    for detail in rpc_status.from_call(caught.value).details:
        assert detail.Unpack(bad)
    [violation] = bad.field_violations
    assert violation.description == caught.value.details()
    return violation.field


def refused_json(gateway, path, body, status=400):
    """The `param` of an HTTP refusal, and its message."""
    content = body if isinstance(body, (bytes, str)) else json.dumps(body)
    response = gateway.http.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 1000
    return error["param"], error["message"]


@pytest.fixture(autouse=True)
def _server_goes_on(gateway):
    yield
    assert gateway.engine.submits == []
    gateway.engine.say("fox")
    assert gateway.openai.completions.create(model="tiny", prompt="a").choices[0].text == "fox"


def test_a_bad_word_that_only_the_tokenizer_knows_is_refused_here_and_not_by_a_worker(model_dir):
    text = load_text_model(model_dir)
    limits = ModelLimits(256, max(text.encode("fox", add_special_tokens=False)), frozenset(), text)
    with pytest.raises(InvalidArgumentError, match="bad_words: token id") as caught:
        resolve_sampling(SamplingRequest(bad_words=["fox"]), 1, limits, lambda: 0)
    assert caught.value.field == "bad_words"


@pytest.mark.parametrize(("num_prompt_tokens", "prompt_logprobs"), [(2**18, 0), (2**17, 1), (12483, 20)])
def test_prompt_logprobs_of_a_long_prompt_are_bounded(num_prompt_tokens, prompt_logprobs):
    limits = ModelLimits(2**20, 384, frozenset(), None)
    request = SamplingRequest(prompt_logprobs=prompt_logprobs)
    resolve_sampling(request, num_prompt_tokens, limits, lambda: 0)
    with pytest.raises(InvalidArgumentError, match="at most 262144") as caught:
        resolve_sampling(request, num_prompt_tokens + 1, limits, lambda: 0)
    assert caught.value.field == "prompt_logprobs"


@pytest.mark.parametrize(("name", "value"), CASES)
def test_sampling_parameters_over_grpc(gateway, name, value):
    request = GenerateRequest(text="a", sampling_params=SamplingParams(**{name: value}))
    assert refused(gateway, request) == f"sampling_params.{name}"


@pytest.mark.parametrize(("name", "value"), CASES)
def test_sampling_parameters_over_http(gateway, name, value):
    body = {"prompt": "a", name: value}
    param, message = refused_json(gateway, "/v1/completions", body)
    assert param == name
    assert name in message
    body = {"messages": [{"role": "user", "content": "a"}], name: value}
    assert refused_json(gateway, "/v1/chat/completions", body)[0] == name


def test_a_million_stop_strings(gateway):
    stop = ["a"] * 10**6
    request = GenerateRequest(text="a", sampling_params=SamplingParams(stop=stop))
    assert refused(gateway, request) == "sampling_params.stop"
    assert refused_json(gateway, "/v1/completions", {"prompt": "a", "stop": stop})[0] == "stop"


@pytest.mark.parametrize("value", [-1, 21])
def test_logprobs(gateway, value):
    request = GenerateRequest(text="a", sampling_params=SamplingParams(logprobs=value))
    assert refused(gateway, request) == "sampling_params.logprobs"
    assert refused_json(gateway, "/v1/completions", {"prompt": "a", "logprobs": value})[0] == "logprobs"
    body = {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": value}
    assert refused_json(gateway, "/v1/chat/completions", body)[0] == "top_logprobs"


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("prompt", GenerateRequest()),
        ("text", GenerateRequest(text="")),
        ("text", GenerateRequest(text="fox " * 300)),
        ("token_ids", GenerateRequest(token_ids=TokenIds())),
        ("token_ids", GenerateRequest(token_ids=TokenIds(ids=[384]))),
        ("token_ids", GenerateRequest(token_ids=TokenIds(ids=[-1]))),
        ("token_ids", GenerateRequest(token_ids=TokenIds(ids=[5] * 256))),
        ("chat.messages", GenerateRequest(chat=ChatPrompt())),
        ("chat.messages[0].role", GenerateRequest(chat=ChatPrompt(messages=[ChatMessage(role="boss")]))),
        ("chat.messages", GenerateRequest(chat=ChatPrompt(messages=[ChatMessage(role="assistant", content="a")]))),
        ("request_id", GenerateRequest(text="a", request_id="é" * 129)),
        ("output_mode", GenerateRequest(text="a", output_mode=9)),
    ],
)
def test_requests_over_grpc(gateway, field, request_):
    assert refused(gateway, request_) == field


UNKNOWN = bytes([0xF8, 0x3F, 1])  # field 1023, varint


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("1023", GenerateRequest.FromString(GenerateRequest(text="a").SerializeToString() + UNKNOWN)),
        (
            "sampling_params.1023",
            GenerateRequest(text="a", sampling_params=SamplingParams.FromString(UNKNOWN)),
        ),
        (
            "chat.messages[0].1023",
            GenerateRequest(chat=ChatPrompt(messages=[ChatMessage.FromString(UNKNOWN)])),
        ),
    ],
)
def test_a_field_that_only_a_newer_server_knows(gateway, field, request_):
    assert refused(gateway, request_) == field


def test_prompt_and_max_tokens_over_the_context(gateway):
    params = SamplingParams(max_tokens=200)
    assert refused(gateway, GenerateRequest(token_ids=TokenIds(ids=[5] * 57), sampling_params=params)) == (
        "sampling_params.max_tokens"
    )
    param, message = refused_json(gateway, "/v1/completions", {"prompt": [5] * 57, "max_tokens": 200})
    assert param == "max_tokens"
    assert all(number in message for number in ("57", "200", "257", "256"))


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("prompt", {}),
        ("prompt", {"prompt": ""}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": [[]]}),
        ("prompt", {"prompt": [[5], []]}),
        ("prompt", {"prompt": ["a", ""]}),
        ("prompt", {"prompt": ["a", 5]}),
        ("prompt", {"prompt": [True]}),
        ("prompt", {"prompt": [1.5] * 100_000}),
        ("prompt", {"prompt": [384]}),
        ("prompt", {"prompt": [10**400]}),
        ("prompt", {"prompt": ["a"] * 257}),
        ("prompt", {"prompt": 5}),
        ("prompt", {"prompt": "fox " * 300}),
        ("suffix", {"prompt": "a", "suffix": "b"}),
        ("logit_bias", {"prompt": "a", "logit_bias": {"a": 1}}),
        ("logit_bias", {"prompt": "a", "logit_bias": {"1_0": 1}}),
        ("logit_bias", {"prompt": "a", "logit_bias": {"5": "1"}}),
        ("logit_bias", {"prompt": "a", "logit_bias": {str(i): "x" for i in range(100_000)}}),
        ("temperature", {"prompt": "a", "temperature": "0.5"}),
        ("temperature", {"prompt": "a", "temperature": 10**400}),
        ("top_k", {"prompt": "a", "top_k": 10**400}),
        ("seed", {"prompt": "a", "seed": 2**63}),
        ("seed", {"prompt": "a", "seed": 0.5}),
        ("priority", {"prompt": "a", "priority": 2**31}),
        ("request_id", {"prompt": "a", "request_id": "a" * 257}),
        ("stream_options", {"prompt": "a", "stream_options": {"include_usage": True}}),
        ("stream_options.more", {"prompt": "a", "stream": True, "stream_options": {"more": 1}}),
        ("no_such_field", {"prompt": "a", "no_such_field": 1}),
        ("no-such-field", {"prompt": "a", "no-such-field": 1}),
        ("stop", {"prompt": "a", "stop": "\ud800"}),
        ("prompt", {"prompt": "\ud800"}),
        ("prompt", {"prompt": [5, 384]}),
        ("prompt", {"prompt": [5, 2**31]}),
        ("prompt", {"prompt": [5, -(2**70)]}),
        (None, {f"field{i}": 1 for i in range(100_000)}),
        (None, []),
    ],
)
def test_completion_bodies(gateway, param, body):
    assert refused_json(gateway, "/v1/completions", body)[0] == param


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("messages", {"messages": []}),
        ("messages", {"messages": "hi"}),
        ("messages.0.role", {"messages": [{"role": "boss", "content": "a"}]}),
        ("messages.0.content", {"messages": [{"role": "user", "content": None}]}),
        ("messages.0.content", {"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]}),
        ("messages", {"messages": [{"role": "assistant", "content": "a"}]}),
        ("messages", {"messages": [{"role": "user", "content": "fox " * 300}]}),
        ("messages", {"messages": [{"role": "user", "content": "a"}] * 5000}),
        ("messages.0.weight", {"messages": [{"role": "user", "content": "a", "weight": 1}]}),
        ("tools", {"tools": [{"type": "function"}]}),
        ("tool_choice", {"tool_choice": "auto"}),
        ("functions", {"functions": []}),
        ("response_format.type", {"response_format": {"type": "json_object"}}),
        ("modalities", {"modalities": ["audio"]}),
        ("store", {"store": True}),
        ("metadata", {"metadata": {"a": "b"}}),
        ("reasoning_effort", {"reasoning_effort": "high"}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("logprobs", {"logprobs": 2}),
        ("max_tokens", {"max_tokens": 5, "max_completion_tokens": 6}),
        ("max_completion_tokens", {"max_completion_tokens": 0}),
        ("max_completion_tokens", {"max_completion_tokens": 257}),
        ("echo", {"echo": True}),
    ],
)
def test_chat_bodies(gateway, param, fields):
    body = {"messages": [{"role": "user", "content": "a"}], **fields}
    assert refused_json(gateway, "/v1/chat/completions", body)[0] == param


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}, "store": False, "metadata": {}, "n": 1, "user": "me", "tools": []},
        {"modalities": ["text"], "tool_choice": "none", "parallel_tool_calls": True, "service_tier": "auto"},
        {"stop": [], "logit_bias": {}, "logprobs": False, "temperature": None, "top_k": -1, "seed": -(2**63)},
    ],
)
def test_what_does_nothing_is_accepted(gateway, fields):
    gateway.engine.say("fox")
    body = {"messages": [{"role": "user", "content": "a"}], **fields}
    response = gateway.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    gateway.engine.submits.clear()


@pytest.mark.parametrize(
    "body", [b"{", b"", b'{"prompt": "a",}', b"\xff\xfe{", b"[" * 100_000, b'{"seed": ' + b"1" * 5000 + b"}"]
)
def test_malformed_json(gateway, body):
    refused_json(gateway, "/v1/completions", body)


def test_json_needs_its_header(gateway):
    response = gateway.http.post("/v1/completions", content='{"prompt": "a"}')
    assert response.status_code == 400
    assert "Content-Type" in response.json()["error"]["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_bound(gateway, chunked):
    data = b" " * (33 * 1024 * 1024)
    pieces = (data[start : start + 2**20] for start in range(0, len(data), 2**20))
    response = gateway.http.post("/v1/completions", content=pieces if chunked else data)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "payload_too_large"


def test_a_message_over_the_bound(gateway):
    with pytest.raises(grpc.RpcError) as caught:
        list(gateway.generation.Generate(GenerateRequest(text=" " * (33 * 1024 * 1024))))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    "method", ["octavo.v1.Generation/Tokenize", "octavo.v1.Generation/Detokenize", "octavo.v1.Admin/GetStatus"]
)
def test_malformed_protobuf(gateway, method):
    with pytest.raises(grpc.RpcError) as caught:
        gateway.channel.unary_unary(f"/{method}")(b"\xff\xff\xff")
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "Decode" not in caught.value.details()
    with pytest.raises(grpc.RpcError) as caught:
        list(gateway.channel.unary_stream("/octavo.v1.Generation/Generate")(b"\xff\xff\xff"))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_unknown_model(gateway):
    with pytest.raises(grpc.RpcError) as caught:
        list(gateway.generation.Generate(GenerateRequest(model="other", text="a")))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    with pytest.raises(openai.NotFoundError) as refusal:
        gateway.openai.completions.create(model="other", prompt="a")
    assert (refusal.value.param, refusal.value.code) == ("model", "model_not_found")
    assert "tiny" in refusal.value.message


def test_unknown_paths_and_methods(gateway):
    assert gateway.http.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert gateway.http.get("/v1/completions").status_code == 405


def test_text_endpoints(gateway):
    assert refused_json(gateway, "/tokenize", {})[0] == "prompt"
    assert refused_json(gateway, "/tokenize", {"prompt": "a", "messages": []})[0] == "prompt"
    assert refused_json(gateway, "/detokenize", {"tokens": [384]})[0] == "tokens"
    assert refused_json(gateway, "/detokenize", {"tokens": [5] * 1_000_001})[0] == "tokens"
    assert refused(gateway, generation_pb2.DetokenizeRequest(token_ids=[384]), "Detokenize") == "token_ids"
    assert refused(gateway, generation_pb2.TokenizeRequest(), "Tokenize") == "prompt"
