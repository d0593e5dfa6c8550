"""The synchronous client: streams, whole outputs, prompts of every form, errors as our own."""

import threading

import grpc
import pytest
from octavo.errors import (
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from octavo.launch.beam_search import BeamSearchParams
from octavo.launch.client import Client
from octavo.launch.prompts import RequestOptions
from octavo.launch.sampling_params import SamplingParams
from octavo.proto import generation_pb2


@pytest.fixture
def client(fake_server):
    with Client(fake_server.address) as client:
        yield client


def test_generate_joins_the_deltas(client, fake_server, deltas):
    fake_server.answer = lambda request: deltas("hello")
    output = client.generate("hi", SamplingParams(max_tokens=5))
    [sample] = output.outputs
    assert (output.prompt, output.finished, output.request_id) == ("hi", True, "r")
    assert (sample.text, sample.token_ids, sample.finish_reason) == ("hello", list(b"hello"), "length")
    assert fake_server.requests[0].sampling_params.max_tokens == 5


def test_stream_yields_what_is_new(client, fake_server, deltas):
    fake_server.answer = lambda request: deltas("hello")
    stream = client.stream("hi")
    assert [(delta.outputs[0].text, delta.finished) for delta in stream] == [("he", False), ("ll", False), ("o", True)]


def test_several_samples_come_apart(client, fake_server):
    def answer(request):
        for indexes, ends in (((0, 2), False), ((1,), True), ((0, 2), True)):
            response = generation_pb2.GenerateResponse(request_id="r")
            for index in indexes:
                response.outputs.add(index=index, text="abc"[index], token_ids=[index], finish_reason=int(ends))
            yield response
        yield generation_pb2.GenerateResponse(usage=generation_pb2.Usage(cached_tokens=16))

    fake_server.answer = answer
    deltas = list(client.stream("hi", SamplingParams(n=3)))
    assert [[sample.index for sample in delta.outputs] for delta in deltas] == [[0, 2], [1], [0, 2], []]
    output = client.generate("hi", SamplingParams(n=3, best_of=4))
    assert [(sample.index, sample.text) for sample in output.outputs] == [(0, "aa"), (1, "b"), (2, "cc")]
    assert output.num_cached_tokens == 16
    streamed, whole = fake_server.requests
    assert (streamed.sampling_params.n, streamed.output_mode) == (3, generation_pb2.OUTPUT_MODE_DELTA)
    assert (whole.sampling_params.best_of, whole.output_mode) == (4, generation_pb2.OUTPUT_MODE_FINAL)


def test_beams_come_with_their_scores(client, fake_server, samples):
    fake_server.answer = lambda request: samples("ab", "c", scores=[-0.5, -1])
    output = client.generate("hi", BeamSearchParams(3, 5, n=2))
    assert [(sample.text, sample.beam_score) for sample in output.outputs] == [("ab", -0.5), ("c", -1)]
    [request] = fake_server.requests
    assert (request.sampling_params.num_beams, request.sampling_params.n) == (3, 2)
    assert request.output_mode == generation_pb2.OUTPUT_MODE_FINAL


def test_a_cache_salt_is_the_options_or_the_prompts(client, fake_server, samples):
    fake_server.answer = lambda request: samples("x")
    client.generate("hi", options=RequestOptions(cache_salt="mine"))
    client.generate({"prompt": "hi", "cache_salt": "mine"})
    client.generate({"prompt_token_ids": [1], "cache_salt": "mine"}, options=RequestOptions(cache_salt="mine"))
    assert [request.cache_salt for request in fake_server.requests] == ["mine"] * 3
    for salt in ("other", 5):
        with pytest.raises(InvalidArgumentError, match="cache_salt"):
            client.generate({"prompt": "hi", "cache_salt": salt}, options=RequestOptions(cache_salt="mine"))


def test_a_stop_string_and_logprobs_come_through(client, fake_server):
    def answer(request):
        response = generation_pb2.GenerateResponse(request_id="r", prompt_token_ids=[9, 8])
        response.usage.completion_tokens = 1
        output = response.outputs.add(token_ids=[3], stop_string="end")
        output.finish_reason = generation_pb2.FINISH_REASON_STOP
        row = output.logprobs.add(token=generation_pb2.Logprob(token_id=3, logprob=-0.5, rank=2, text="c"))
        row.top.add(token_id=4, logprob=-0.25, rank=1, text="d")
        response.prompt_logprobs.add()
        response.prompt_logprobs.add(token=generation_pb2.Logprob(token_id=8, logprob=-1.0, rank=1))
        yield response

    fake_server.answer = answer
    output = client.generate([9, 8], SamplingParams(logprobs=1, prompt_logprobs=0))
    [sample] = output.outputs
    assert (sample.finish_reason, sample.stop_reason) == ("stop", "end")
    assert {token_id: entry.rank for token_id, entry in sample.logprobs[0].items()} == {3: 2, 4: 1}
    assert sample.cumulative_logprob == -0.5
    assert output.prompt_token_ids == [9, 8]
    assert output.prompt_logprobs[0] is None
    assert output.prompt_logprobs[1][8].logprob == -1.0


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("text", "text"),
        ({"prompt": "text"}, "text"),
        ([1, 2], "token_ids"),
        ([], "token_ids"),
        ({"prompt_token_ids": [1, 2], "prompt": "shown"}, "token_ids"),
        ([{"role": "user", "content": "hi"}], "chat"),
    ],
)
def test_a_prompt_has_many_forms(client, fake_server, deltas, prompt, kind):
    fake_server.answer = lambda request: deltas("x")
    client.generate(prompt, options=RequestOptions(model="m", request_id="mine", priority=3))
    [request] = fake_server.requests
    assert request.WhichOneof("prompt") == kind
    assert (request.model, request.request_id, request.priority) == ("m", "mine", 3)


@pytest.mark.parametrize("prompt", [7, ["a"], {"text": "x"}, {"prompt_token_ids": ["a"]}, [{"role": "user"}]])
def test_something_else_is_no_prompt(client, fake_server, prompt):
    with pytest.raises(InvalidArgumentError):
        client.generate(prompt)
    assert not fake_server.requests


def test_an_empty_chat_is_refused(client):
    with pytest.raises(InvalidArgumentError, match="messages"):
        client.chat([])


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgumentError("top_p is wrong", "sampling_params.top_p"),
        NotFoundError("no such model"),
        ResourceExhaustedError("too many wait", 1.5),
        FailedPreconditionError("not now"),
        UnavailableError("shutting down"),
    ],
)
def test_the_servers_errors_are_raised_as_they_were(client, fake_server, error):
    def answer(request):
        raise error

    fake_server.answer = answer
    with pytest.raises(type(error), match=str(error)) as raised:
        client.generate("hi")
    assert getattr(raised.value, "field", None) == getattr(error, "field", None)
    assert getattr(raised.value, "retry_after_s", None) == getattr(error, "retry_after_s", None)


def test_a_fault_of_the_servers_stays_one(client, fake_server):
    def answer(request):
        raise ZeroDivisionError("a secret")

    fake_server.answer = answer
    with pytest.raises(InternalError) as raised:
        client.generate("hi")
    assert "secret" not in str(raised.value)


def test_closing_a_stream_cancels_the_request(client, fake_server, deltas):
    gone = threading.Event()

    def answer(request):
        try:
            while True:
                yield from deltas("more")
        finally:
            gone.set()

    fake_server.answer = answer
    stream = client.stream("hi")
    next(stream)
    stream.close()
    assert gone.wait(10)


def test_a_deadline_is_kept(fake_server, deltas):
    release = threading.Event()

    def answer(request):
        yield from deltas("a", finish_reason=generation_pb2.FINISH_REASON_UNSPECIFIED)
        release.wait(10)

    fake_server.answer = answer
    with Client(fake_server.address, timeout_s=0.2) as client, pytest.raises(UnavailableError, match="in time"):
        client.generate("hi")
    release.set()


def test_nobody_there_is_said_so(tmp_path):
    address = f"unix:{tmp_path}/nobody.sock"
    with Client(address, connect_timeout_s=0.1) as client, pytest.raises(UnavailableError, match="octavo serve"):
        client.status()


def test_another_server_is_said_so(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    server = grpc.server(ThreadPoolExecutor(1))
    server.add_insecure_port(f"unix:{tmp_path}/other.sock")
    server.start()
    with Client(f"unix:{tmp_path}/other.sock") as client, pytest.raises(FailedPreconditionError, match="no Octavo"):
        client.list_models()
    server.stop(None).wait()


def test_the_small_calls(client):
    assert [model.name for model in client.list_models()] == ["fake"]
    assert client.tokenize("ab") == [97, 98]
    assert client.tokenize([{"role": "user", "content": "c"}]) == [99]
    assert client.detokenize([97, 98]) == "ab"
