"""A whole engine without Ray or a gateway: workers in processes of their own, the coordinator's engine, one session."""

import asyncio
import multiprocessing
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import numpy as np
import pytest
from octavo.coordinator.shell.engine import Engine
from octavo.coordinator.shell.service import EngineService
from octavo.proto import engine_pb2, engine_pb2_grpc, sampling_pb2

_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(["octavo.workers.server"])


def _run_worker(connection, device: str, create_store: bool) -> None:
    from octavo.workers.server import WorkerServer

    server = WorkerServer(host="127.0.0.1", device=device, create_store=create_store, num_threads=1)
    endpoints = server.start()
    connection.send((endpoints.address, endpoints.store_address))
    connection.recv()
    server.stop()


class WorkerProcesses:
    """One process a rank."""

    def __init__(self, num_ranks: int, device: str) -> None:
        self._processes, self._pipes, self.endpoints = [], [], []
        self.store_address = ""
        devices = [device if device == "cpu" else f"{device}:{rank}" for rank in range(num_ranks)]
        for rank in range(num_ranks):
            ours, theirs = _FORKSERVER.Pipe()
            process = _FORKSERVER.Process(target=_run_worker, args=(theirs, devices[rank], rank == 0), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(60), f"rank {rank} did not start"
            address, store_address = pipe.recv()
            self.endpoints.append(engine_pb2.WorkerEndpoint(address=address, device=devices[rank]))
            self.store_address = self.store_address or store_address

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send("stop")
        for process in self._processes:
            process.join(20)
            assert process.exitcode == 0


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


@dataclass(slots=True)
class RunResult:
    """By request: its tokens, and their logprobs if it asked; and the engine's counters at the end."""

    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    num_preemptions: int = 0
    num_steps: int = 0


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
        **shared,
    )
    server = grpc.aio.server()
    engine_pb2_grpc.add_EngineServicer_to_server(EngineService(engine), server)
    server.add_insecure_port(address)
    await server.start()
    try:
        await engine.add_group(
            engine_pb2.AddGroupRequest(group_id=0, workers=workers.endpoints, config=config),
            lambda stage, duration_s: None,
        )
        yield engine
    finally:
        await engine.close()
        await server.stop(0)


async def _generate(address, model_path, options, workers, prompts, sampling) -> RunResult:
    async with (
        _serve_engine(address, model_path, options, workers) as engine,
        grpc.aio.insecure_channel(address) as channel,
    ):
        session = engine_pb2_grpc.EngineStub(channel).Session()
        await session.read()
        submits = [
            engine_pb2.Submit(
                handle=i, prompt_token_ids=np.asarray(prompt, "<i4").tobytes(), sampling_params=sampling(i)
            )
            for i, prompt in enumerate(prompts)
        ]
        await session.write(engine_pb2.SessionRequest(submits=submits))
        tokens, logprobs = [[] for _ in prompts], [[] for _ in prompts]
        num_finished = 0
        while num_finished < len(prompts):
            response = await session.read()
            assert not response.failures, response.failures
            handles = np.frombuffer(response.handles, "<u4").tolist()
            for entry in response.logprobs:
                rows = np.frombuffer(entry.table.logprobs, "<f4").reshape(-1, entry.table.num_columns)
                logprobs[handles[entry.entry]] += rows[:, 0].tolist()
            entries = zip(
                handles,
                np.frombuffer(response.token_ids, "<i4").tolist(),
                response.finish_reasons,
                strict=True,
            )
            for handle, token_id, reason in entries:
                tokens[handle].append(token_id)
                num_finished += bool(reason)
        status = engine.status()
        assert status.groups[0].num_free_blocks == status.groups[0].num_blocks
        engine.scheduler.check_invariants()
        return RunResult(tokens, logprobs, status.counters.num_preemptions, status.groups[0].steps.num_steps)


@pytest.fixture
def run_engine(tmp_path):
    """run_engine(model_path, options, prompts, sampling) -> RunResult; `sampling(i)` gives request i's parameters."""

    def run(model_path, options, prompts, sampling) -> RunResult:
        workers = WorkerProcesses(options.tensor_parallel_size, options.device)
        try:
            address = f"unix:{tmp_path}/engine.sock"
            scenario = _generate(address, model_path, options, workers, prompts, sampling)
            return asyncio.run(asyncio.wait_for(scenario, 240))
        finally:
            workers.close()

    return run


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
