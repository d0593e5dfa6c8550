"""A scheduler driven by text: each line is an event, and what it decides is printed below it.

And the shell over real gRPC: a real Engine, workers that count instead of computing, sessions as gateways open them.
"""

import asyncio
from array import array
from collections import defaultdict
from contextlib import asynccontextmanager
from functools import partial

import grpc
import numpy as np
import pytest
from octavo.coordinator.core.batch_plan import BatchPlan, SlotJoin
from octavo.coordinator.core.beam_search import BeamSearchParams, Candidates
from octavo.coordinator.core.drain import WantedCopy
from octavo.coordinator.core.scheduler import Scheduler
from octavo.coordinator.core.scheduler_config import SchedulerConfig
from octavo.coordinator.core.sequence import Request, RequestKey, Sequence, StopConditions
from octavo.coordinator.core.sequence_group import BeamOutput
from octavo.coordinator.core.step_outcome import SampledToken, StepReport
from octavo.coordinator.core.worker_group import GroupMemory
from octavo.coordinator.shell.engine import Engine
from octavo.coordinator.shell.service import EngineService
from octavo.errors import OctavoError
from octavo.proto import admin_pb2, engine_pb2, engine_pb2_grpc, sampling_pb2, worker_pb2, worker_pb2_grpc

NUM_BLOCKS = 1024


class ScriptedScheduler:
    """Runs commands against a Scheduler and describes what it decided.

    config KEY=N...            first line; keys of SchedulerConfig, and blocks=N[,N...] (of each group), groups=N
    add NAME prompt=N [max=N] [min=N] [stop=T,T] [priority=N] [n=N] [beams=N] [salt=S]
                               tokens 0, 1, 2 ...; requests of the same salt share blocks; output i > 0 is NAME.i
    cancel NAME
    schedule [GROUP]           the plan of the next step
    result [GROUP] [TOKEN...] [ms=N] [transfers=N]
                               the oldest step's sampled tokens, in row order, 7 where not given; its duration; the last
                               step whose transfers have ended, its own where not given. A beam's likeliest tokens are
                               the one given, with a log probability of -1, and those after it, each 1 less likely.
                               `nan` for a token: the row has no score to sample from
    lose GROUP                 a group is gone; what is found to be at fault ends
    rebuild GROUP              it is back
    rebuild_all                all groups are lost, if they were there, and back
    drain GROUP                a group is to leave
    drained GROUP              whether nothing of it is left
    copied NAME                the copy of its blocks, wanted before it moves, is over (copies_blocks=1)
    state                      what runs and what waits
    """

    def __init__(self) -> None:
        self._handles: dict[str, RequestKey] = {}
        self._copies: dict[str, WantedCopy] = {}
        self.scheduler: Scheduler

    def run(self, line: str) -> str:
        command, *arguments = line.split()
        positional = [argument for argument in arguments if "=" not in argument]
        keywords = dict(argument.split("=") for argument in arguments if "=" in argument)
        try:
            out = getattr(self, f"do_{command}")(*positional, **keywords)
        except OctavoError as error:
            out = f"{type(error).__name__}: {error}"
        self.scheduler.check_invariants()
        return out

    def do_config(self, blocks: str, groups: str = "1", host: str = "0", **options: str) -> str:
        self.scheduler = Scheduler(SchedulerConfig(**{key: int(value) for key, value in options.items()}))
        sizes = blocks.split(",") if "," in blocks else [blocks] * int(groups)
        self._memories = [GroupMemory(int(num_blocks), int(host)) for num_blocks in sizes]
        for group_id in range(len(sizes)):
            self.do_rebuild(str(group_id))
        return ""

    def do_add(self, name, prompt, max="16", min="0", stop="", **options: str) -> str:  # noqa: A002
        key = RequestKey(0, 10 * len(self._handles))
        stops = frozenset(int(token) for token in stop.split(",") if token)
        n = int(options.get("n", "1"))
        request = Request(
            key,
            array("i", range(int(prompt))),
            StopConditions(int(max), int(min), stops),
            int(options.get("priority", "0")),
            name,
            num_samples=n,
            beam_search=BeamSearchParams(int(options["beams"])) if "beams" in options else None,
            salt=options.get("salt", name).encode(),
        )
        self.scheduler.add(request)
        self._handles |= {name if index == 0 else f"{name}.{index}": key.output(index) for index in range(n)}
        return ""

    def do_cancel(self, name: str) -> str:
        self.scheduler.cancel(self._handles[name])
        return ""

    def do_schedule(self, group: str = "0") -> str:
        plan = self.scheduler.schedule(int(group))
        wanted = self.scheduler.moves.take_wanted()
        self._copies |= {name_of(copy.sequence): copy for copy in wanted}
        said = [f"wants {name_of(copy.sequence)} from {copy.source_id} to {copy.target_id}" for copy in wanted]
        return "; ".join(["nothing" if plan is None else describe(plan), *said])

    def do_copied(self, name: str) -> str:
        self.scheduler.end_copy(self._copies.pop(name))
        return ""

    def do_result(self, *arguments: str, ms: str = "0", transfers: str = "") -> str:
        group = int(arguments[0]) if len(self.scheduler.groups) > 1 else 0
        given = arguments[len(self.scheduler.groups) > 1 :]
        failed = {row for row, token in enumerate(given) if token == "nan"}
        tokens = [-1 if token == "nan" else int(token) for token in given]
        if not self.scheduler.groups[group].inflight:
            return "nothing in flight"
        plan = self.scheduler.groups[group].inflight[0]
        tokens += [7] * (sum(row.samples for row in plan.rows) - len(tokens))
        finished = int(transfers) if transfers else plan.step_id
        report = StepReport(tokens, (), lambda row: _ladder(tokens[row]), int(ms) * 1000, finished, failed)
        outcome = self.scheduler.update(group, report)
        news = [*map(self._describe_token, outcome.tokens), *map(self._describe_beam, outcome.beams)]
        news += [f"{self.name(key)} FAILED" for key in outcome.failed]
        return ", ".join(news) or "no tokens"

    def _describe_beam(self, output: BeamOutput) -> str:
        return f"{self.name(output.key)}: {' '.join(map(str, output.token_ids))} {output.score:.2f}"

    def _describe_token(self, token: SampledToken) -> str:
        cached = f" ({token.num_cached_tokens} cached)" if token.num_cached_tokens else ""
        reason = f" {token.finish_reason.name}" if token.finish_reason else ""
        return f"{self.name(token.key)}={token.token_id}{cached}{reason}"

    def do_lose(self, group: str) -> str:
        return ", ".join(f"{self.name(key)} FAILED" for key in self.scheduler.remove_group(int(group)))

    def do_rebuild(self, group: str) -> str:
        self.scheduler.add_group(int(group), self._memories[int(group)])
        return ""

    def do_rebuild_all(self) -> str:
        for group_id in range(len(self._memories)):
            if group_id in self.scheduler.groups:
                self.scheduler.remove_group(group_id)
            self.do_rebuild(str(group_id))
        return ""

    def do_drain(self, group: str) -> str:
        self.scheduler.drain_group(int(group))
        return ""

    def do_drained(self, group: str) -> str:
        return "yes" if self.scheduler.is_drained(int(group)) else "no"

    def do_state(self) -> str:
        groups = [
            f"group {group.group_id}: {' '.join(map(name_of, group.running)) or '-'}, "
            f"{group.blocks.num_free_blocks} blocks free"
            for group in self.scheduler.groups.values()
        ]
        waiting = " ".join(map(name_of, self.scheduler.waiting)) or "-"
        accused = " ".join(map(name_of, self.scheduler.suspects.queued))
        return "; ".join([*groups, f"waiting: {waiting}", *([f"accused: {accused}"] if accused else [])])

    def name(self, key: RequestKey) -> str:
        return next(name for name, other in self._handles.items() if other == key)


def name_of(sequence: Sequence) -> str:
    return sequence.request.sampling + (f".{sequence.index}" if sequence.index else "")


def _ladder(token_id: int) -> Candidates:
    return Candidates(range(token_id, token_id + 20), -1 - np.arange(20, dtype=np.float32))


def describe(plan: BatchPlan) -> str:
    rows = [name_of(row.sequence) for row in plan.rows]
    decodes, chunks = rows[: len(plan.decode_slots)], rows[len(plan.decode_slots) :]
    sizes = [f"{name}+{n}" for name, n in zip(chunks, plan.chunk_num_tokens, strict=True)]
    parts = [f"step {plan.step_id}"]
    for label, values in (
        ("leave", plan.leave_slots),
        ("join", [_describe_join(join) for join in plan.joins]),
        ("grow", plan.append_slots),
        ("amend", [f"{slot}={token_id}" for slot, token_id in plan.amends.items()]),
        ("save", [f"{block}>{host}" for _, block, host in plan.transfers.saves]),
        ("load", [f"{host}>{block}" for _, block, host in plan.transfers.loads]),
        ("copy", [f"{source}>{target}" for source, target in plan.copies]),
        ("decode", decodes),
        ("chunk", sizes),
    ):
        if values:
            parts.append(f"{label} {' '.join(map(str, values))}")
    return ": ".join((parts[0], ", ".join(parts[1:])))


def _describe_join(join: SlotJoin) -> str:
    name = join.sampling + (f".{join.index}" if join.index else "")
    return f"{name}@{join.slot}" + (f" ({join.num_computed_tokens} computed)" if join.num_computed_tokens else "")


@pytest.fixture
def scripted() -> ScriptedScheduler:
    return ScriptedScheduler()


class CountingWorker(worker_pb2_grpc.WorkerServicer):
    """Keeps a slot table as a worker must. The token sampled at a position is that position."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.epochs: list[int] = []
        self.weight_source = ""
        self.plans: list[worker_pb2.BatchPlan] = []  # of the last epoch
        self.model_time_us = 5
        self.fail_at_step = 0
        self.abort_at_step = 0  # end the call without a word before, as no worker does that lives
        self.poison = b""  # steps with a sequence of this prompt fail
        self.spoil_at_step = 0
        self.spoil = lambda result: None  # what is wrong with that step's result
        self.num_blocks = NUM_BLOCKS
        self.weights_come_late = False  # behind the KV cache, as they do when they are copied
        self.hold_at_step = 0  # clears `hold` before it computes that step
        self.received: list[worker_pb2.ReceiveBlocksRequest] = []
        self.copy_failure = ""
        self.copies = asyncio.Event()  # answers to copies wait for it
        self.copies.set()
        self.gone = asyncio.Event()  # the stream has ended
        self.hold = asyncio.Event()
        self.hold.set()
        self.answers_pings = asyncio.Event()
        self.answers_pings.set()
        self.loaded = asyncio.Event()
        self.loaded.set()
        self.computed: dict[int, int] = {}
        self.known: dict[int, int] = {}
        self.decode_slots: list[int] = []

    async def Configure(self, request, context):
        assert request.rank == self.rank
        self.epochs.append(request.epoch)
        self.weight_source = request.weight_source
        self.plans, self.computed, self.known, self.decode_slots = [], {}, {}, []
        self.poisoned_slots = set()
        if request.config.model_path == "broken":
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "tensor w is missing")
        await self.loaded.wait()
        yield worker_pb2.ConfigureProgress(stage="connect", duration_s=0.25)
        weights = worker_pb2.ConfigureProgress(stage="weights", duration_s=1.0 + self.rank)
        cache = worker_pb2.ConfigureProgress(stage="kv cache", duration_s=0.5 - self.rank / 4)
        for progress in (cache, weights) if self.weights_come_late else (weights, cache):
            yield progress
        yield worker_pb2.ConfigureProgress(stage="warm-up", num_blocks=self.num_blocks)

    async def Ping(self, request, context):
        await self.answers_pings.wait()
        return worker_pb2.PingResponse()

    async def ReceiveBlocks(self, request, context):
        self.received.append(request)
        await self.copies.wait()
        return worker_pb2.ReceiveBlocksResponse(failure=self.copy_failure, duration_us=10.0, num_bytes=100)

    async def Steps(self, requests, context):
        context.add_done_callback(lambda _: self.gone.set())
        async for plan in requests:
            assert plan.step_id == len(self.plans) + 1
            self.plans.append(plan)
            if plan.step_id == self.hold_at_step:
                self.hold.clear()
            await self.hold.wait()
            if plan.step_id == self.abort_at_step:
                await context.abort(grpc.StatusCode.INTERNAL, "the forward pass failed")
            if plan.step_id == self.fail_at_step or self.is_poisoned(plan):
                yield worker_pb2.StepResult(failure="the forward pass failed", step_id=plan.step_id)
                async for _ in requests:
                    pass
                return
            tokens = self.apply(plan)
            if self.rank == 0:
                packed = np.asarray(tokens, "<i4").tobytes()
                step = {"epoch": plan.epoch, "step_id": plan.step_id}
                result = worker_pb2.StepResult(**step, token_ids=packed, model_time_us=self.model_time_us)
                if plan.step_id == self.spoil_at_step:
                    self.spoil(result)
                yield result

    def is_poisoned(self, plan) -> bool:
        self.poisoned_slots -= set(np.frombuffer(plan.leave_slots, "<u2").tolist())
        self.poisoned_slots |= {join.slot for join in plan.joins if self.poison and join.token_ids == self.poison}
        computes = {join.slot for join in plan.joins} | set(np.frombuffer(plan.chunk_slots, "<u2").tolist())
        return bool(self.poisoned_slots & computes)

    def apply(self, plan):
        for slot in np.frombuffer(plan.leave_slots, "<u2").tolist():
            del self.computed[slot], self.known[slot]
        for join in plan.joins:
            assert join.slot not in self.known
            self.computed[join.slot] = join.num_computed_tokens
            self.known[join.slot] = len(join.token_ids) // 4
        if plan.decode_slots_changed:
            self.decode_slots = np.frombuffer(plan.decode_slots, "<u2").tolist()
        chunks = zip(
            np.frombuffer(plan.chunk_slots, "<u2").tolist(),
            np.frombuffer(plan.chunk_num_tokens, "<i4").tolist(),
            strict=True,
        )
        tokens = []
        for slot, num_tokens in [*((slot, 1) for slot in self.decode_slots), *chunks]:
            self.computed[slot] += num_tokens
            if self.computed[slot] == self.known[slot]:
                tokens.append(self.known[slot])
                self.known[slot] += 1
        return tokens


class GatewaySession:
    """A gateway's side of a session."""

    def __init__(self, call) -> None:
        self.call = call
        self.tokens = defaultdict(list)
        self.finished: dict[int, int] = {}
        self.failures: dict[int, engine_pb2.Failure] = {}
        self.num_messages = 0

    async def submit(self, *submits) -> None:
        await self.call.write(engine_pb2.SessionRequest(submits=submits))

    async def stop(self, handle) -> None:
        await self.call.write(engine_pb2.SessionRequest(stop_handles=np.asarray([handle], "<u4").tobytes()))

    async def cancel(self, handle) -> None:
        await self.call.write(engine_pb2.SessionRequest(cancel_handles=np.asarray([handle], "<u4").tobytes()))

    async def read(self) -> None:
        response = await self.call.read()
        assert isinstance(response, engine_pb2.SessionResponse)
        self.num_messages += 1
        self.failures |= {failure.handle: failure for failure in response.failures}
        counts = np.frombuffer(response.num_tokens, "<u4").tolist()
        tokens = iter(np.frombuffer(response.token_ids, "<i4").tolist())
        for handle, count, reason in zip(
            np.frombuffer(response.handles, "<u4").tolist(), counts, response.finish_reasons, strict=True
        ):
            self.tokens[handle] += [next(tokens) for _ in range(count)]
            if reason:
                self.finished[handle] = reason

    async def read_until_done(self, num_requests) -> None:
        while len(self.finished) + len(self.failures) < num_requests:
            await self.read()


def new_submit(handle, num_prompt=4, max_tokens=8, prompt_token_ids=None, resumed=(), **fields):
    return engine_pb2.Submit(
        handle=handle,
        prompt_token_ids=prompt_token_ids or np.arange(num_prompt, dtype="<i4").tobytes(),
        sampling_params=sampling_pb2.SamplingParams(max_tokens=max_tokens, **fields),
        resumed=resumed,
    )


class Cluster:
    num_blocks = NUM_BLOCKS

    def __init__(self, tmp_path, workers, endpoints) -> None:
        self.address = f"unix:{tmp_path}/engine.sock"
        self.workers = workers
        self.endpoints = endpoints
        self.stub: engine_pb2_grpc.EngineStub
        self.engine: Engine

    async def add_group(self, model_path="model", group_id=0, ranks=slice(None), has_served=False):
        request = engine_pb2.AddGroupRequest(
            group_id=group_id,
            workers=self.endpoints[ranks],
            config=engine_pb2.WorkerConfig(model_path=model_path),
            has_served=has_served,
        )
        return [progress async for progress in self.stub.AddGroup(request)]

    async def session(self) -> GatewaySession:
        call = self.stub.Session()
        session = GatewaySession(call)
        await session.read()  # the first, empty one
        return session

    async def await_failures(self, *known_epochs: int) -> list[engine_pb2.GroupFailure]:
        return list((await self.stub.AwaitFailure(engine_pb2.AwaitFailureRequest(known_epochs=known_epochs))).failures)

    async def status(self) -> admin_pb2.GetStatusResponse:
        return await self.stub.GetStatus(admin_pb2.GetStatusRequest())


@asynccontextmanager
async def running_cluster(tmp_path, num_ranks=2, **config):
    servers, workers, endpoints = [], [CountingWorker(rank) for rank in range(num_ranks)], []
    for worker in workers:
        server = grpc.aio.server()
        worker_pb2_grpc.add_WorkerServicer_to_server(worker, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        servers.append(server)
        endpoints.append(engine_pb2.WorkerEndpoint(address=f"127.0.0.1:{port}", device="cpu"))
    it = Cluster(tmp_path, workers, endpoints)
    defaults = {
        "address": it.address, "model": "counting", "vocab_size": 1000, "max_model_len": 64, "block_size": 4,
        "max_num_seqs": 8, "max_num_batched_tokens": 32, "max_num_waiting": 300, "num_inflight_steps": 3,
    }  # fmt: skip
    engine = it.engine = Engine(engine_pb2.EngineConfig(**(defaults | config)))
    server = grpc.aio.server()
    engine_pb2_grpc.add_EngineServicer_to_server(EngineService(engine), server)
    server.add_insecure_port(it.address)
    await server.start()
    async with grpc.aio.insecure_channel(it.address) as channel:
        it.stub = engine_pb2_grpc.EngineStub(channel)
        try:
            yield it
        finally:
            await engine.close()
            await server.stop(0)
            for worker_server in servers:
                await worker_server.stop(0)


@pytest.fixture
def cluster(tmp_path):
    """cluster(num_ranks=2, **overrides of EngineConfig): a context manager with a coordinator and its workers."""
    return partial(running_cluster, tmp_path)


@pytest.fixture
def submit():
    return new_submit


@pytest.fixture
def run():
    return lambda coroutine: asyncio.run(asyncio.wait_for(coroutine, 30))
