"""The end of a gateway: what runs is finished, what is new is refused, what takes too long is told."""

import contextlib
import json
import signal
import subprocess
import threading
import time

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from octavo.proto import admin_pb2, generation_pb2, generation_pb2_grpc
from octavo.proto.generation_pb2 import GenerateRequest, TokenizeRequest

from .test_process import config, gateway_process  # noqa: F401 (a fixture)

LONG_TEXT = "the quick brown fox jumps over the lazy dog"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def health_of(gateway, service=""):
    stub = health_pb2_grpc.HealthStub(gateway.channel)
    return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status


class OpenStreams:
    """A stream at each door, its first token read, the rest held back."""

    def __init__(self, gateway, eventually) -> None:
        gateway.engine.say(LONG_TEXT, hold_after=1)
        self.call = gateway.generation.Generate(GenerateRequest(text="a"))
        self.responses = [next(self.call)]
        self.final = None
        self.events: list[str] = []
        self._threads = [
            threading.Thread(target=self._read_events, args=(gateway,)),
            threading.Thread(target=self._read_final, args=(gateway,)),
        ]
        for thread in self._threads:
            thread.start()
        eventually(lambda: self.events and len(gateway.engine.submits) == 3)

    def _read_events(self, gateway) -> None:
        body = {"prompt": "a", "stream": True, "max_tokens": 100}
        with gateway.http.stream("POST", "/v1/completions", json=body) as response:
            for line in response.iter_lines():
                if line:
                    self.events.append(line.removeprefix("data: "))

    def _read_final(self, gateway) -> None:
        self.final = httpx.post(f"{gateway.http.base_url}/v1/completions", json={"prompt": "a", "max_tokens": 100})

    def join(self) -> None:
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()


def assert_refused_over_grpc(call) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "shutting down" in caught.value.details()
    [detail] = rpc_status.from_call(caught.value).details
    retry = error_details_pb2.RetryInfo()
    assert detail.Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 1000


def assert_refused_over_http(gateway, path, body) -> None:
    answer = httpx.post(f"{gateway.http.base_url}{path}", json=body)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert answer.headers["connection"] == "close"
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("service_unavailable_error", "unavailable")


def test_what_runs_is_finished_while_what_is_new_is_refused(start_gateway, loop, eventually):
    with start_gateway(shutdown_timeout_s=20) as own:
        streams = OpenStreams(own, eventually)
        loop.call(own.gateway.stop)
        assert httpx.get(f"{own.http.base_url}/health").status_code == 503
        eventually(lambda: health_of(own) == NOT_SERVING)
        assert health_of(own, "octavo.v1.Generation") == NOT_SERVING
        assert health_of(own, "liveness") == SERVING
        assert_refused_over_grpc(lambda: list(own.generation.Generate(GenerateRequest(text="b"))))
        assert_refused_over_grpc(lambda: own.generation.Tokenize(TokenizeRequest(text="b")))
        with grpc.insecure_channel(own.settings.local_address) as fresh:
            stub = generation_pb2_grpc.GenerationStub(fresh)
            assert_refused_over_grpc(lambda: list(stub.Generate(GenerateRequest(text="b"))))
        messages = [{"role": "user", "content": "b"}]
        assert_refused_over_http(own, "/v1/completions", {"prompt": "b", "stream": True})
        assert_refused_over_http(own, "/v1/chat/completions", {"messages": messages})
        assert_refused_over_http(own, "/tokenize", {"prompt": "b"})
        assert own.admin.GetStatus(admin_pb2.GetStatusRequest()).model == "tiny"
        assert not own.running.done()
        loop.call(own.engine.hold.set)
        streams.responses += streams.call
        streams.join()
        own.running.result(timeout=5)
        assert "".join(response.outputs[0].text for response in streams.responses) == LONG_TEXT
        assert streams.events[-1] == "[DONE]"
        assert "".join(json.loads(event)["choices"][0]["text"] for event in streams.events[:-1]) == LONG_TEXT
        assert streams.final.json()["choices"][0]["text"] == LONG_TEXT
        assert len(own.engine.submits) == 3
        assert own.engine.cancels == []


def test_who_asks_again_as_the_last_call_ends_is_refused_in_words(start_gateway, loop, eventually):
    with start_gateway(shutdown_timeout_s=20) as own:
        own.engine.say(LONG_TEXT, hold_after=1)
        heard = []

        def ask_until_refused(channel):
            stub = generation_pb2_grpc.GenerationStub(channel)
            try:
                while True:
                    list(stub.Generate(GenerateRequest(text="a")))
            except grpc.RpcError as error:
                heard.append((error.code(), "shutting down" in error.details()))

        with contextlib.ExitStack() as stack:
            channels = [stack.enter_context(grpc.insecure_channel(own.settings.local_address)) for _ in range(8)]
            threads = [threading.Thread(target=ask_until_refused, args=[channel]) for channel in channels]
            for thread in threads:
                thread.start()
            eventually(lambda: len(own.engine.submits) == len(threads))
            loop.call(own.gateway.stop)
            loop.call(own.engine.hold.set)
            for thread in threads:
                thread.join(10)
            own.running.result(timeout=10)
        assert heard == [(grpc.StatusCode.UNAVAILABLE, True)] * len(threads)


@pytest.mark.parametrize("asks_again", [False, True])
def test_what_takes_too_long_is_told_so(start_gateway, loop, eventually, asks_again):
    with start_gateway(shutdown_timeout_s=60 if asks_again else 0.3) as own:
        streams = OpenStreams(own, eventually)
        loop.call(own.gateway.stop)
        if asks_again:
            time.sleep(0.1)
            assert not own.running.done()
            loop.call(own.gateway.stop)
        with pytest.raises(grpc.RpcError) as caught:
            list(streams.call)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "before this request had ended" in caught.value.details()
        streams.join()
        assert json.loads(streams.events[-2])["error"]["code"] == "unavailable"
        assert streams.events[-1] == "[DONE]"
        assert streams.final.status_code == 503
        own.running.result(timeout=5)
        eventually(lambda: sorted(own.engine.cancels) == sorted(submit.handle for submit in own.engine.submits))


def test_an_idle_gateway_ends_at_once(start_gateway, loop):
    with start_gateway(shutdown_timeout_s=60) as own:
        assert own.generation.ListModels(generation_pb2.ListModelsRequest()).models
        started = time.monotonic()
        loop.call(own.gateway.stop)
        own.running.result(timeout=5)
        assert time.monotonic() - started < 3


@pytest.mark.parametrize("num_signals", [1, 2])
def test_sigterm_to_a_process(gateway, loop, config, tmp_path, eventually, num_signals):  # noqa: F811
    """The one beside it serves on."""
    gateway.engine.say(LONG_TEXT, hold_after=1)
    settings = {**config, "shutdownTimeoutS": 30}
    with (
        gateway_process(tmp_path, settings, stdin=subprocess.PIPE) as process,
        grpc.insecure_channel(config["localAddress"]) as channel,
        grpc.insecure_channel(gateway.settings.local_address) as other,  # the ports are both gateways'
    ):

        def status(channel):
            stub = health_pb2_grpc.HealthStub(channel)
            return stub.Check(health_pb2.HealthCheckRequest(), timeout=60, wait_for_ready=True).status

        eventually(lambda: status(channel) == SERVING, timeout_s=60)
        call = generation_pb2_grpc.GenerationStub(channel).Generate(GenerateRequest(text="a"))
        texts = [next(call).outputs[0].text]
        process.send_signal(signal.SIGTERM)
        eventually(lambda: status(channel) == NOT_SERVING)
        assert status(other) == SERVING
        if num_signals == 1:
            loop.call(gateway.engine.hold.set)
            texts += [response.outputs[0].text for response in call]
            assert "".join(texts) == LONG_TEXT
        else:
            process.send_signal(signal.SIGTERM)
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert process.wait(timeout=5) == 0
        assert "Traceback" not in process.stderr.read()
        gateway.engine.say("fox")
        responses = generation_pb2_grpc.GenerationStub(other).Generate(GenerateRequest(text="a"))
        assert "".join(response.outputs[0].text for response in responses) == "fox"
    assert not (tmp_path / "second.sock").exists()
