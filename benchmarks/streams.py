"""Requests that generate all the time on a running system, watched token by token while something else goes on."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise

import grpc

from ..errors import InternalError, UnavailableError
from ..launch.client import CHANNEL_OPTIONS
from ..proto import admin_pb2, admin_pb2_grpc, generation_pb2, generation_pb2_grpc
from .grpc_door import generate_request
from .summary import percentile_columns

_POLL_S = 0.01
_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Window:
    """An interval of time.perf_counter()."""

    start_s: float
    end_s: float

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


class Streams:
    """The times at which each stream's tokens came. A stream that ends while it is watched is an error."""

    def __init__(self, generation: generation_pb2_grpc.GenerationStub) -> None:
        self._generation = generation
        self._times_s: list[list[float]] = []
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, prompts: Sequence[Sequence[int]], output_len: int) -> None:
        for prompt in prompts:
            times_s: list[float] = []
            self._times_s.append(times_s)
            self._tasks.append(asyncio.create_task(self._watch(generate_request(prompt, output_len), times_s)))

    async def _watch(self, request: generation_pb2.GenerateRequest, times_s: list[float]) -> None:
        async for response in self._generation.Generate(request):
            _note_time(response, times_s)

    async def advance(self, num_tokens: int) -> Window:
        """Until each has got so many more tokens. Raises UnavailableError if they do not come."""
        started, goals = time.perf_counter(), [len(times_s) + num_tokens for times_s in self._times_s]
        while any(len(times_s) < goal for times_s, goal in zip(self._times_s, goals, strict=True)):
            self.check()
            if time.perf_counter() - started > _TIMEOUT_S:
                raise UnavailableError(f"not all streams got {num_tokens} tokens within {_TIMEOUT_S:.0f} s")
            await asyncio.sleep(_POLL_S)
        return Window(started, time.perf_counter())

    def check(self) -> None:
        """Raises what a stream failed with, or InternalError if one ended."""
        for task in self._tasks:
            if task.done():
                task.result()
                raise InternalError("a stream ended before the measurement did; give it more tokens to generate")

    def gaps_s(self, windows: Sequence[Window]) -> list[float]:
        """Times between tokens, of all streams, that reach into one of the windows."""
        return gaps_within(self._times_s, windows)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _note_time(response: generation_pb2.GenerateResponse, times_s: list[float]) -> None:
    if response.outputs:
        times_s.append(time.perf_counter())


def gaps_within(times_s: Sequence[Sequence[float]], windows: Sequence[Window]) -> list[float]:
    """Each once, however many windows it reaches into."""
    return [
        after - before
        for stream in times_s
        for before, after in pairwise(stream)
        if any(before < window.end_s and after > window.start_s for window in windows)
    ]


def itl_columns(gaps_s: Sequence[float]) -> dict[str, float | None]:
    """Columns of a report's row."""
    return {**percentile_columns("itl", gaps_s), "itl_max_ms": max(gaps_s) * 1e3 if gaps_s else None}


class Watcher:
    """A client with streams of its own, for one other request at a time."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._generation = generation_pb2_grpc.GenerationStub(channel)
        self._admin = admin_pb2_grpc.AdminStub(channel)
        self.streams = Streams(self._generation)

    async def status(self) -> admin_pb2.GetStatusResponse:
        response: admin_pb2.GetStatusResponse = await self._admin.GetStatus(admin_pb2.GetStatusRequest())
        return response

    async def first_token(self, prompt: Sequence[int]) -> Window:
        """From sending a prompt until its only token."""
        request = generate_request(prompt, 1)
        await asyncio.sleep(0)  # a long prompt takes a while to put down; what came meanwhile is read before
        times_s: list[float] = []
        started = time.perf_counter()
        async for response in self._generation.Generate(request):
            _note_time(response, times_s)
        self.streams.check()
        if not times_s:
            raise InternalError("a request ended without a token")
        return Window(started, times_s[0])


@asynccontextmanager
async def open_watcher(address: str) -> AsyncIterator[Watcher]:
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        watcher = Watcher(channel)
        try:
            yield watcher
        finally:
            await watcher.streams.stop()
