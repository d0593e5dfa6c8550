"""Clients that go away, and an engine that does."""

import threading

import grpc
import httpx
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from octavo.proto import admin_pb2, generation_pb2
from octavo.proto.generation_pb2 import GenerateRequest, TokenIds

LONG_TEXT = "the quick brown fox jumps over the lazy dog"


def cancelled(gateway, eventually):
    """Waits until the engine hears that its one request has no reader, and nothing else."""
    eventually(lambda: gateway.engine.cancels)
    assert gateway.engine.cancels == [gateway.engine.submits[0].handle]


@pytest.mark.parametrize("mode", [generation_pb2.OUTPUT_MODE_DELTA, generation_pb2.OUTPUT_MODE_FINAL])
def test_a_cancelled_grpc_call_cancels_the_request(gateway, eventually, mode):
    gateway.engine.say(LONG_TEXT, hold_after=2)
    call = gateway.generation.Generate(GenerateRequest(text="a", output_mode=mode))
    if mode == generation_pb2.OUTPUT_MODE_DELTA:
        next(call)
    eventually(lambda: gateway.engine.submits)
    call.cancel()
    cancelled(gateway, eventually)


def test_a_deadline_cancels_the_request(gateway, eventually):
    gateway.engine.say(LONG_TEXT, hold_after=2)
    with pytest.raises(grpc.RpcError) as caught:
        list(gateway.generation.Generate(GenerateRequest(text="a"), timeout=0.2))
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    cancelled(gateway, eventually)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("prompt", [{"prompt": "a"}, {"prompt": ["a"]}])
def test_a_closed_event_stream_cancels_the_request(gateway, eventually, path, prompt):
    gateway.engine.say(LONG_TEXT, hold_after=2)
    body = prompt if path == "completions" else {"messages": [{"role": "user", "content": "a"}]}
    with gateway.http.stream("POST", f"/v1/{path}", json={**body, "stream": True}) as response:
        next(response.iter_lines())
    cancelled(gateway, eventually)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_before_the_first_token_cancels_the_request(gateway, eventually, stream):
    gateway.engine.say(LONG_TEXT, hold_after=0)
    with pytest.raises(httpx.ReadTimeout):
        gateway.http.post("/v1/completions", json={"prompt": "a", "stream": stream}, timeout=0.2)
    cancelled(gateway, eventually)


def test_all_prompts_of_a_call_are_cancelled(gateway, eventually):
    gateway.engine.say(LONG_TEXT, hold_after=2)
    with pytest.raises(httpx.ReadTimeout):
        gateway.http.post("/v1/completions", json={"prompt": ["a", "b", "c"]}, timeout=0.2)
    eventually(lambda: sorted(gateway.engine.cancels) == sorted(s.handle for s in gateway.engine.submits))
    assert len(gateway.engine.cancels) == 3


def test_a_finished_request_is_not_cancelled(gateway):
    gateway.engine.say("fox")
    gateway.openai.completions.create(model="tiny", prompt="a")
    list(gateway.generation.Generate(GenerateRequest(text="a")))
    gateway.admin.GetStatus(admin_pb2.GetStatusRequest())  # a round trip to the engine: a cancel would have come
    assert gateway.engine.cancels == []


def readiness(gateway):
    health = health_pb2_grpc.HealthStub(gateway.channel)
    return health.Check(health_pb2.HealthCheckRequest(service="")).status


def test_loss_of_the_engine_and_recovery_where_no_other_follows(start_gateway, loop, eventually):
    """Repeated: what an ended session leaves behind must not take the requests of the next."""
    with start_gateway(max_outage_s=0) as own:
        for _ in range(3):
            own.engine.say(LONG_TEXT, hold_after=2)
            call = own.generation.Generate(GenerateRequest(text="a"))
            next(call)
            loop.call(own.engine.accepts.clear)
            loop.call(own.engine.break_sessions)
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            assert readiness(own) == health_pb2.HealthCheckResponse.NOT_SERVING
            assert own.http.get("/health").status_code == 503
            with pytest.raises(openai.InternalServerError) as refusal:
                own.openai.completions.create(model="tiny", prompt="a")
            assert refusal.value.status_code == 503
            liveness = health_pb2.HealthCheckRequest(service="liveness")
            status = health_pb2_grpc.HealthStub(own.channel).Check(liveness).status
            assert status == health_pb2.HealthCheckResponse.SERVING
            loop.call(own.engine.accepts.set)
            eventually(lambda: readiness(own) == health_pb2.HealthCheckResponse.SERVING)
            own.engine.say("fox")
            assert own.openai.completions.create(model="tiny", prompt="a").choices[0].text == "fox"


def test_a_dead_engine(start_gateway, loop, eventually):
    with start_gateway(max_outage_s=0) as own:
        loop.run(own.engine_server.stop(0))
        eventually(lambda: readiness(own) == health_pb2.HealthCheckResponse.NOT_SERVING)
        for call in (
            lambda: list(own.generation.Generate(GenerateRequest(text="a"))),
            lambda: own.admin.GetStatus(admin_pb2.GetStatusRequest()),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_token_ids_only(start_gateway):
    with start_gateway(skip_tokenizer_init=True, model_path="") as own:
        token_ids = own.engine.say("the fox")
        [*_, last] = own.generation.Generate(GenerateRequest(token_ids=TokenIds(ids=[7, 8])))
        assert last.outputs[0].text == ""
        assert last.usage.completion_tokens == len(token_ids)
        extra = {"return_token_ids": True}
        answer = own.openai.completions.create(model="tiny", prompt=[7, 8], logprobs=1, extra_body=extra)
        choice = answer.choices[0].model_dump()
        assert (choice["text"], choice["token_ids"]) == ("", token_ids)
        assert choice["logprobs"]["tokens"] == [f"token_id:{token_id}" for token_id in token_ids]
        for body, param in (({"prompt": "a"}, "prompt"), ({"prompt": [7], "stop": ["a"]}, "stop")):
            response = own.http.post("/v1/completions", json=body)
            assert (response.status_code, response.json()["error"]["param"]) == (400, param)
        with pytest.raises(grpc.RpcError) as caught:
            list(own.generation.Generate(GenerateRequest(text="a")))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_running_requests_may_end_when_the_gateway_stops(start_gateway, loop):
    with start_gateway(shutdown_timeout_s=20) as own:
        own.engine.say(LONG_TEXT, hold_after=2)
        call = own.generation.Generate(GenerateRequest(text="a"))
        text = next(call).outputs[0].text
        with own.http.stream("POST", "/v1/completions", json={"prompt": "a", "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            loop.call(own.gateway.stop)
            loop.call(own.engine.hold.set)
            assert text + "".join(r.outputs[0].text for r in call) == LONG_TEXT
            assert [line for line in lines if line][-1] == "data: [DONE]"
        own.running.result(timeout=10)


def test_many_clients_at_once(gateway):
    token_ids = gateway.engine.say(LONG_TEXT)
    texts = [""] * 64

    def generate(index):
        responses = list(gateway.generation.Generate(GenerateRequest(text=f"number {index}"), timeout=60))
        texts[index] = "".join(response.outputs[0].text for response in responses)
        assert responses[-1].usage.completion_tokens == len(token_ids)

    threads = [threading.Thread(target=generate, args=(index,)) for index in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [LONG_TEXT] * 64
