"""One run: a server, its undisturbed answers, the load, the faults, the end; and what came of it all."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc

from ...errors import InternalError, UnavailableError
from ...launch.client import CHANNEL_OPTIONS
from ...launch.rpc_errors import from_rpc_error
from ...proto import generation_pb2, generation_pb2_grpc
from .answers import Answer, differences
from .faults import FaultMaker, FaultRecord
from .load import REQUEST_TIMEOUT_S, Exchange, Load, Tally
from .requests import make_requests
from .resources import ResourceLog, Sample
from .script import Fault, Shape
from .server import ChaosServer, Leftovers, running_server
from .watch import StatusWatch, is_idle, num_leaked_blocks

_FEW = 8  # requests at once, when there is next to nothing beside them
_MOST_SET_ASIDE = 1 / 8
_START_LIMIT_S = 60.0
_IDLE_LIMIT_S = 30.0
_CHECK_S = 0.2
_LOAD_BEFORE_DRAIN_S = 2.0

Say = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ChaosSettings:
    """Of one run. `options` are those of `octavo serve`, without ports."""

    options: Sequence[str]
    shape: Shape
    script: Sequence[Fault]
    num_streams: int
    num_requests: int  # distinct ones
    duration_s: float  # of the load, at least
    shutdown_timeout_s: float
    seed: int
    log: Path | None = None  # a file for what the server says


@dataclass(slots=True)
class Outcome:
    """What came of a run."""

    records: list[FaultRecord] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    num_set_aside: int = 0  # requests of the pool whose answer hangs on what else is in the batch
    num_blocks: int = 0  # of all groups, at the end
    num_leaked_blocks: int | None = None  # of them; None: the server did not come to rest
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    leftovers: Leftovers | None = None
    duration_s: float = 0.0  # of the load
    was_drained: bool = False  # whether the server was ended under load
    problem: str = ""  # what ended the run before its time


def run_chaos(settings: ChaosSettings, say: Say) -> Outcome:
    """Raises OctavoError if the server does not start or does not answer; what happens under load is in the outcome."""
    say("starting the server")
    with running_server(settings.options, settings.log) as server:
        return asyncio.run(_Run(settings, server, say).run())


class _Run:
    def __init__(self, settings: ChaosSettings, server: ChaosServer, say: Say) -> None:
        self._settings, self._server, self._say = settings, server, say
        self._watch, self._resources = StatusWatch(server.address), ResourceLog(server)
        self._outcome = Outcome()

    async def run(self) -> Outcome:
        pool = await self._ask_in_peace()
        load = Load(self._server.address, pool, self._settings.num_streams, self._settings.seed, self._say)
        beside = [asyncio.create_task(self._watch.run()), asyncio.create_task(self._resources.run())]
        try:
            await self._run_load(load)
        except UnavailableError as error:
            self._outcome.problem = str(error)
        finally:
            self._outcome.duration_s = self._outcome.duration_s or load.time_s
            for task in beside:
                task.cancel()
            await load.cancel()
            ends = await asyncio.gather(*beside, return_exceptions=True)
        for fault in ends:
            if isinstance(fault, Exception):  # of the tool: what it saw was not all
                raise fault
        self._outcome.tally, self._outcome.samples = load.tally, self._resources.samples
        return self._outcome

    # The answers that are due

    async def _ask_in_peace(self) -> list[Exchange]:
        """Twice, once a few at a time and once all at once: nearly equal scores may fall out another way in another
        batch, which is no fault of what comes later."""
        async with grpc.aio.insecure_channel(self._server.address, options=CHANNEL_OPTIONS) as channel:
            stub = generation_pb2_grpc.GenerationStub(channel)
            try:
                requests = await self._make_requests(stub)
                self._say(f"asking {len(requests)} requests in peace, twice")
                answers = await _ask_all(stub, requests, _FEW)
                again = await _ask_all(stub, requests, len(requests))
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error, self._server.address) from error
        pool = [
            Exchange(index, request, answer)
            for index, (request, answer, other) in enumerate(zip(requests, answers, again, strict=True))
            if not differences(answer, other)
        ]
        self._outcome.num_set_aside = len(requests) - len(pool)
        if self._outcome.num_set_aside > _MOST_SET_ASIDE * len(requests):
            what = f"{self._outcome.num_set_aside} of {len(requests)} requests"
            raise InternalError(f"{what} were answered in two ways by a server that nothing happened to")
        return pool

    async def _make_requests(self, stub: generation_pb2_grpc.GenerationStub) -> list[generation_pb2.GenerateRequest]:
        [model] = (await stub.ListModels(generation_pb2.ListModelsRequest())).models
        return make_requests(self._settings.num_requests, model.vocab_size, self._settings.seed)

    # Load and faults

    async def _run_load(self, load: Load) -> None:
        maker = FaultMaker(self._server, self._watch, load, self._settings.shape)
        if await self._watch.wait_until(maker.is_whole, _START_LIMIT_S) is None:
            raise InternalError("the server says that it is ready, and GetStatus does not")
        load.start()
        self._say(f"{self._settings.num_streams} streams for {self._settings.duration_s:g} s")
        for fault in self._settings.script:
            await self._wait(load, fault.at_s)
            if fault.kind != "drain":
                self._say(f"{load.time_s:7.1f} s  {fault}")
                record = await self._beside(load, maker.make(fault))
                self._outcome.records.append(record)
                self._say(_describe(record))
        await self._wait(load, self._settings.duration_s)
        await self._end(load)

    async def _wait(self, load: Load, until_s: float) -> None:
        await self._beside(load, asyncio.sleep(max(0.0, until_s - load.time_s)))

    async def _beside(self, load: Load, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`. Raises UnavailableError if the server ends meanwhile."""
        working = asyncio.create_task(work)
        try:
            while not working.done():
                await asyncio.wait({working}, timeout=_CHECK_S)
                self._server.require_alive()
                load.check()
            return working.result()
        finally:
            working.cancel()

    async def _end(self, load: Load) -> None:
        self._outcome.duration_s = load.time_s
        self._say("no more requests; waiting until the server is idle")
        await self._beside(load, load.pause())
        await self._count_blocks()
        self._outcome.was_drained = bool(self._settings.script) and self._settings.script[-1].kind == "drain"
        if self._outcome.was_drained:
            load.resume()
            await asyncio.sleep(_LOAD_BEFORE_DRAIN_S)
        self._say("SIGTERM" + (" under load" if self._outcome.was_drained else ""))
        load.end_when_refused()
        self._server.terminate()
        ending = asyncio.create_task(
            asyncio.to_thread(self._server.wait_until_ended, self._settings.shutdown_timeout_s)
        )
        if self._outcome.was_drained:
            await load.wait_until_ended()
        self._outcome.leftovers = await ending

    async def _count_blocks(self) -> None:
        if await self._watch.wait_until(is_idle, _IDLE_LIMIT_S) is not None:
            status = self._watch.last
            assert status is not None
            self._outcome.num_blocks = sum(group.num_blocks for group in status.groups)
            self._outcome.num_leaked_blocks = num_leaked_blocks(status)


async def _ask_all(
    stub: generation_pb2_grpc.GenerationStub, requests: Sequence[generation_pb2.GenerateRequest], num_at_once: int
) -> list[Answer]:
    room = asyncio.Semaphore(num_at_once)

    async def ask(request: generation_pb2.GenerateRequest) -> Answer:
        answer = Answer()
        async with room:
            async for response in stub.Generate(request, timeout=REQUEST_TIMEOUT_S):
                answer.take(response)
        return answer

    return list(await asyncio.gather(*(ask(request) for request in requests)))


def _describe(record: FaultRecord) -> str:
    if record.problem:
        return f"           {record.problem}"
    noticed = "not noticed" if record.noticed_after_s is None else f"noticed after {record.noticed_after_s:.2f} s"
    gap = "" if record.longest_gap_s is None else f", longest gap of a stream {record.longest_gap_s:.1f} s"
    return f"           {noticed}, whole after {record.whole_after_s:.1f} s{gap}"
