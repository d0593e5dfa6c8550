"""Clients that ask all the time at the public gRPC door, and compare each token with what it should be as it comes."""

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc
from grpc_status import rpc_status

from ...launch.client import CHANNEL_OPTIONS
from ...proto import generation_pb2, generation_pb2_grpc
from .answers import Answer, Difference, Output, differences

REQUEST_TIMEOUT_S = 180.0  # one that has not ended by then is lost
_RETRY_S = 0.2
_GATEWAY_DEATH_S = 3.0  # a connection that breaks so soon after a gateway was killed was that gateway's
_REFUSAL_S = 2.0  # what is refused is refused at once
_NOTED_GAP_S = 0.05
_NUM_KEPT_GAPS = 100_000
_NUM_SHOWN = 6  # tokens from a difference on
_REFUSALS = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
# A connection of its own for each stream, so that they spread over the gateways; a new one soon after it broke.
_OPTIONS = [
    *CHANNEL_OPTIONS,
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
]


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request and what an undisturbed server answers."""

    index: int  # in the pool
    request: generation_pb2.GenerateRequest
    expected: Answer


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A request that ended with something else than it should."""

    exchange: int
    noticed_at_s: float  # after the load began
    difference: Difference
    asked_at_s: float = 0.0
    due: Sequence[int] = ()  # the tokens from there on, a few
    came: Sequence[int] = ()

    def __str__(self) -> str:
        tokens = f", due {list(self.due)}, came {list(self.came)}" if self.due or self.came else ""
        times = f"asked at {self.asked_at_s:.1f} s, at {self.noticed_at_s:.1f} s"
        return f"request {self.exchange}, {times}, {self.difference}{tokens}"


@dataclass(slots=True)
class Tally:
    """What became of the load."""

    num_finished: int = 0
    num_tokens: int = 0  # that came
    num_refused: int = 0  # before they had a token, to be asked again
    num_refused_at_end: int = 0  # the same while the server drained
    num_broken_by_gateways: int = 0  # their gateway was killed, and with it their connection
    lost: list[str] = field(default_factory=list)  # why, of each request that was accepted and did not end well
    mismatches: list[Mismatch] = field(default_factory=list)

    def num_of(self, kind: str) -> int:
        """Tokens missing, repeated or wrong."""
        return sum(one.difference.count for one in self.mismatches if one.difference.kind == kind)


@dataclass(frozen=True, slots=True)
class Gap:
    """Between two tokens of a stream. Times of time.monotonic()."""

    start: float
    end: float


class Load:
    """Streams that each ask one request after another, drawn from a pool."""

    def __init__(
        self,
        address: str,
        pool: Sequence[Exchange],
        num_streams: int,
        seed: int,
        on_wrong: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`on_wrong` gets a line for each request that is lost, or answered with something else, as it ends."""
        self.tally = Tally()
        self._on_wrong = on_wrong
        self._address, self._pool, self._num_streams, self._seed = address, pool, num_streams, seed
        self._started_at = time.monotonic()
        self._is_open = asyncio.Event()
        self._is_ending = False
        self._tasks: list[asyncio.Task[None]] = []
        self._gateway_killed_at = float("-inf")
        self._token_at: dict[int, float] = {}  # when the last token came, by stream whose request has one and goes on
        self._gaps: deque[Gap] = deque(maxlen=_NUM_KEPT_GAPS)
        self._num_asking = 0

    def start(self) -> None:
        self._started_at = time.monotonic()
        self._is_open.set()
        self._tasks = [asyncio.create_task(self._run_stream(index)) for index in range(self._num_streams)]

    @property
    def time_s(self) -> float:
        """Since it began."""
        return time.monotonic() - self._started_at

    def check(self) -> None:
        """Raises what a stream failed with by a fault of the tool itself."""
        for task in self._tasks:
            if task.done():
                task.result()

    async def pause(self) -> None:
        """Until every request that runs has ended; no new ones."""
        self._is_open.clear()
        while self._num_asking:
            self.check()
            await asyncio.sleep(_RETRY_S)

    def resume(self) -> None:
        self._is_open.set()

    def end_when_refused(self) -> None:
        """The server is about to drain: a stream that is refused asks no more."""
        self._is_ending = True

    async def wait_until_ended(self) -> None:
        """After `end_when_refused`, or while it is paused."""
        self._is_ending = True
        self._is_open.set()
        await asyncio.gather(*self._tasks)

    async def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def note_gateway_kill(self) -> None:
        self._gateway_killed_at = time.monotonic()

    def goes_on(self, since: float) -> bool:
        """Whether each stream that has had a token has had another since then, or ended; of time.monotonic()."""
        return all(at > since for at in self._token_at.values())

    def longest_gap_s(self, start: float, end: float) -> float:
        """The longest that a stream had to wait for its next token within this interval of time.monotonic()."""
        ended = [min(gap.end, end) - max(gap.start, start) for gap in self._gaps]
        running = [end - max(at, start) for at in self._token_at.values()]
        return max([0.0, *ended, *running])

    async def _run_stream(self, index: int) -> None:
        rng = random.Random(f"{self._seed} {index}")  # noqa: S311 (no secret)
        async with grpc.aio.insecure_channel(self._address, options=_OPTIONS) as channel:
            stub = generation_pb2_grpc.GenerationStub(channel)
            while True:
                await self._is_open.wait()
                if not await self._ask(index, stub, rng.choice(self._pool)):
                    if self._is_ending:
                        return
                    await asyncio.sleep(_RETRY_S)

    async def _ask(self, stream: int, stub: generation_pb2_grpc.GenerationStub, exchange: Exchange) -> bool:
        """Whether it ended well."""
        reading = _Reading(exchange)
        self._num_asking += 1
        try:
            async for response in stub.Generate(exchange.request, timeout=REQUEST_TIMEOUT_S):
                if num_tokens := reading.take(response, self.time_s):
                    self.tally.num_tokens += num_tokens
                    self._note_token(stream)
        except grpc.aio.AioRpcError as error:
            self._note_error(reading, error)
            return False
        finally:
            self._num_asking -= 1
            self._token_at.pop(stream, None)
        self._note_end(reading)
        return True

    def _note_token(self, stream: int) -> None:
        now = time.monotonic()
        before = self._token_at.get(stream, now)
        self._token_at[stream] = now
        if now - before > _NOTED_GAP_S:
            self._gaps.append(Gap(before, now))

    def _note_end(self, reading: "_Reading") -> None:
        self.tally.num_finished += 1
        noticed_at_s = self.time_s if reading.parted_at_s is None else reading.parted_at_s
        for difference in differences(reading.exchange.expected, reading.found):
            mismatch = reading.mismatch(reading.began_at - self._started_at, noticed_at_s, difference)
            self.tally.mismatches.append(mismatch)
            self._on_wrong(str(mismatch))

    def _note_error(self, reading: "_Reading", error: grpc.aio.AioRpcError) -> None:
        if self._is_of_killed_gateway(reading, error):
            self.tally.num_broken_by_gateways += 1
        elif not self._is_refusal(reading, error):
            lost = f"request {reading.describe()} at {self.time_s:.1f} s: {_describe(error)}"
            self.tally.lost.append(lost)
            self._on_wrong(lost)
        elif self._is_ending:
            self.tally.num_refused_at_end += 1
        else:
            self.tally.num_refused += 1

    def _is_of_killed_gateway(self, reading: "_Reading", error: grpc.aio.AioRpcError) -> bool:
        killed_at = self._gateway_killed_at
        is_soon_after = reading.began_at < killed_at and time.monotonic() - killed_at < _GATEWAY_DEATH_S
        return is_soon_after and _is_of_connection(error)

    def _is_refusal(self, reading: "_Reading", error: grpc.aio.AioRpcError) -> bool:
        """What ends later was accepted. A request that comes as the gateway's door closes hears gRPC's CANCELLED."""
        if reading.found.num_tokens or time.monotonic() - reading.began_at > _REFUSAL_S:
            return False
        return error.code() in _REFUSALS or (self._is_ending and _is_of_connection(error))


def _is_of_connection(error: grpc.aio.AioRpcError) -> bool:
    """The server's own errors have details, a connection that breaks has none."""
    return rpc_status.from_call(error) is None


def _describe(error: grpc.aio.AioRpcError) -> str:
    return f"{error.code().name}: {' '.join(str(error.details()).split())}"


class _Reading:
    """One request while its answer comes."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange, self.found, self.began_at = exchange, Answer(), time.monotonic()
        self.parted_at_s: float | None = None  # when the first token came that is not the one that was due

    def take(self, response: generation_pb2.GenerateResponse, now_s: float) -> int:
        """How many tokens came."""
        num_tokens = self.found.take(response)
        if self.parted_at_s is None and not all(
            self.found.goes_like(self.exchange.expected, piece) for piece in response.outputs
        ):
            self.parted_at_s = now_s
        return num_tokens

    def mismatch(self, asked_at_s: float, noticed_at_s: float, difference: Difference) -> Mismatch:
        due, came = (
            answer.outputs.get(difference.output, Output()).token_ids[difference.position :][:_NUM_SHOWN]
            for answer in (self.exchange.expected, self.found)
        )
        return Mismatch(self.exchange.index, noticed_at_s, difference, asked_at_s, due, came)

    def describe(self) -> str:
        expected = self.exchange.expected.num_tokens
        return f"{self.exchange.index}, after {self.found.num_tokens} of {expected} tokens,"
