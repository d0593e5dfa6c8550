"""The coordinator of a running server is killed and stopped under 16 streams, and a gateway beside another: each stream
that has a reader ends with the tokens that it has where nothing happens, and none comes twice."""

import contextlib
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest
from octavo.proto import admin_pb2, admin_pb2_grpc, generation_pb2_grpc

from .test_rank_deaths import READY, Server, ask, ask_all, request_of, running, streams_beside

pytestmark = pytest.mark.alone


def process_of(server: Server, module: str, index: int = 0) -> psutil.Process:
    family = psutil.Process(server.process.pid).children(recursive=True)
    return sorted((process for process in family if module in command_of(process)), key=command_of)[index]


def command_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def coordinator_of(server: Server) -> psutil.Process:
    return process_of(server, "octavo.coordinator")


def wait_for_another_coordinator(server: Server, before: int, timeout_s: float) -> float:
    """Until the one that had that process id has been followed; how long that took."""
    started = time.monotonic()
    while True:
        with contextlib.suppress(IndexError):
            if coordinator_of(server).pid != before:
                return time.monotonic() - started
        assert time.monotonic() - started < timeout_s, server.lines
        time.sleep(0.01)


def wait_until_serving(server: Server, incarnation: int, timeout_s: float = 30) -> float:
    """Until all groups serve under that coordinator; how long that took."""
    started = time.monotonic()
    while True:
        with contextlib.suppress(grpc.RpcError):
            groups = server.groups()
            if groups and all(g.state == READY and g.epoch // 1_000_000 == incarnation for g in groups):
                return time.monotonic() - started
        assert time.monotonic() - started < timeout_s, server.lines
        time.sleep(0.01)


def incarnation_of(server: Server) -> int:
    return server.groups()[0].epoch // 1_000_000


def ranks_of(server: Server) -> list[str]:
    return [rank.address for rank in server.groups()[0].ranks]


@pytest.fixture(scope="module")
def server():
    with running("--tensor-parallel-size", "2", "--num-gateways", "2", "--max-restarts", "20") as started:
        yield started


@pytest.fixture(scope="module")
def expected(server):
    """What an undisturbed server answers."""
    return ask_all(server)


def test_the_coordinator_is_killed(server, expected, record_property):
    incarnation, ranks = incarnation_of(server), ranks_of(server)
    with streams_beside(server, expected):
        victim, killed_at = coordinator_of(server), time.monotonic()
        victim.kill()
        detection_s = wait_for_another_coordinator(server, victim.pid, timeout_s=10)
        assert ask(server, 0)[0] == expected[0][0]  # a new one waits for it
        wait_until_serving(server, incarnation + 1)
        recovery_s = seconds_of(server.wait_until_said("coordinator was killed by signal 9"))
        record_property("detection_s", detection_s)
        record_property("recovery_s", recovery_s)
        print(f"killed: noticed after {detection_s:.2f} s, all serves after {recovery_s:.1f} s")
        print(f"a new request had ended after {time.monotonic() - killed_at:.1f} s")
    assert ranks_of(server) == ranks  # and with them the weights
    assert not any("started rank" in line for line in server.lines)


def seconds_of(line: str) -> float:
    return float(re.fullmatch(r".*; started anew, serves again after (\d+\.\d) s", line)[1])


def test_the_coordinator_and_a_rank_are_killed_at_once(server, expected):
    incarnation, ranks = incarnation_of(server), ranks_of(server)
    with streams_beside(server, expected):
        rank, coordinator = server.process_of(0, 1), coordinator_of(server)
        rank.kill()
        coordinator.kill()
        print(f"with a rank: all serves after {wait_until_serving(server, incarnation + 1):.2f} s")
    assert [old == new for old, new in zip(ranks, ranks_of(server), strict=True)] == [True, False]
    server.wait_until_said("started rank 1 anew, serves again after")


def test_the_coordinator_is_stopped(server, expected):
    incarnation = incarnation_of(server)
    with streams_beside(server, expected):
        victim = coordinator_of(server)
        victim.suspend()
        detection_s = wait_for_another_coordinator(server, victim.pid, timeout_s=40)
        recovery_s = wait_until_serving(server, incarnation + 1)
        print(f"stopped: noticed after {detection_s:.1f} s, all serves {recovery_s:.2f} s later")
    assert not victim.is_running()
    server.wait_until_said("coordinator did not answer for 8 s, and was killed; started anew, serves again after")


def test_the_coordinator_is_killed_twice_in_a_row(server, expected):
    incarnation, ranks = incarnation_of(server), ranks_of(server)
    with streams_beside(server, expected):
        killed_at = time.monotonic()
        for _ in range(2):
            victim = coordinator_of(server)
            victim.kill()
            wait_for_another_coordinator(server, victim.pid, timeout_s=10)
        wait_until_serving(server, incarnation + 2)
        print(f"killed twice: all serves after {time.monotonic() - killed_at:.2f} s")
    assert ranks_of(server) == ranks


class Gateway:
    """One of a server's gateways, at the door of its own."""

    def __init__(self, server: Server, index: int) -> None:
        self._server, self._index, self.device = server, index, server.device
        config = Path(command_of(self.process).split()[-1])
        self._channel = grpc.insecure_channel(f"unix:{config.with_name(f'gateway-{index}.sock')}")
        self.generation = generation_pb2_grpc.GenerationStub(self._channel)
        self._admin = admin_pb2_grpc.AdminStub(self._channel)

    @property
    def process(self) -> psutil.Process:
        return process_of(self._server, f"gateway-{self._index}.json")

    def status(self) -> admin_pb2.GetStatusResponse:
        return self._admin.GetStatus(admin_pb2.GetStatusRequest())

    def close(self) -> None:
        self._channel.close()


def outcome(gateway: Gateway, index: int):
    """As `ask`, or the status that the call ended with."""
    try:
        return ask(gateway, index)
    except grpc.RpcError as error:
        return error.code()


def test_a_gateway_is_lost_and_only_its_own_clients_notice(server, expected):
    lose_gateway(server, 0, lambda process: process.kill(), "was killed by signal 9", expected)
    lose_gateway(server, 1, lambda process: process.suspend(), "did not answer for 8 s, and was killed", expected)


def lose_gateway(server, lost_index, attack, why, expected) -> None:
    """With 8 requests of its own, and 8 of the other's. It comes back, and serves."""
    lost_one, other = Gateway(server, lost_index), Gateway(server, 1 - lost_index)
    with ThreadPoolExecutor(16) as pool:
        lost = [pool.submit(outcome, lost_one, index) for index in range(8)]
        kept = [pool.submit(outcome, other, index) for index in range(8)]
        deadline = time.monotonic() + 20
        while server.groups()[0].num_running < 12:
            assert time.monotonic() < deadline, [future for future in (*lost, *kept) if future.done()]
            time.sleep(0.01)
        before, status = server.groups()[0], other.status()
        attack(lost_one.process)
        lost_at = time.monotonic()
        assert {future.result(30) for future in lost} == {grpc.StatusCode.UNAVAILABLE}
        found = [future.result(60) for future in kept]
    assert [one[0] for one in found] == [one[0] for one in expected[:8]]
    after = other.status()
    assert status.num_gateways == 2
    assert (after.groups[0].epoch, after.groups[0].num_restarts) == (before.epoch, before.num_restarts)
    assert after.counters.num_failed == status.counters.num_failed
    assert after.groups[0].num_free_blocks == after.groups[0].num_blocks
    said = server.wait_until_said(f"gateway {lost_index} {why}; started anew, serves again after", 30)
    print(f"{said}; seen {time.monotonic() - lost_at:.1f} s later")
    lost_one.close()
    again = Gateway(server, lost_index)
    assert ask(again, 0)[0] == expected[0][0]
    for gateway in (other, again):
        gateway.close()


def test_a_drain_outlives_a_coordinator_that_is_told_to_end(server):
    """The last one of that server."""
    request = request_of(0)
    request.sampling_params.max_tokens = num_tokens = 200
    stream = server.generation.Generate(request)
    tokens = [*next(stream).outputs[0].token_ids]
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    coordinator_of(server).terminate()
    tokens += [token for response in stream for output in response.outputs for token in output.token_ids]
    assert len(tokens) == num_tokens
    assert server.wait_until_ended() == 0
    assert any("coordinator ended with status 0" in line for line in server.lines)


def test_one_death_too_many_ends_the_server_in_one_line():
    with running("--max-restarts", "1") as server:
        stream = server.generation.Generate(request_of(0))
        next(stream)
        coordinator_of(server).kill()
        wait_until_serving(server, 1)
        coordinator_of(server).kill()
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert server.wait_until_ended() == 1
        [said] = [line for line in server.lines if line.startswith("octavo: ")]
        why = "coordinator failed 2 time(s) within 10 minutes and is given up; the last time: coordinator was killed by"
        assert why in said
