"""An engine that goes away and another that comes: requests go on where they were, and nobody reads a token twice."""

import threading
import time

import grpc
import numpy as np
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from octavo.proto import admin_pb2, engine_pb2, generation_pb2, sampling_pb2
from octavo.proto.generation_pb2 import GenerateRequest, SamplingParams

LONG_TEXT = "the quick brown fox jumps over the lazy dog"
TEXTS = ["the quick fox", "a lazy dog", "brown"]
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
FINAL = generation_pb2.OUTPUT_MODE_FINAL


class Outage:
    """Breaks a gateway's session, and lets the next one stand when told to."""

    def __init__(self, gateway, loop, eventually) -> None:
        self.engine, self._gateway, self._loop, self._eventually = gateway.engine, gateway, loop, eventually

    def begin(self) -> None:
        self._loop.call(self.engine.accepts.clear)
        self._loop.call(self.engine.break_sessions)
        self._eventually(lambda: self._health() == NOT_SERVING)
        self.num_before = len(self.engine.submits)

    def end(self) -> None:
        self._loop.call(self.engine.hold.set)
        self._loop.call(self.engine.accepts.set)

    def _health(self):
        return health_pb2_grpc.HealthStub(self._gateway.channel).Check(health_pb2.HealthCheckRequest()).status

    @property
    def resumed(self) -> list[engine_pb2.Submit]:
        """What was sent since it began."""
        return self.engine.submits[self.num_before :]


@pytest.fixture
def outage(gateway, loop, eventually):
    yield Outage(gateway, loop, eventually)
    loop.call(gateway.engine.accepts.set)


def generate(gateway, mode=generation_pb2.OUTPUT_MODE_DELTA, **params):
    request = GenerateRequest(text="a", sampling_params=SamplingParams(**params), output_mode=mode)
    return gateway.generation.Generate(request, timeout=30)


def tokens_of(responses, index=0):
    return [t for response in responses for o in response.outputs if o.index == index for t in o.token_ids]


def received(submit):
    return {output.index: np.frombuffer(output.token_ids, "<i4").tolist() for output in submit.resumed}


def test_a_stream_goes_on_behind_the_tokens_that_came(gateway, outage):
    token_ids = gateway.engine.say(LONG_TEXT, hold_after=3)
    call = generate(gateway, logprobs=1, max_tokens=100)
    first = [next(call) for _ in range(3)]
    outage.begin()
    outage.end()
    responses = first + list(call)
    assert tokens_of(responses) == token_ids
    assert "".join(response.outputs[0].text for response in responses) == LONG_TEXT
    assert len([row for response in responses for row in response.outputs[0].logprobs]) == len(token_ids)
    assert responses[-1].usage.completion_tokens == len(token_ids)
    before, after = gateway.engine.submits
    assert received(after) == {0: token_ids[:3]}
    after.ClearField("resumed")
    assert after == before  # the same handle, seed and all else


def test_several_outages_and_none_shows_in_the_stream(gateway, outage, loop):
    token_ids = gateway.engine.say(LONG_TEXT, hold_after=2)
    call = generate(gateway, max_tokens=100)
    responses = [next(call), next(call)]
    for num_received in (2, 4, 6):
        outage.begin()
        gateway.engine.answer.hold_after = num_received + 2
        loop.call(gateway.engine.hold.clear)
        loop.call(gateway.engine.accepts.set)
        responses += [next(call), next(call)]
    loop.call(gateway.engine.hold.set)
    assert tokens_of(responses + list(call)) == token_ids
    assert [received(submit) for submit in gateway.engine.submits[1:]] == [{0: token_ids[:n]} for n in (2, 4, 6)]


def test_only_the_samples_that_have_not_ended_go_on(gateway, outage, eventually):
    samples = gateway.engine.say_samples(TEXTS[0], "a", TEXTS[0] + LONG_TEXT, hold_after=2)
    call = generate(gateway, n=3, max_tokens=100)
    responses = []
    while [len(tokens_of(responses, index)) for index in range(3)] != [2, 2, 2]:
        responses.append(next(call))
    outage.begin()
    outage.end()
    responses += list(call)
    assert [tokens_of(responses, index) for index in range(3)] == samples
    assert received(outage.resumed[0]) == {0: samples[0][:2], 2: samples[2][:2]}
    assert outage.resumed[0].num_samples == 3


def test_the_first_sample_has_ended_and_the_request_is_refused_then(gateway, outage, loop):
    gateway.engine.say_samples("a", LONG_TEXT, hold_after=2)
    call = generate(gateway, n=2, max_tokens=100)
    responses = []
    while [len(tokens_of(responses, index)) for index in range(2)] != [2, 2]:
        responses.append(next(call))
    outage.begin()
    gateway.engine.fail(3, "it cannot go on", field="resumed")
    outage.end()
    with pytest.raises(grpc.RpcError, match="it cannot go on"):
        list(call)


def test_prompt_logprobs_come_once(gateway, outage):
    gateway.engine.say("fox", num_first_prompt_logprobs=2)
    prompt = generation_pb2.TokenIds(ids=[5, 6, 7, 8, 9, 10])
    call = gateway.generation.Generate(
        GenerateRequest(token_ids=prompt, sampling_params=SamplingParams(prompt_logprobs=1), output_mode=FINAL)
    )
    while not gateway.engine.submits:
        time.sleep(0.01)
    gateway.admin.GetStatus(admin_pb2.GetStatusRequest())  # a round trip: the first chunk is there
    outage.begin()
    outage.end()
    [response] = call
    assert [row.token.token_id for row in response.prompt_logprobs] == [
        0,
        6,
        7,
        8,
        9,
        10,
    ]  # of the first nothing is said
    assert [output.num_prompt_logprobs for output in outage.resumed[0].resumed] == [2]


def test_a_stop_string_across_the_outage_still_ends_the_stream(gateway, outage):
    token_ids = gateway.engine.say(LONG_TEXT, hold_after=2)
    call = generate(gateway, stop=["fox jumps"], max_tokens=100)
    first = [next(call), next(call)]
    outage.begin()
    outage.end()
    responses = first + list(call)
    assert "".join(response.outputs[0].text for response in responses) == "the quick brown "
    assert tokens_of(responses) == token_ids[: len(tokens_of(responses))]


@pytest.mark.parametrize("door", ["grpc", "http"])
def test_a_whole_answer_is_whole(gateway, outage, door, eventually):
    token_ids = gateway.engine.say(LONG_TEXT, hold_after=4)
    answers = []

    def ask():
        if door == "grpc":
            [response] = generate(gateway, FINAL, max_tokens=100)
            answers.append((tokens_of([response]), response.outputs[0].text))
        else:
            extra = {"return_token_ids": True}
            choice = gateway.openai.completions.create(
                model="tiny", prompt="a", max_tokens=100, extra_body=extra
            ).choices[0]
            answers.append((choice.model_dump()["token_ids"], choice.text))

    thread = threading.Thread(target=ask)
    thread.start()
    eventually(lambda: gateway.engine.submits)
    gateway.admin.GetStatus(admin_pb2.GetStatusRequest())
    outage.begin()
    outage.end()
    thread.join(20)
    assert answers == [(token_ids, LONG_TEXT)]
    assert received(outage.resumed[0]) == {0: token_ids[:4]}


def test_a_beam_search_begins_again(gateway, outage, eventually):
    samples = gateway.engine.say_samples(*TEXTS, hold_after=0, beam_scores=[-0.5, -1.0, -2.0])
    call = generate(gateway, FINAL, n=2, num_beams=3)
    eventually(lambda: gateway.engine.submits)
    outage.begin()
    outage.end()
    [response] = call
    assert [list(output.token_ids) for output in response.outputs] == samples[:2]
    assert [output.beam_score for output in response.outputs] == [-0.5, -1.0]
    assert received(outage.resumed[0]) == {0: [], 1: []}


def test_requests_go_on_in_the_order_of_their_arrival_and_new_ones_follow(gateway, outage, eventually):
    token_ids = gateway.engine.say(LONG_TEXT, hold_after=1)
    calls = [generate(gateway, max_tokens=100) for _ in range(8)]
    first = [[next(call)] for call in calls]
    old = [submit.handle for submit in gateway.engine.submits]
    outage.begin()
    new = [generate(gateway, max_tokens=100) for _ in range(3)]  # they wait, as streams do
    time.sleep(0.3)  # they have arrived
    outage.end()
    assert all(tokens_of(one + list(call)) == token_ids for one, call in zip(first, calls, strict=True))
    assert all(tokens_of(call) == token_ids for call in new)
    sent = outage.resumed
    assert [submit.handle for submit in sent[:8]] == old
    assert [len(submit.resumed) for submit in sent] == [1] * 8 + [0] * 3


def test_what_was_cancelled_meanwhile_is_not_sent_again(gateway, outage):
    gateway.engine.say(LONG_TEXT, hold_after=1)
    kept, cancelled = generate(gateway, max_tokens=100), generate(gateway, max_tokens=100)
    next(kept), next(cancelled)
    outage.begin()
    held = generate(gateway)
    time.sleep(0.2)
    cancelled.cancel()
    held.cancel()
    time.sleep(0.3)  # the gateway has heard of it
    outage.end()
    list(kept)
    assert len(outage.resumed) == 1
    assert gateway.engine.cancels == []


def test_a_finished_request_is_not_sent_again(gateway, outage, eventually):
    gateway.engine.say("fox")
    list(generate(gateway))
    outage.begin()
    outage.end()
    list(generate(gateway))
    assert [len(submit.resumed) for submit in outage.resumed] == [0]


def test_after_so_long_all_end(start_gateway, loop, eventually):
    with start_gateway(max_outage_s=0.5) as own:
        own.engine.say(LONG_TEXT, hold_after=1)
        call = generate(own)
        next(call)
        outage = Outage(own, loop, eventually)
        outage.begin()
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        with pytest.raises(openai.InternalServerError) as refusal:  # nobody knows of another
            own.openai.completions.create(model="tiny", prompt="a")
        assert refusal.value.status_code == 503
        outage.end()
        eventually(lambda: own.http.get("/health").status_code == 200)
        own.engine.say("fox")
        assert own.openai.completions.create(model="tiny", prompt="a").choices[0].text == "fox"
        assert [len(submit.resumed) for submit in outage.resumed] == [0]


def test_a_gateway_that_stops_gives_up_what_waits(start_gateway, loop, eventually):
    with start_gateway(shutdown_timeout_s=0.3) as own:
        own.engine.say(LONG_TEXT, hold_after=1)
        call = generate(own)
        next(call)
        Outage(own, loop, eventually).begin()
        loop.call(own.gateway.stop)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "shut down" in caught.value.details()
        loop.call(own.engine.accepts.set)


def test_requests_that_break_each_session_end(start_gateway, loop):
    with start_gateway() as own:
        own.engine.say(LONG_TEXT, hold_after=1)
        call = generate(own)
        next(call)
        table = sampling_pb2.LogprobTable(num_columns=3, token_ids=b"\0" * 8)
        handle = own.engine.submits[0].handle
        broken = engine_pb2.SessionResponse(prompt_logprobs=[engine_pb2.PromptLogprobs(handle=handle, table=table)])

        ended = threading.Event()

        def keep_breaking():
            while not ended.wait(0.05):
                loop.call(own.engine.send, broken)

        breaking = threading.Thread(target=keep_breaking)
        breaking.start()
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        ended.set()
        breaking.join()
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_handles_of_requests_that_go_on_are_not_given_out_again(gateway, outage):
    gateway.engine.say(LONG_TEXT, hold_after=1)
    kept = generate(gateway, n=2, temperature=1.0, max_tokens=100)
    next(kept)
    outage.begin()
    outage.end()
    others = [generate(gateway, max_tokens=100) for _ in range(4)]
    list(kept)
    for call in others:
        list(call)
    taken = [submit.handle + index for submit in outage.resumed for index in range(submit.num_samples)]
    assert len(set(taken)) == len(taken)
