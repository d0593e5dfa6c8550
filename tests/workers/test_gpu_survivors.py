"""A rank of two GPUs dies or stops in the middle of decodes: the GPU of the other is free at once."""

import multiprocessing
import os
import queue
import signal
import time
from contextlib import contextmanager

import grpc
import numpy as np
import pytest
import torch
from octavo.proto import engine_pb2, sampling_pb2, worker_pb2, worker_pb2_grpc

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
PROMPT = [1, 2, 3]
NUM_TOKENS = 20
LETS_GO_WITHIN_S = 2.0


def run_rank(connection, rank: int) -> None:
    from octavo.workers.server import WorkerServer

    server = WorkerServer("127.0.0.1", f"cuda:{rank}", create_store=rank == 0, num_threads=1)
    endpoints = server.start()
    connection.send((endpoints.address, endpoints.store_address))
    connection.recv()
    server.stop()


class Rank:
    """A worker's process, and the wires to it."""

    def __init__(self, rank: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.rank = rank
        self._pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=run_rank, args=(theirs, rank), daemon=True)
        self.process.start()
        assert self._pipe.poll(60), f"rank {rank} did not start"
        address, self.store_address = self._pipe.recv()
        self._channel = grpc.insecure_channel(address)
        self.stub = worker_pb2_grpc.WorkerStub(self._channel)

    def configure(self, path, epoch, num_ranks, store_address):
        config = engine_pb2.WorkerConfig(
            model_path=str(path), load_format="safetensors", dtype="float32", gpu_memory_utilization=0.5,
            num_blocks_override=64, block_size=16, max_model_len=256, max_num_seqs=4, max_num_batched_tokens=128,
            store_address=store_address,
        )  # fmt: skip
        return self.stub.Configure(
            worker_pb2.ConfigureRequest(config=config, rank=self.rank, tensor_parallel_size=num_ranks, epoch=epoch)
        )

    def close(self) -> None:
        self._channel.close()
        if self.process.is_alive():
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join(20)


@contextmanager
def ranks(*numbers: int):
    started = [Rank(number) for number in numbers]
    try:
        yield started
    finally:
        for rank in started:
            rank.close()


def configure_all(group, path, epoch) -> list[list[worker_pb2.ConfigureProgress]]:
    calls = [rank.configure(path, epoch, len(group), group[0].store_address) for rank in group]
    return [list(call) for call in calls]  # they run at once: each call's messages wait for their reader


def first_plan(epoch):
    join = worker_pb2.SlotJoin(
        slot=0,
        token_ids=np.array(PROMPT, "<i4").tobytes(),
        num_prompt_tokens=len(PROMPT),
        block_ids=np.arange(8, dtype="<i4").tobytes(),
        sampling_params=sampling_pb2.SamplingParams(top_p=1.0, repetition_penalty=1.0, max_tokens=100),
    )
    chunk = {"chunk_slots": np.array([0], "<u2").tobytes(), "chunk_num_tokens": np.array([3], "<i4").tobytes()}
    return worker_pb2.BatchPlan(epoch=epoch, step_id=1, joins=[join], **chunk)


def decode_plan(epoch, step_id):
    slots = np.array([0], "<u2").tobytes()
    return worker_pb2.BatchPlan(epoch=epoch, step_id=step_id, decode_slots_changed=step_id == 2, decode_slots=slots)


class Streams:
    """The `Steps` calls of a group."""

    def __init__(self, group, epoch) -> None:
        self._epoch = epoch
        self._plans = [queue.SimpleQueue() for _ in group]
        self._calls = [rank.stub.Steps(iter(plans.get, None)) for rank, plans in zip(group, self._plans, strict=True)]
        self.results = self._calls[0]
        self._step_id = 0

    def send(self) -> None:
        self._step_id += 1
        plan = first_plan(self._epoch) if self._step_id == 1 else decode_plan(self._epoch, self._step_id)
        for plans in self._plans:
            plans.put(plan)

    def generate(self) -> list[int]:
        tokens = []
        for _ in range(NUM_TOKENS):
            self.send()
            tokens += np.frombuffer(next(self.results).token_ids, "<i4").tolist()
        return tokens

    def close(self) -> None:
        for plans in self._plans:
            plans.put(None)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_a_survivor_lets_go_at_once_and_goes_on_with_a_new_peer(make_llama, end):
    path = make_llama(eos_token_id=None)
    with ranks(0, 1) as (survivor, victim):
        configure_all([survivor, victim], path, epoch=1)
        streams = Streams([survivor, victim], epoch=1)
        expected = streams.generate()
        os.kill(victim.process.pid, end)
        for _ in range(4):
            streams.send()
        time.sleep(0.5)  # its kernels wait for a rank that computes nothing
        streams.close()
        os.kill(victim.process.pid, signal.SIGKILL)  # as the launcher does before it rebuilds
        with ranks(1) as (newcomer,):
            # Alone first: what it takes then is the end of the last epoch.
            started = time.monotonic()
            alone = survivor.configure(path, 2, 1, "")
            assert next(alone).stage == "connect"
            let_go_s = time.monotonic() - started
            list(alone)
            started = time.monotonic()
            configure_all([survivor, newcomer], path, epoch=3)
            print(f"let go after {let_go_s:.2f} s, ready with a new peer {time.monotonic() - started:.2f} s later")
            streams = Streams([survivor, newcomer], epoch=3)
            assert streams.generate() == expected
            streams.close()
            assert survivor.process.is_alive(), "it ended itself"
            assert let_go_s < LETS_GO_WITHIN_S


def test_survivors_keep_their_weights_in_the_next_epoch(make_llama):
    path = make_llama(eos_token_id=None)
    with ranks(0, 1) as (survivor, victim), ranks(1) as (newcomer,):
        configure_all([survivor, victim], path, epoch=1)
        streams = Streams([survivor, victim], epoch=1)
        expected = streams.generate()
        os.kill(victim.process.pid, signal.SIGKILL)
        streams.send()
        streams.close()
        kept, loaded = configure_all([survivor, newcomer], path, epoch=2)
        assert [report.kept_weights for report in kept if report.stage == "weights"] == [True]
        assert [report.kept_weights for report in loaded if report.stage == "weights"] == [False]
        streams = Streams([survivor, newcomer], epoch=2)
        assert streams.generate() == expected
        streams.close()
