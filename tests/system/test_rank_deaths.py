"""Ranks of a running server are killed and stopped under 16 streams: each stream ends with the tokens that it has where
nothing happens."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import psutil
import pytest
import torch
from octavo.proto import admin_pb2, admin_pb2_grpc, generation_pb2, generation_pb2_grpc

from .ports import free_port

pytestmark = pytest.mark.alone

START_TIMEOUT_S = 120
NUM_STREAMS = 16
NUM_TOKENS = {"cpu": 100, "cuda": 800}  # so that streams last for a second
REBUILD_TIMEOUT_S = 60
READY = admin_pb2.GROUP_STATE_READY


class Server:
    """`octavo serve`, on CPU ranks unless told otherwise, and clients of its gRPC door."""

    def __init__(self, *options: str, device: str = "cpu") -> None:
        port = free_port()
        self.device = device
        command = [sys.executable, "-m", "octavo", "serve", "--device", device, "--port", "0", "--grpc-port", str(port)]
        self.process = subprocess.Popen(
            [*command, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self.lines: list[str] = []
        self.seen_states: set[int] = set()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.address = f"localhost:{port}"
        self._channel = grpc.insecure_channel(self.address)
        self.generation = generation_pb2_grpc.GenerationStub(self._channel)
        self.admin = admin_pb2_grpc.AdminStub(self._channel)

    def _read(self) -> None:
        with self.process.stdout as lines:
            self.lines.extend(line.rstrip() for line in lines)

    def wait_until_said(self, words: str, timeout_s: float = START_TIMEOUT_S) -> str:
        deadline = time.monotonic() + timeout_s
        while not (said := [line for line in self.lines if words in line]):
            assert self.process.poll() is None, self.lines
            assert time.monotonic() < deadline, self.lines
            time.sleep(0.02)
        return said[-1]

    def groups(self) -> list[admin_pb2.GroupStatus]:
        return list(self.admin.GetStatus(admin_pb2.GetStatusRequest()).groups)

    def counters(self) -> admin_pb2.EngineCounters:
        return self.admin.GetStatus(admin_pb2.GetStatusRequest()).counters

    def process_of(self, group: int, rank: int) -> psutil.Process:
        port = int(self.groups()[group].ranks[rank].address.rpartition(":")[2])
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
                if "RankActor" in " ".join(process.cmdline()):
                    places = {c.laddr.port for c in process.net_connections() if c.status == psutil.CONN_LISTEN}
                    if port in places:
                        return process
        raise AssertionError(f"no process listens on {port}")

    def wait_until_noticed(self, group: int, epoch: int, timeout_s: float) -> float:
        """Until the group of that epoch serves no more; how long that took."""
        started = time.monotonic()
        while (now := self.groups()[group]).state == READY and now.epoch == epoch:
            assert time.monotonic() - started < timeout_s, self.lines
            time.sleep(0.005)
        return time.monotonic() - started

    def wait_until_whole(self, num_restarts: int, timeout_s: float = 30) -> float:
        started = time.monotonic()
        while True:
            groups = self.groups()
            self.seen_states.update(group.state for group in groups)
            if all(g.state == READY for g in groups) and sum(g.num_restarts for g in groups) == num_restarts:
                return time.monotonic() - started
            assert time.monotonic() - started < timeout_s, (groups, self.lines)
            time.sleep(0.01)

    def wait_until_ended(self) -> int:
        """Its exit status; all that it said is in `lines`."""
        status = self.process.wait(30)
        self._reader.join(5)
        return status

    def close(self) -> None:
        self._channel.close()
        family = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.send_signal(signal.SIGINT)
        assert self.wait_until_ended() == 0
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive, alive


@contextmanager
def running(*options: str, device: str = "cpu"):
    server = Server(*options, device=device)
    try:
        server.wait_until_said("Ctrl-C stops it")
        yield server
    finally:
        if server.process.poll() is None:
            server.close()


# What must survive a move: each kind of request in turn.
KINDS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "presence_penalty": 0.6, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
    {"temperature": 1.0, "top_p": 0.9, "logprobs": 3},
    {"temperature": 1.0, "n": 3},
    {"temperature": 1.0, "stop": ["ou", "??"], "ignore_eos": False},
    {"temperature": 0.0, "prompt_logprobs": 1},
    {"temperature": 0.0, "num_beams": 3, "n": 2, "max_tokens": 50},
]


def request_of(index: int, device: str = "cpu") -> generation_pb2.GenerateRequest:
    kind = {"max_tokens": NUM_TOKENS[device], "ignore_eos": True} | KINDS[index % len(KINDS)]
    if "num_beams" not in kind:
        kind["seed"] = index
    request = generation_pb2.GenerateRequest(
        text=f"Once upon a time there were {index} foxes", sampling_params=generation_pb2.SamplingParams(**kind)
    )
    if "num_beams" in kind:
        request.output_mode = generation_pb2.OUTPUT_MODE_FINAL
    return request


def ask(server: Server, index: int):
    """Of each output: its tokens, its text, why it ended, and the logprobs of the tokens; and those of the prompt."""
    tokens, texts, reasons, logprobs, prompt = {}, {}, {}, {}, []
    for response in server.generation.Generate(request_of(index, server.device)):
        prompt += [entry.token.logprob for entry in response.prompt_logprobs]
        for output in response.outputs:
            tokens.setdefault(output.index, []).extend(output.token_ids)
            texts[output.index] = texts.get(output.index, "") + output.text
            reasons[output.index] = output.finish_reason
            logprobs.setdefault(output.index, []).extend(entry.token.logprob for entry in output.logprobs)
    return (tokens, texts, reasons), (logprobs, prompt)


def ask_all(server: Server) -> list:
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        return list(pool.map(lambda index: ask(server, index), range(NUM_STREAMS)))


def check_all_same(found, expected) -> None:
    for index, answers in enumerate(zip(found, expected, strict=True)):
        check_same(index, *answers)


def check_same(index, found, expected) -> None:
    (outputs, logprobs), (expected_outputs, expected_logprobs) = found, expected
    assert outputs == expected_outputs, request_of(index)
    assert flat(logprobs) == pytest.approx(flat(expected_logprobs), abs=1e-3), request_of(index)


def flat(logprobs) -> list[float]:
    of_outputs, of_prompt = logprobs
    return [number for index in sorted(of_outputs) for number in of_outputs[index]] + of_prompt


@contextmanager
def streams_beside(server: Server, expected):
    """16 streams, well on their way; at the end all have what they should."""
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask_all, server)
        while sum(group.num_running for group in server.groups()) < NUM_STREAMS // 2 and not asked.done():
            time.sleep(0.01)
        time.sleep(0.5 if server.device == "cpu" else 0.1)
        assert not asked.done(), "the streams were over before anything could happen beside them"
        yield
        check_all_same(asked.result(60), expected)
    assert all(group.num_free_blocks == group.num_blocks for group in server.groups())


DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")],
    ),
]


@pytest.fixture(scope="module", params=DEVICES)
def one_group(request):
    # Tokens are compared, which in bfloat16 would hang on who decodes beside whom.
    options = ["--tensor-parallel-size", "2", "--step-timeout-s", "3", "--dtype", "float32"]
    with running(*options, device=request.param) as server:
        yield server


@pytest.fixture(scope="module")
def expected(one_group):
    """What an undisturbed server answers."""
    return ask_all(one_group)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_of_the_only_group_is_killed(one_group, expected, rank, record_property):
    before = one_group.groups()[0]
    with streams_beside(one_group, expected):
        one_group.process_of(0, rank).kill()
        detection_s = one_group.wait_until_noticed(0, before.epoch, timeout_s=2)
        rebuild_s = one_group.wait_until_whole(before.num_restarts + 1, REBUILD_TIMEOUT_S)
        record_property("detection_s", detection_s)
        record_property("rebuild_s", rebuild_s)
        print(f"rank {rank} killed: noticed after {detection_s:.3f} s, whole {rebuild_s:.1f} s later")
    said = one_group.wait_until_said(f"started rank {rank} anew, serves again after")
    # The dead rank's stream breaks off; the other may be the first to say that it misses a peer.
    assert re.search(r"^group 0 failed: rank [01]: .* \(last heard of \d\.\d\d s before\)", said)
    assert admin_pb2.GROUP_STATE_REBUILDING in one_group.seen_states
    after = one_group.groups()[0]
    assert after.epoch > before.epoch
    kept = 1 - rank
    assert after.ranks[kept].address == before.ranks[kept].address
    assert after.ranks[rank].address != before.ranks[rank].address


def test_a_stopped_rank_is_replaced(one_group, expected):
    before = one_group.groups()[0]
    with streams_beside(one_group, expected):
        victim = one_group.process_of(0, 1)
        victim.suspend()
        detection_s = one_group.wait_until_noticed(0, before.epoch, timeout_s=15)
        rebuild_s = one_group.wait_until_whole(before.num_restarts + 1, REBUILD_TIMEOUT_S)
        print(f"rank stopped: noticed after {detection_s:.1f} s, whole {rebuild_s:.1f} s later")
    assert not victim.is_running()
    said = one_group.wait_until_said("rank 1: it ")
    # Whichever deadline passes first.
    assert re.search(r"it has not answered for|it does not answer, and a step has not ended", said)


def test_a_rank_that_was_stopped_and_wakes_joins_again_with_its_weights(one_group, expected):
    before = one_group.groups()[0]
    with streams_beside(one_group, expected):
        victim = one_group.process_of(0, 0)
        victim.suspend()
        one_group.wait_until_noticed(0, before.epoch, timeout_s=15)
        victim.resume()  # with plans of an epoch that is over
        rebuild_s = one_group.wait_until_whole(before.num_restarts + 1, REBUILD_TIMEOUT_S)
        print(f"all ranks kept: whole {rebuild_s:.2f} s later")
    assert [rank.address for rank in one_group.groups()[0].ranks] == [rank.address for rank in before.ranks]
    one_group.wait_until_said("kept all ranks, serves again after")


def test_another_group_goes_on_at_once_and_a_stop_meanwhile_leaves_nothing_behind(one_group, expected):
    if one_group.device == "cuda":
        pytest.skip("two groups of two ranks need four GPUs")
    with running("--tensor-parallel-size", "2", "--num-groups", "2") as server:
        for num_kills, rank in enumerate([0, 1], start=1):
            epoch = server.groups()[num_kills - 1].epoch
            with streams_beside(server, expected):
                server.process_of(num_kills - 1, rank).kill()
                detection_s = server.wait_until_noticed(num_kills - 1, epoch, timeout_s=2)
                print(f"rank {rank} killed: noticed after {detection_s:.3f} s")
            server.wait_until_whole(num_kills)
        before = server.groups()[0]
        server.process_of(0, 0).kill()
        server.wait_until_noticed(0, before.epoch, timeout_s=2)
        time.sleep(0.5)


def test_a_rank_that_dies_while_the_server_ends_costs_no_request(one_group):
    """The last one of that server."""
    request = request_of(0)
    request.sampling_params.max_tokens = num_tokens = 300
    victim = one_group.process_of(0, 0)
    num_lines = len(one_group.lines)
    stream = one_group.generation.Generate(request)
    tokens = [*next(stream).outputs[0].token_ids]
    one_group.process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    victim.kill()
    tokens += [token for response in stream for output in response.outputs for token in output.token_ids]
    assert len(tokens) == num_tokens
    assert one_group.wait_until_ended() == 0
    said = one_group.lines[num_lines:]
    assert any("started rank 0 anew, serves again after" in line for line in said), said


def test_a_group_that_keeps_dying_is_given_up_in_one_line():
    with running("--max-restarts", "1") as server:
        server.process_of(0, 0).kill()
        server.wait_until_whole(1)
        stream = server.generation.Generate(request_of(0))
        next(stream)
        server.process_of(0, 0).kill()
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert server.wait_until_ended() == 1
        [said] = [line for line in server.lines if line.startswith("octavo: ")]
        assert "worker group 0 failed 2 time(s) within 10 minutes and is given up; the last time: rank 0: " in said
