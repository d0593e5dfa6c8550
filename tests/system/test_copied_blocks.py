"""A group joins with the weights of one that serves, takes its sequences' blocks, and goes on for it when it is gone:
each sequence has the tokens that it has where nothing happens."""

import asyncio
import itertools
import logging

import numpy as np
import pytest
import torch
from octavo.coordinator.shell.engine import Engine
from octavo.proto import engine_pb2

NUM_TOKENS = 250
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
GROUPS = [  # device, ranks of each group, fields of WorkerConfig
    ("cpu", 1, {}),
    ("cpu", 2, {}),
    ("cpu", 2, {"swap_space_bytes": 1 << 20, "num_blocks_override": 90}),
    pytest.param("cuda", 1, {}, marks=[pytest.mark.gpu, two_gpus]),
    pytest.param("cuda", 1, {"kv_cache_dtype": "fp8"}, marks=[pytest.mark.gpu, two_gpus]),
    pytest.param("cuda", 1, {"enforce_eager": True}, marks=[pytest.mark.gpu, two_gpus]),
]
SIZES = {"block_size": 16, "max_model_len": 512, "max_num_seqs": 16, "max_num_batched_tokens": 96}


def add_request(workers, group_id, path, fields, sources=None) -> engine_pb2.AddGroupRequest:
    config = engine_pb2.WorkerConfig(
        model_path=str(path), load_format="safetensors", gpu_memory_utilization=0.5,
        store_address=workers.store_address,
        **({"dtype": "float32", "num_blocks_override": 200} | SIZES | fields),
    )  # fmt: skip
    request = engine_pb2.AddGroupRequest(group_id=group_id, workers=workers.endpoints, config=config)
    for endpoint, source in zip(request.workers, sources.endpoints if sources else (), strict=False):
        endpoint.weight_source = source.address
    return request


def new_engine() -> Engine:
    config = engine_pb2.EngineConfig(
        vocab_size=1 << 20, max_num_waiting=100, num_inflight_steps=2, enable_prefix_caching=True,
        rebuilds_groups=True, step_timeout_s=20.0, **SIZES,
    )  # fmt: skip
    return Engine(config)


def submits(request_of, sampling_params, salt: bytes) -> list[engine_pb2.Submit]:
    generator = np.random.default_rng(5)
    start = generator.integers(2, 128, 70).tolist()
    prompts = [start + generator.integers(2, 128, 20 * i + 5).tolist() for i in range(6)]
    kinds = [{}, {"temperature": 0.9}, {}, {"temperature": 1.0, "presence_penalty": 0.5}, {}, {}]
    return [
        request_of(prompt, sampling_params(NUM_TOKENS, **kind), handle=handle, cache_salt=salt)
        for handle, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True))
    ]


class Client:
    """A session of an engine in this process."""

    def __init__(self, session) -> None:
        self._session = session
        self.tokens: dict[int, list[int]] = {}
        self.finished: set[int] = set()

    async def read(self) -> None:
        response = await self._session.next_response()
        assert not response.failures
        handles = np.frombuffer(response.handles, "<u4").tolist()
        tokens = iter(np.frombuffer(response.token_ids, "<i4").tolist())
        for handle, count in zip(handles, np.frombuffer(response.num_tokens, "<u4").tolist(), strict=True):
            self.tokens.setdefault(handle, []).extend(itertools.islice(tokens, count))
        reasons = zip(handles, response.finish_reasons, strict=True)
        self.finished |= {handle for handle, reason in reasons if reason}


async def submit_to(engine, requests) -> Client:
    session = await engine.open_session()
    engine.take_request(session, engine_pb2.SessionRequest(submits=requests))
    return Client(session)


def ignore(stage, duration_s) -> None:
    pass


async def finish(engine, requests) -> dict[int, list[int]]:
    """Their tokens, by handle."""
    client = await submit_to(engine, requests)
    while len(client.finished) < len(requests):
        await client.read()
    return client.tokens


async def move(engine, requests, lose_first) -> tuple[dict[int, list[int]], int]:
    """Both groups serve; the blocks of what the first runs go to the second, and then the first is gone. The tokens,
    and how many blocks were copied."""
    client = await submit_to(engine, requests)
    while min(len(client.tokens.get(handle, ())) for handle in range(len(requests))) < 4:
        await client.read()
    sequences = list(engine.scheduler.groups[0].running)
    copied = [await engine.copy_sequence_blocks(sequence, 0, 1) for sequence in sequences]
    assert any(sequence.is_running for sequence in sequences), "all was over before the blocks were there"
    lose_first()
    while len(client.finished) < len(requests):
        await client.read()
    return client.tokens, sum(copied)


@pytest.mark.parametrize(("device", "num_ranks", "fields"), GROUPS)
def test_what_moves_with_its_blocks_has_the_tokens_of_an_undisturbed_run(
    device, num_ranks, fields, make_llama, worker_processes, request_of, sampling_params, caplog
):
    path = make_llama(eos_token_id=None)
    first = worker_processes(num_ranks, device)
    second = worker_processes(num_ranks, device, first_device=num_ranks)

    async def scenario():
        engine = new_engine()
        await engine.add_group(add_request(first, 0, path, fields), ignore)
        expected = await finish(engine, submits(request_of, sampling_params, b"before"))
        await engine.add_group(add_request(second, 1, path, fields, first), ignore)
        assert caplog.text.count("its weights were copied") == num_ranks
        requests = submits(request_of, sampling_params, b"after")
        tokens, num_copied = await move(engine, requests, lambda: first.kill(num_ranks - 1))
        assert tokens == expected
        group = engine.scheduler.groups[1]
        assert num_copied == group.blocks.counters.num_received_blocks > 0
        assert group.blocks.counters.num_device_hit_tokens + group.blocks.counters.num_host_hit_tokens >= 16
        engine.scheduler.check_invariants()
        assert 0 not in engine.scheduler.groups
        await engine.close()

    caplog.set_level(logging.INFO)
    asyncio.run(asyncio.wait_for(scenario(), 240))
