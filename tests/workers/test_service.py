"""A worker over real gRPC: configured once, driven by one stream, and every wrong call refused with its reason."""

import queue

import grpc
import numpy as np
import pytest
import torch
from octavo.errors import FailedPreconditionError, InvalidArgumentError
from octavo.proto import engine_pb2, sampling_pb2, worker_pb2, worker_pb2_grpc
from octavo.workers.server import WorkerServer


@pytest.fixture
def stub():
    server = WorkerServer(host="127.0.0.1", device="cpu", create_store=False, num_threads=1)
    endpoints = server.start()
    assert endpoints.store_address == ""
    with grpc.insecure_channel(endpoints.address) as channel:
        yield worker_pb2_grpc.WorkerStub(channel)
    server.stop()


@pytest.fixture
def make_request(make_llama):
    def make(**fields):
        settings = {"model_path": str(make_llama(eos_token_id=None)), "load_format": "safetensors", "dtype": "float32"}
        sizes = {"block_size": 8, "max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 64}
        config = engine_pb2.WorkerConfig(**(settings | sizes | {"gpu_memory_utilization": 0.9} | fields))
        return worker_pb2.ConfigureRequest(config=config, rank=0, tensor_parallel_size=1, epoch=3)

    return make


def make_plan(step_id, epoch=3, **fields):
    return worker_pb2.BatchPlan(epoch=epoch, step_id=step_id, **fields)


def first_plan(slot=0):
    join = worker_pb2.SlotJoin(
        slot=slot,
        token_ids=np.array([1, 2, 3], "<i4").tobytes(),
        num_prompt_tokens=3,
        block_ids=np.array([0, 1], "<i4").tobytes(),
        sampling_params=sampling_pb2.SamplingParams(top_p=1.0, repetition_penalty=1.0, max_tokens=8),
    )
    chunk = {"chunk_slots": np.array([slot], "<u2").tobytes(), "chunk_num_tokens": np.array([3], "<i4").tobytes()}
    return make_plan(1, joins=[join], **chunk)


def decode_plan(step_id):
    return make_plan(step_id, decode_slots_changed=True, decode_slots=np.array([0], "<u2").tobytes())


def refusal(call) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    return caught.value.code(), caught.value.details()


def test_configures_in_stages_then_answers_plans_in_order(stub, make_request):
    progress = list(stub.Configure(make_request(num_blocks_override=12)))
    assert [p.stage for p in progress] == ["connect", "weights", "kv cache", "warm-up"]
    assert [p.num_blocks for p in progress] == [0, 0, 0, 12]
    results = list(stub.Steps(iter([first_plan(), decode_plan(2), make_plan(3)])))
    assert [(r.epoch, r.step_id, len(r.token_ids)) for r in results] == [(3, 1, 4), (3, 2, 4), (3, 3, 4)]
    assert all(r.model_time_us > 0 for r in results)


def test_reports_its_host_tier_and_what_was_moved(stub, make_request):
    # A block takes 8 tokens * 2 * 2 layers * 4 heads * 8 float32.
    progress = list(stub.Configure(make_request(num_blocks_override=12, swap_space_bytes=7 * 4096 + 100)))
    assert [p.num_host_blocks for p in progress] == [0, 0, 0, 7]
    assert progress[-1].num_blocks == 12
    assert 0 < progress[-1].host_block_us < 1e6
    zero = np.zeros(1, "<i4").tobytes()
    plans = [make_plan(1), make_plan(2, save_block_ids=zero, save_host_ids=zero), make_plan(3)]
    results = list(stub.Steps(iter(plans)))
    # The first may be made before or after the second plan is done.
    assert [(r.step_id, r.finished_transfers, r.token_ids) for r in results[1:]] == [(2, 2, b""), (3, 2, b"")]


def test_has_no_host_tier_without_swap_space(stub, make_request):
    *_, last = stub.Configure(make_request())
    assert (last.num_host_blocks, last.host_block_us) == (0, 0.0)


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        ([make_plan(1, epoch=2)], "plan 1 of epoch 2 came; plan 1 of epoch 3 is due"),
        ([make_plan(2)], "plan 2 of epoch 3 came; plan 1 of epoch 3 is due"),
        ([make_plan(1), make_plan(1)], "plan 1 of epoch 3 came; plan 2 of epoch 3 is due"),
        ([decode_plan(1)], "cannot decode slots [0]: they are free"),
        ([first_plan(slot=4)], "slot 4 is not in [0, 4)"),
    ],
)
def test_refuses_stale_and_impossible_plans(stub, make_request, plans, message):
    list(stub.Configure(make_request()))
    assert refusal(stub.Steps(iter(plans))) == (grpc.StatusCode.FAILED_PRECONDITION, message)


def test_says_why_before_the_call_ends_and_drops_plans_meanwhile(stub, make_request):
    list(stub.Configure(make_request()))
    plans = queue.SimpleQueue()
    call = stub.Steps(iter(plans.get, None))
    plans.put(make_plan(1))
    assert next(call).step_id == 1
    plans.put(decode_plan(2))
    why = "cannot decode slots [0]: they are free"
    assert next(call) == worker_pb2.StepResult(epoch=3, step_id=2, failure=why)
    for plan in (make_plan(3), make_plan(9), None):
        plans.put(plan)
    assert refusal(call) == (grpc.StatusCode.FAILED_PRECONDITION, why)


def test_refuses_a_malformed_plan(stub, make_request):
    list(stub.Configure(make_request()))
    code, details = refusal(stub.Steps(iter([make_plan(1, leave_slots=b"\x01")])))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith("leave_slots holds 1 bytes")


def test_refuses_steps_before_it_is_configured_and_a_second_driver(stub, make_request):
    expected = grpc.StatusCode.FAILED_PRECONDITION
    assert refusal(stub.Steps(iter([]))) == (expected, "this worker is not configured")
    list(stub.Configure(make_request()))
    assert refusal(stub.Configure(make_request())) == (
        expected,
        "epoch 3 came, and this worker was configured for epoch 3",
    )
    list(stub.Steps(iter([])))
    assert refusal(stub.Steps(iter([]))) == (expected, "a stream has driven this worker already in epoch 3")


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"model_path": "/nowhere"}, grpc.StatusCode.NOT_FOUND, "/nowhere does not exist"),
        (
            {"kv_cache_dtype": "int3"},
            grpc.StatusCode.INVALID_ARGUMENT,
            "kv_cache_dtype 'int3' is neither dtype float32",
        ),
        ({"kv_cache_dtype": "fp8"}, grpc.StatusCode.INVALID_ARGUMENT, "fp8 is for GPUs, and device cpu"),
        ({"dtype": "int3"}, grpc.StatusCode.INVALID_ARGUMENT, "dtype 'int3' is none of"),
        ({"load_format": "pickle"}, grpc.StatusCode.INVALID_ARGUMENT, "load_format 'pickle' is unknown"),
        ({"swap_space_bytes": 1 << 50}, grpc.StatusCode.RESOURCE_EXHAUSTED, "lower --swap-space"),
        ({"swap_space_bytes": 4095}, grpc.StatusCode.INVALID_ARGUMENT, "holds no KV block"),
        ({"num_blocks_override": 1 << 30}, grpc.StatusCode.RESOURCE_EXHAUSTED, "lower --num-gpu-blocks-override"),
    ],
)
def test_says_why_it_cannot_be_configured(stub, make_request, fields, code, message):
    found, details = refusal(stub.Configure(make_request(**fields)))
    assert found is code
    assert message in details


def test_a_device_that_is_not_there_is_refused():
    why = "'cuda:63' is not there" if torch.cuda.is_available() else "torch cannot use"
    with pytest.raises((InvalidArgumentError, FailedPreconditionError), match=why):
        WorkerServer(host="127.0.0.1", device="cuda:63", create_store=False, num_threads=1)
