"""A whole engine without Ray or a gateway: workers in processes of their own, the coordinator's engine, one session."""

import asyncio
import itertools
import multiprocessing
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import numpy as np
import pytest
from octavo.coordinator.shell.engine import Engine
from octavo.coordinator.shell.service import EngineService
from octavo.proto import admin_pb2, engine_pb2, engine_pb2_grpc, sampling_pb2
from octavo.workers.model_config import ModelConfig

_MAX_OUTPUTS = 8  # of a request: handles that it may use
_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(["octavo.tests.warm_rank"])


def _run_worker(connection, device: str, create_store: bool, prepare) -> None:
    from octavo.workers.server import WorkerServer

    prepare()
    server = WorkerServer(host="127.0.0.1", device=device, create_store=create_store, num_threads=1)
    endpoints = server.start()
    connection.send((endpoints.address, endpoints.store_address))
    connection.recv()
    server.stop()


def _nothing() -> None:
    pass


class WorkerProcesses:
    """One process a rank, which calls `prepare` first."""

    def __init__(self, num_ranks: int, device: str, prepare=_nothing, first_device: int = 0) -> None:
        self._processes, self._pipes, self.endpoints = [], [], []
        self._killed: set[int] = set()
        self.store_address = ""
        devices = [device if device == "cpu" else f"{device}:{first_device + rank}" for rank in range(num_ranks)]
        for rank in range(num_ranks):
            ours, theirs = _FORKSERVER.Pipe()
            arguments = (theirs, devices[rank], rank == 0, prepare)
            process = _FORKSERVER.Process(target=_run_worker, args=arguments, daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(60), f"rank {rank} did not start"
            address, store_address = pipe.recv()
            self.endpoints.append(engine_pb2.WorkerEndpoint(address=address, device=devices[rank]))
            self.store_address = self.store_address or store_address

    def kill(self, rank: int) -> None:
        self._killed.add(rank)
        self._processes[rank].kill()

    def close(self) -> None:
        alive = [rank for rank in range(len(self._pipes)) if rank not in self._killed]
        for rank in alive:
            self._pipes[rank].send("stop")
        for process in self._processes:
            process.join(20)
        assert all(self._processes[rank].exitcode == 0 for rank in alive)


@pytest.fixture
def worker_processes():
    """worker_processes(num_ranks, device, ...) -> WorkerProcesses; they end with the test."""
    started = []

    def start(*arguments, **keywords) -> WorkerProcesses:
        started.append(WorkerProcesses(*arguments, **keywords))
        return started[-1]

    yield start
    for workers in started:
        workers.close()


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Of one run. The defaults force chunks; few blocks force preemption."""

    tensor_parallel_size: int = 1
    block_size: int = 16
    num_blocks: int = 0
    max_model_len: int = 704
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 96
    num_inflight_steps: int = 2
    dtype: str = "float32"
    device: str = "cpu"
    enforce_eager: bool = False
    num_host_blocks: int = 0
    kv_cache_dtype: str = ""
    enable_prefix_caching: bool = True
    rebuilds_groups: bool = False
    prepare: Callable[[], None] = _nothing  # in each rank's process


@dataclass(slots=True)
class RunResult:
    """By request: each output's tokens, and of the first one logprobs if it asked; and the engine's counters."""

    outputs: list[list[list[int]]]
    logprobs: list[list[float]]
    beam_scores: list[list[float]]
    num_cached_tokens: list[int]
    failures: list[dict[int, engine_pb2.Failure]]  # of each request, by output
    num_preemptions: int = 0
    num_steps: int = 0
    blocks: admin_pb2.BlockCounters = field(default_factory=admin_pb2.BlockCounters)

    @property
    def tokens(self) -> list[list[int]]:
        """Of each request's first output."""
        return [outputs[0] for outputs in self.outputs]


@asynccontextmanager
async def _serve_engine(address, model_path, options, workers):
    shared = {
        "max_model_len": options.max_model_len,
        "block_size": options.block_size,
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_num_batched_tokens,
    }
    engine = Engine(
        engine_pb2.EngineConfig(
            address=address,
            vocab_size=1 << 20,
            max_num_waiting=1000,
            num_inflight_steps=options.num_inflight_steps,
            enable_prefix_caching=options.enable_prefix_caching,
            rebuilds_groups=options.rebuilds_groups,
            step_timeout_s=5.0,
            **shared,
        )
    )
    config = engine_pb2.WorkerConfig(
        model_path=str(model_path),
        load_format="safetensors",
        dtype=options.dtype,
        num_blocks_override=options.num_blocks,
        gpu_memory_utilization=0.9,
        store_address=workers.store_address,
        enforce_eager=options.enforce_eager,
        kv_cache_dtype=options.kv_cache_dtype,
        swap_space_bytes=options.num_host_blocks and options.num_host_blocks * _block_bytes(model_path, options),
        **shared,
    )
    server = grpc.aio.server()
    engine_pb2_grpc.add_EngineServicer_to_server(EngineService(engine), server)
    server.add_insecure_port(address)
    await server.start()
    try:
        request = engine_pb2.AddGroupRequest(group_id=0, workers=workers.endpoints, config=config)

        async def add_group() -> None:
            await engine.add_group(request, lambda stage, duration_s: None)

        await add_group()
        yield engine, add_group
    finally:
        await engine.close()
        await server.stop(0)


def _block_bytes(model_path, options) -> int:
    """At most: of one rank, keys and values of all layers."""
    config = ModelConfig.from_directory(str(model_path))
    num_kv_heads = max(1, config.num_kv_heads // options.tensor_parallel_size)
    itemsize = 2 if options.dtype == "bfloat16" else 4
    return 2 * config.num_layers * options.block_size * num_kv_heads * config.head_dim * itemsize


async def _generate(address, model_path, options, workers, requests, beside) -> RunResult:
    async with (
        _serve_engine(address, model_path, options, workers) as (engine, add_group),
        grpc.aio.insecure_channel(address) as channel,
    ):
        session = engine_pb2_grpc.EngineStub(channel).Session()
        await session.read()
        for i, request in enumerate(requests):
            request.handle = i * _MAX_OUTPUTS
        await session.write(engine_pb2.SessionRequest(submits=requests))
        result = RunResult(
            [[[] for _ in range(max(1, request.num_samples))] for request in requests],
            [[] for _ in requests],
            [[] for _ in requests],
            [0] * len(requests),
            [{} for _ in requests],
        )
        num_unfinished = sum(map(len, result.outputs))
        goes_on = asyncio.create_task(beside(engine, add_group))
        while num_unfinished:
            num_unfinished -= _take(await session.read(), result)
        await goes_on
        while (status := engine.status()).groups[0].blocks.num_in_transfer:
            await asyncio.sleep(0.01)
        assert status.groups[0].num_free_blocks == status.groups[0].num_blocks
        engine.scheduler.check_invariants()
        result.num_preemptions = status.counters.num_preemptions
        result.num_steps = status.groups[0].steps.num_steps
        result.blocks = status.groups[0].block_counters
        return result


def _take(response: engine_pb2.SessionResponse, result: RunResult) -> int:
    """Notes what a message brings; returns how many outputs it ends."""
    for failure in response.failures:
        request, output = divmod(failure.handle, _MAX_OUTPUTS)
        result.failures[request][output] = failure
    handles = np.frombuffer(response.handles, "<u4").tolist()
    for entry in response.logprobs:
        if handles[entry.entry] % _MAX_OUTPUTS == 0:
            rows = np.frombuffer(entry.table.logprobs, "<f4").reshape(-1, entry.table.num_columns)
            result.logprobs[handles[entry.entry] // _MAX_OUTPUTS] += rows[:, 0].tolist()
    tokens = iter(np.frombuffer(response.token_ids, "<i4").tolist())
    for handle, count in zip(handles, np.frombuffer(response.num_tokens, "<u4").tolist(), strict=True):
        request, output = divmod(handle, _MAX_OUTPUTS)
        result.outputs[request][output] += itertools.islice(tokens, count)
    scored = [handle // _MAX_OUTPUTS for handle, reason in zip(handles, response.finish_reasons, strict=True) if reason]
    if response.beam_scores:
        scores = np.frombuffer(response.beam_scores, "<f4").tolist()
        for request, score in zip(scored, scores, strict=True):  # so beams are not mixed with others in a test
            result.beam_scores[request].append(score)
    cached = zip(
        np.frombuffer(response.cached_handles, "<u4").tolist(),
        np.frombuffer(response.num_cached_tokens, "<u4").tolist(),
        strict=True,
    )
    for handle, num_tokens in cached:
        if handle % _MAX_OUTPUTS == 0:
            result.num_cached_tokens[handle // _MAX_OUTPUTS] = num_tokens
    return len(scored) + len(response.failures)


async def _leave_alone(engine, add_group) -> None:
    pass


@pytest.fixture
def run_requests(tmp_path):
    """run_requests(model_path, options, requests) -> RunResult; of Submits, whose handles it chooses. None of them may
    fail unless `may_fail`; a beam search that may has one output. Beside them runs beside(the engine, what adds its
    group again)."""

    def run(model_path, options, requests, beside=_leave_alone, may_fail=False) -> RunResult:
        workers = WorkerProcesses(options.tensor_parallel_size, options.device, options.prepare)
        try:
            address = f"unix:{tmp_path}/engine.sock"
            scenario = _generate(address, model_path, options, workers, requests, beside)
            result = asyncio.run(asyncio.wait_for(scenario, 240))
            assert may_fail or not any(result.failures), result.failures
            return result
        finally:
            workers.close()

    return run


@pytest.fixture
def run_engine(run_requests):
    """run_engine(model_path, options, prompts, sampling) -> RunResult; `sampling(i)` gives request i's parameters."""

    def run(model_path, options, prompts, sampling) -> RunResult:
        return run_requests(model_path, options, [new_request(p, sampling(i)) for i, p in enumerate(prompts)])

    return run


def new_request(prompt, sampling, **fields) -> engine_pb2.Submit:
    packed = np.asarray(prompt, "<i4").tobytes()
    return engine_pb2.Submit(prompt_token_ids=packed, sampling_params=sampling, **fields)


@pytest.fixture
def request_of():
    """request_of(prompt, sampling, **fields of Submit)."""
    return new_request


@pytest.fixture
def engine_options():
    return EngineOptions


@pytest.fixture
def sampling_params():
    """Resolved sampling parameters with everything off but what is given; greedy unless a temperature is."""

    def make(max_tokens: int, **fields) -> sampling_pb2.SamplingParams:
        defaults = {"top_p": 1.0, "repetition_penalty": 1.0, "max_tokens": max_tokens, "seed": 1}
        return sampling_pb2.SamplingParams(**(defaults | fields))

    return make
