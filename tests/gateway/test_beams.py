"""Beam search at both doors: whole outputs with their scores; everything that does not go with it is refused."""

import grpc
import httpx
import numpy as np
import openai
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from octavo.gateway.output import STOP
from octavo.gateway.released_beams import ReleasedBeams
from octavo.gateway.samples import check_samples
from octavo.gateway.sampling import SamplingRequest
from octavo.proto import engine_pb2, generation_pb2
from octavo.proto.generation_pb2 import GenerateRequest, SamplingParams

FINAL, DELTA = generation_pb2.OUTPUT_MODE_FINAL, generation_pb2.OUTPUT_MODE_DELTA
TEXTS = ["the quick fox", "jumps", "over"]
SCORES = [-0.5, -0.75, -1.25]
MESSAGES = [{"role": "user", "content": "hi"}]


def say_beams(gateway, **options):
    return gateway.engine.say_samples(*TEXTS, beam_scores=SCORES, **options)


def test_the_best_come_whole_with_their_scores(gateway):
    samples = say_beams(gateway)
    params = SamplingParams(n=2, num_beams=3, length_penalty=0.5, early_stopping=3, stop_token_ids=[5], max_tokens=9)
    request = GenerateRequest(text="a", sampling_params=params, output_mode=FINAL)
    [response] = gateway.generation.Generate(request)
    outputs = [(o.index, o.text, list(o.token_ids), o.beam_score, o.finish_reason) for o in response.outputs]
    assert outputs == [(i, TEXTS[i], samples[i], SCORES[i], STOP) for i in range(2)]
    assert response.usage.completion_tokens == sum(map(len, samples[:2]))
    [submit] = gateway.engine.submits
    assert submit.num_samples == 2
    search = submit.beam_search
    assert (search.num_beams, search.length_penalty) == (3, 0.5)
    assert search.early_stopping == engine_pb2.EARLY_STOPPING_NEVER
    sent = submit.sampling_params
    assert (sent.temperature, sent.max_tokens, sent.HasField("num_logprobs")) == (0, 9, False)
    assert np.frombuffer(sent.stop_token_ids, "<i4").tolist() == [1, 5]


def test_defaults(gateway):
    say_beams(gateway)
    request = GenerateRequest(text="a", sampling_params=SamplingParams(num_beams=4), output_mode=FINAL)
    [response] = gateway.generation.Generate(request)
    assert [output.beam_score for output in response.outputs] == SCORES[:1]
    search = gateway.engine.submits[0].beam_search
    assert (search.length_penalty, search.early_stopping) == (1, engine_pb2.EARLY_STOPPING_HEURISTIC)


@pytest.mark.parametrize("num_beams", [0, 1])
def test_one_beam_is_no_search(gateway, num_beams):
    gateway.engine.say("fox")
    request = GenerateRequest(text="a", sampling_params=SamplingParams(num_beams=num_beams))
    responses = list(gateway.generation.Generate(request))
    assert not responses[-1].outputs[0].HasField("beam_score")
    assert not gateway.engine.submits[0].HasField("beam_search")


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize(
    "body",
    [
        {"num_beams": 3, "n": 2},
        {"beam_width": 3, "n": 2},
        {"use_beam_search": True, "best_of": 3, "n": 2},
        {"num_beams": 3, "n": 2, "best_of": 3, "use_beam_search": True, "temperature": 0, "top_p": 1, "top_k": -1},
    ],
)
def test_over_http(gateway, path, body):
    say_beams(gateway)
    body = {**body, "length_penalty": 2, "early_stopping": True}
    body |= {"prompt": "a"} if path == "completions" else {"messages": MESSAGES}
    response = gateway.http.post(f"/v1/{path}", json=body)
    assert response.status_code == 200, response.text
    choices = response.json()["choices"]
    assert [(choice["index"], choice["beam_score"]) for choice in choices] == [(0, -0.5), (1, -0.75)]
    texts = [choice["text"] if path == "completions" else choice["message"]["content"] for choice in choices]
    assert texts == TEXTS[:2]
    [submit] = gateway.engine.submits
    assert (submit.num_samples, submit.beam_search.num_beams, submit.beam_search.length_penalty) == (2, 3, 2)
    assert submit.beam_search.early_stopping == engine_pb2.EARLY_STOPPING_FIRST


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        (False, engine_pb2.EARLY_STOPPING_HEURISTIC),
        (True, engine_pb2.EARLY_STOPPING_FIRST),
        ("never", engine_pb2.EARLY_STOPPING_NEVER),
        (None, engine_pb2.EARLY_STOPPING_HEURISTIC),
    ],
)
def test_early_stopping(gateway, value, sent):
    say_beams(gateway)
    body = {"prompt": "a", "num_beams": 2, "early_stopping": value}
    assert gateway.http.post("/v1/completions", json=body).status_code == 200
    assert gateway.engine.submits[0].beam_search.early_stopping == sent


def test_vllms_use_beam_search_without_best_of_has_n_beams(gateway):
    say_beams(gateway)
    extra = {"use_beam_search": True}
    answer = gateway.openai.completions.create(model="tiny", prompt=["a", "b"], n=3, extra_body=extra)
    assert [choice.text for choice in answer.choices] == TEXTS * 2
    assert {submit.beam_search.num_beams for submit in gateway.engine.submits} == {3}


def test_no_score_is_shown_without_beams(gateway):
    gateway.engine.say("fox")
    [choice] = gateway.http.post("/v1/completions", json={"prompt": "a"}).json()["choices"]
    assert "beam_score" not in choice


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_client_that_goes_cancels_the_outputs(gateway, eventually, path):
    say_beams(gateway, hold_after=0)
    body = {"prompt": "a"} if path == "completions" else {"messages": MESSAGES}
    with pytest.raises(httpx.ReadTimeout):
        gateway.http.post(f"/v1/{path}", json={**body, "num_beams": 3, "n": 2}, timeout=0.2)
    [submit] = gateway.engine.submits
    eventually(lambda: gateway.engine.cancels == [submit.handle, submit.handle + 1])


# What does not go with beams: (field, the rest of the request).
TOGETHER = [
    ("temperature", {"temperature": 0.5}),
    ("temperature", {"temperature": 1}),
    ("top_p", {"top_p": 0.5}),
    ("top_k", {"top_k": 3}),
    ("min_p", {"min_p": 0.5}),
    ("presence_penalty", {"presence_penalty": 1}),
    ("frequency_penalty", {"frequency_penalty": 1}),
    ("repetition_penalty", {"repetition_penalty": 1.5}),
    ("logit_bias", {"logit_bias": {5: 1}}),
    ("bad_words", {"bad_words": ["fox"]}),
    ("stop", {"stop": ["fox"]}),
    ("min_tokens", {"min_tokens": 1}),
    ("prompt_logprobs", {"prompt_logprobs": 0}),
    ("best_of", {"best_of": 3}),
    ("num_beams", {"n": 5}),
]


@pytest.mark.parametrize(("name", "fields"), [*TOGETHER, ("logprobs", {"logprobs": 0})])
def test_what_does_not_go_together_over_grpc(gateway, name, fields):
    params = SamplingParams(num_beams=4, **fields)
    assert refused(gateway, params, FINAL)[0] == f"sampling_params.{name}"


def refused(gateway, params, mode):
    with pytest.raises(grpc.RpcError) as caught:
        list(gateway.generation.Generate(GenerateRequest(text="a", sampling_params=params, output_mode=mode)))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    bad = error_details_pb2.BadRequest()
    [detail] = rpc_status.from_call(caught.value).details
    assert detail.Unpack(bad)
    assert not gateway.engine.submits
    return bad.field_violations[0].field, caught.value.details()


@pytest.mark.parametrize("mode", [DELTA, generation_pb2.OUTPUT_MODE_UNSPECIFIED])
def test_beams_are_not_streamed_over_grpc(gateway, mode):
    field, message = refused(gateway, SamplingParams(num_beams=4), mode)
    assert field == "output_mode"
    assert "OUTPUT_MODE_FINAL" in message


def test_other_values_over_grpc(gateway):
    assert refused(gateway, SamplingParams(num_beams=2, early_stopping=9), FINAL)[0] == "sampling_params.early_stopping"
    assert refused(gateway, SamplingParams(early_stopping=3), FINAL)[0] == "sampling_params.early_stopping"


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        *TOGETHER,
        ("stream", {"stream": True}),
        ("beam_width", {"beam_width": 3}),
        ("use_beam_search", {"use_beam_search": False}),
        ("early_stopping", {"early_stopping": "sometimes"}),
    ],
)
def test_what_does_not_go_together_over_http(gateway, path, name, fields):
    named, message = refused_over_http(gateway, path, {"num_beams": 4, **fields})
    assert named == name
    assert name in message


def refused_over_http(gateway, path, fields):
    body = {"prompt": "a", **fields} if path == "completions" else {"messages": MESSAGES, **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        gateway.openai.post(f"/{path}", body=body, cast_to=object)
    assert not gateway.engine.submits
    return caught.value.body["param"], caught.value.body["message"]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("use_beam_search", {"use_beam_search": True}),
        ("n", {"use_beam_search": True, "n": 65}),
        ("best_of", {"use_beam_search": True, "best_of": 65}),
        ("beam_width", {"beam_width": 65}),
        ("beam_width", {"beam_width": 2, "n": 3}),
        ("early_stopping", {"early_stopping": "never"}),
        ("length_penalty", {"length_penalty": 0}),
    ],
)
def test_values_over_http(gateway, name, fields):
    assert refused_over_http(gateway, "completions", fields)[0] == name


def test_logprobs_go_by_the_name_that_was_sent(gateway):
    assert refused_over_http(gateway, "completions", {"num_beams": 2, "logprobs": 0})[0] == "logprobs"
    assert refused_over_http(gateway, "chat/completions", {"num_beams": 2, "logprobs": True})[0] == "logprobs"
    body = {"num_beams": 2, "logprobs": True, "top_logprobs": 1}
    assert refused_over_http(gateway, "chat/completions", body)[0] == "top_logprobs"


def test_more_beams_than_the_vocabulary_has_tokens():
    check_samples(SamplingRequest(num_beams=8), 8)
    with pytest.raises(Exception, match=r"num_beams \(9\).*vocabulary \(8\)") as caught:
        check_samples(SamplingRequest(num_beams=9), 8)
    assert caught.value.field == "num_beams"


def test_scores_find_their_outputs_beside_other_requests(gateway, loop, eventually):
    """Beam searches and an ordinary request that end in one message, one of the searches cancelled meanwhile."""
    say_beams(gateway, hold_after=0)
    search, plain = SamplingParams(num_beams=2, n=2), SamplingParams()
    requests = [GenerateRequest(text="a", sampling_params=p, output_mode=FINAL) for p in (search, plain, search)]
    calls = [gateway.generation.Generate(request) for request in requests]
    eventually(lambda: len(gateway.engine.submits) == 3)
    calls[0].cancel()
    eventually(lambda: len(gateway.engine.cancels) == 2)
    gone = gateway.engine.cancels[0]
    [other] = [s.handle for s in gateway.engine.submits if not s.HasField("beam_search")]
    [kept] = [s.handle for s in gateway.engine.submits if s.HasField("beam_search") and s.handle != gone]
    response = engine_pb2.SessionResponse(
        handles=np.array([kept, gone, other, gone + 1, kept + 1], "<u4").tobytes(),
        num_tokens=np.ones(5, "<u4").tobytes(),
        finish_reasons=bytes([STOP] * 5),
        token_ids=np.arange(5, 10, dtype="<i4").tobytes(),
        beam_scores=np.array([-1, -2, -3, -4], "<f4").tobytes(),
    )
    loop.call(gateway.engine.send, response)
    [response] = calls[2]
    assert [(output.token_ids, output.beam_score) for output in response.outputs] == [([5], -1), ([9], -4)]
    [response] = calls[1]
    assert not response.outputs[0].HasField("beam_score")


def test_only_the_latest_released_handles_are_kept():
    released = ReleasedBeams(max_handles=4)
    for first in range(0, 10, 2):
        released.add([first, first + 1])
    assert [released.take(handle) for handle in (5, 6, 6, 9)] == [False, True, False, True]
