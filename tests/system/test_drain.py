"""The end of a whole server under load: what it had accepted is finished or told so, and nothing is left behind."""

import os
import re
import signal
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from octavo.launch.run_dir import RunDir
from octavo.proto import generation_pb2, generation_pb2_grpc

from .test_process_deaths import Server

NUM_TOKENS = 150
ENDLESS = 1800  # tokens: some ten seconds and more


@contextmanager
def serving(*options, num_ranks=1):
    with tempfile.TemporaryDirectory(prefix="o", dir="/tmp") as parent:  # short: a socket's path is bounded
        server = Server(Path(parent), *options, num_ranks=num_ranks)
        try:
            yield server
        finally:
            server.close()


def request_of(max_tokens):
    sampling = generation_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=3)
    return generation_pb2.GenerateRequest(text="Once upon a time", sampling_params=sampling)


class Stream(threading.Thread):
    """One request at an address, read by a thread of its own."""

    def __init__(self, address, max_tokens) -> None:
        super().__init__(daemon=True)
        self.num_tokens = 0
        self.error: grpc.RpcError | None = None
        self._address, self._max_tokens = address, max_tokens
        self.start()

    def run(self) -> None:
        # Channels of one process share their connections unless told otherwise; a port's go to this or that gateway.
        with grpc.insecure_channel(self._address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            try:
                for response in generation_pb2_grpc.GenerationStub(channel).Generate(request_of(self._max_tokens)):
                    self.num_tokens += sum(len(output.token_ids) for output in response.outputs)
            except grpc.RpcError as error:
                self.error = error

    def wait_for_tokens(self) -> None:
        deadline = time.monotonic() + 30
        while not self.num_tokens:
            assert self.error is None, self.error
            assert time.monotonic() < deadline
            time.sleep(0.02)


def gateways_of(server) -> list[psutil.Process]:
    return [process for process in server.family if "octavo.gateway" in process.cmdline()]


def is_serving(channel) -> bool:
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    return answer.status == health_pb2.HealthCheckResponse.SERVING


def assert_drains(channel) -> None:
    """Health says so, and new work is refused."""
    deadline = time.monotonic() + 5
    while is_serving(channel):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(grpc.RpcError) as caught:
        list(generation_pb2_grpc.GenerationStub(channel).Generate(request_of(1)))
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "shutting down" in caught.value.details()


def test_a_gateway_alone_and_then_the_server_finish_what_runs():
    with serving("--num-gateways", "2", "--shutdown-timeout", "60") as server:
        [run_dir] = server.parent.glob("octavo-*")
        addresses = [f"unix:{run_dir}/gateway-{index}.sock" for index in range(2)]
        channels = [grpc.insecure_channel(address) for address in addresses]
        streams = [Stream(address, NUM_TOKENS) for address in addresses * 4]
        for stream in streams:
            stream.wait_for_tokens()
        gateways_of(server)[0].terminate()
        assert_drains(channels[0])
        assert is_serving(channels[1])
        for stream in streams:
            stream.join(30)
        assert [(stream.num_tokens, stream.error) for stream in streams] == [(NUM_TOKENS, None)] * 8
        assert gateways_of(server)[0].wait(10) in (0, None)
        public = f"localhost:{server.grpc_port}"
        streams = [Stream(public, NUM_TOKENS) for _ in range(8)]
        for stream in streams:
            stream.wait_for_tokens()
        # As a terminal does it: to every process that has not left the group.
        os.killpg(server.process.pid, signal.SIGINT)
        assert_drains(channels[1])
        for stream in streams:
            stream.join(30)
        assert [(stream.num_tokens, stream.error) for stream in streams] == [(NUM_TOKENS, None)] * 8
        assert server.wait() == 0
        assert any("gateway 0 was drained, and has ended; 1 go on" in line for line in server.lines), server.lines
        for channel in channels:
            channel.close()


@pytest.mark.parametrize("num_signals", [1, 2])
def test_what_does_not_end_in_time_is_told(num_signals):
    """After two signals at once, after one when the time is over."""
    with serving("--shutdown-timeout", "1" if num_signals == 1 else "60") as server:
        stream = Stream(f"localhost:{server.grpc_port}", ENDLESS)
        stream.wait_for_tokens()
        server.process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        if num_signals == 2:
            time.sleep(0.3)
            assert stream.is_alive()
            server.process.send_signal(signal.SIGTERM)
        stream.join(10)
        assert stream.error is not None
        assert stream.error.code() == grpc.StatusCode.UNAVAILABLE
        assert "before this request had ended" in stream.error.details()
        assert server.wait() == 0
        assert time.monotonic() - started < 15


def test_a_killed_launcher_takes_everything_along():
    with serving(num_ranks=2) as server:
        stream = Stream(f"localhost:{server.grpc_port}", ENDLESS)
        stream.wait_for_tokens()
        # Ray's agents try for a minute to tell the dead of each other, then they end too: not to be waited for here.
        agents = [process for process in server.family if re.match("ray::.*Agent", process.name())]
        server.family = [process for process in server.family if process not in agents]
        server.process.kill()
        for agent in agents:
            agent.kill()
        server.check_that_all_ended(15)
        stream.join(5)
        assert stream.error.code() == grpc.StatusCode.UNAVAILABLE
        # Its directory is left to the next one to start.
        RunDir(server.parent).remove()
        assert list(server.parent.glob("octavo-*")) == []
