"""A rank is configured again under a higher epoch: its weights stay, all else begins anew, the last epoch is over."""

import json
import queue
import threading
import time

import grpc
import numpy as np
import pytest
from octavo.proto import engine_pb2, sampling_pb2, worker_pb2, worker_pb2_grpc
from octavo.workers import service
from octavo.workers.models.llama import LlamaForCausalLM
from octavo.workers.models.registry import register_model
from octavo.workers.parallel import TensorParallel
from octavo.workers.server import WorkerServer

PROMPT = [1, 2, 3]


class StuckLlama(LlamaForCausalLM):
    """Its forward pass ends when the test lets it."""

    is_stuck = threading.Event()
    let_go = threading.Event()
    is_in_it = threading.Event()

    def forward(self, *args, **kwargs):
        if self.is_stuck.is_set():
            self.is_in_it.set()
            self.let_go.wait(30)
        return super().forward(*args, **kwargs)


register_model("StuckLlamaForCausalLM", StuckLlama)


class Rank:
    """A worker, and whether it has ended its process."""

    def __init__(self, create_store=False) -> None:
        self.has_ended = threading.Event()
        self.server = WorkerServer(
            "127.0.0.1", "cpu", create_store=create_store, num_threads=1, end_process=self.has_ended.set
        )
        self.channel = grpc.insecure_channel(self.server.start().address)
        self.stub = worker_pb2_grpc.WorkerStub(self.channel)

    def configure(self, path, epoch, num_ranks=1, **fields):
        sizes = {"block_size": 8, "max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 64}
        options = {"load_format": "safetensors", "dtype": "float32", "gpu_memory_utilization": 0.9}
        config = engine_pb2.WorkerConfig(model_path=str(path), num_blocks_override=8, **(options | sizes | fields))
        request = worker_pb2.ConfigureRequest(config=config, tensor_parallel_size=num_ranks, epoch=epoch)
        return list(self.stub.Configure(request))

    def generate(self, epoch, num_tokens=6):
        results = self.stub.Steps(iter([first_plan(epoch), *(decode_plan(epoch, i) for i in range(2, num_tokens + 1))]))
        return [np.frombuffer(result.token_ids, "<i4").tolist() for result in results]


@pytest.fixture
def rank():
    started = Rank()
    yield started
    started.channel.close()
    started.server.stop()


def first_plan(epoch):
    join = worker_pb2.SlotJoin(
        slot=0,
        token_ids=np.array(PROMPT, "<i4").tobytes(),
        num_prompt_tokens=len(PROMPT),
        block_ids=np.array([0, 1], "<i4").tobytes(),
        sampling_params=sampling_pb2.SamplingParams(top_p=1.0, repetition_penalty=1.0, max_tokens=8),
    )
    chunk = {"chunk_slots": np.array([0], "<u2").tobytes(), "chunk_num_tokens": np.array([3], "<i4").tobytes()}
    return worker_pb2.BatchPlan(epoch=epoch, step_id=1, joins=[join], **chunk)


def decode_plan(epoch, step_id):
    slots = np.array([0], "<u2").tobytes()
    return worker_pb2.BatchPlan(epoch=epoch, step_id=step_id, decode_slots_changed=step_id == 2, decode_slots=slots)


def kept_weights(progress):
    return [report.kept_weights for report in progress if report.stage == "weights"]


def test_the_weights_stay_and_the_slots_are_empty(rank, make_llama):
    path = make_llama(eos_token_id=None)
    assert kept_weights(rank.configure(path, epoch=1)) == [False]
    first = rank.generate(epoch=1)
    assert kept_weights(rank.configure(path, epoch=4)) == [True]
    assert rank.stub.Ping(worker_pb2.PingRequest()).epoch == 4
    assert rank.generate(epoch=4) == first


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"max_model_len": 32}, {"seed": 5}, {"vocab_size": 96}])
def test_weights_that_are_not_what_is_asked_for_are_loaded(rank, make_llama, change):
    rank.configure(make_llama(eos_token_id=None), epoch=1)
    other = {name: change[name] for name in change if name == "vocab_size"}
    changed = {name: change[name] for name in change if name not in other}
    assert kept_weights(rank.configure(make_llama(eos_token_id=None, **other), epoch=2, **changed)) == [False]


def test_plans_of_the_epoch_that_is_over_are_refused(rank, make_llama):
    path = make_llama(eos_token_id=None)
    rank.configure(path, epoch=1)
    plans = queue.SimpleQueue()
    old = rank.stub.Steps(iter(plans.get, None))
    plans.put(first_plan(epoch=1))
    assert next(old).step_id == 1
    rank.configure(path, epoch=2)
    plans.put(decode_plan(epoch=1, step_id=2))
    assert next(old).failure == "plan 2 of epoch 1 came; plan 1 of epoch 2 is due"
    plans.put(None)
    with pytest.raises(grpc.RpcError):
        list(old)
    with pytest.raises(grpc.RpcError, match="plan 1 of epoch 1 came; plan 1 of epoch 2 is due"):
        list(rank.stub.Steps(iter([first_plan(epoch=1)])))


def test_an_epoch_that_is_not_higher_is_refused(rank, make_llama):
    path = make_llama(eos_token_id=None)
    rank.configure(path, epoch=2)
    for epoch in (1, 2):
        with pytest.raises(grpc.RpcError, match=f"epoch {epoch} came, and this worker was configured for epoch 2"):
            rank.configure(path, epoch)
    assert len(rank.generate(epoch=2)) == 6


@pytest.fixture
def stuck_model(make_llama, tmp_path):
    source = make_llama(eos_token_id=None)
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["StuckLlamaForCausalLM"]}))
    yield tmp_path
    StuckLlama.let_go.set()
    StuckLlama.is_stuck.clear()


def begin_stuck_step(rank, path):
    """The stream of a step that hangs, with two behind it."""
    StuckLlama.let_go.clear()
    StuckLlama.is_in_it.clear()
    rank.configure(path, epoch=1)
    StuckLlama.is_stuck.set()
    plans = queue.SimpleQueue()
    stream = rank.stub.Steps(iter(plans.get, None))
    for plan in (first_plan(1), decode_plan(1, 2), decode_plan(1, 3)):
        plans.put(plan)
    assert StuckLlama.is_in_it.wait(30)
    while rank.server._pipeline._launcher._work_queue.qsize() < 2:
        time.sleep(0.01)
    return stream, plans


def test_what_is_queued_behind_a_step_that_hangs_is_not_run_when_it_ends(rank, stuck_model):
    stream, plans = begin_stuck_step(rank, stuck_model)
    assert rank.stub.Ping(worker_pb2.PingRequest(), timeout=5).epoch == 1  # a sign of life all the same
    threading.Timer(0.5, StuckLlama.let_go.set).start()
    assert kept_weights(rank.configure(stuck_model, epoch=2)) == [True]
    answers = [next(stream), next(stream)]
    assert [(answer.step_id, answer.failure) for answer in answers] == [(1, ""), (2, "epoch 1 is over")]
    plans.put(None)
    assert len(rank.generate(epoch=2)) == 6
    assert not rank.has_ended.is_set()


def test_a_rank_whose_step_never_ends_ends_itself(rank, stuck_model, monkeypatch):
    monkeypatch.setitem(service._LEAVE_TIMEOUT_S, "cpu", 0.2)
    _, plans = begin_stuck_step(rank, stuck_model)
    with pytest.raises(grpc.RpcError, match="the device is stuck in the last epoch"):
        rank.configure(stuck_model, epoch=2)
    assert rank.has_ended.is_set()
    StuckLlama.let_go.set()
    plans.put(None)


def test_the_device_is_freed_as_soon_as_the_stream_ends_and_when_the_epoch_does(rank, make_llama, monkeypatch):
    """By a thread that is not the device's: that one may be among what waits."""
    freed = queue.SimpleQueue()
    monkeypatch.setattr(TensorParallel, "abandon", lambda tp: freed.put((tp, threading.current_thread().name)))
    path = make_llama(eos_token_id=None)
    rank.configure(path, epoch=1)
    rank.generate(epoch=1)
    tp, thread = freed.get(timeout=10)
    assert tp.size == 1
    assert not thread.startswith(("device", "grpc"))
    rank.configure(path, epoch=2)
    freed.get(timeout=10)


def test_a_rank_does_not_wait_for_one_that_died_before_they_met(make_llama):
    """The epoch in which they were to meet is followed by another."""
    rank = Rank(create_store=True)
    path = make_llama(eos_token_id=None)
    failures = queue.SimpleQueue()

    def wait_for_a_peer():
        try:
            rank.configure(path, epoch=1, num_ranks=2)
        except grpc.RpcError as error:
            failures.put(error)

    waiting = threading.Thread(target=wait_for_a_peer)
    waiting.start()
    while rank.stub.Ping(worker_pb2.PingRequest()).epoch != 1:
        waiting.join(0.01)
    waiting.join(0.3)
    started = time.monotonic()
    assert kept_weights(rank.configure(path, epoch=2)) == [False]
    assert time.monotonic() - started < 20
    waiting.join(20)
    assert failures.get(timeout=20).code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION)
    assert len(rank.generate(epoch=2)) == 6
    rank.channel.close()
    rank.server.stop()
