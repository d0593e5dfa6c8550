"""Finds a group that hangs: a rank that answers no ping, or a step that is overdue.

TCP says nothing of a process that is stopped, and gRPC's keepalive notices it after seconds to a minute. A rank answers
pings beside its steps, so one whose step hangs still answers: then the step's own deadline counts.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

from ...proto import worker_pb2
from .worker_error import WorkerError

_PING_S = 1.0
_TICK_S = 0.25
_PROFILING_FACTOR = 12  # while a rank writes a profile down, it may hardly get to answer

Ping = Callable[[int], Awaitable[worker_pb2.PingResponse]]  # of a rank; raises WorkerError if it is gone


class Watchdog:
    """Watches the ranks of one group while `run` runs.

    Its clock counts only the time in which this process itself ran: what was late because nobody here looked is not.
    """

    def __init__(self, ping: Ping, num_ranks: int, timeout_s: float) -> None:
        """`timeout_s`: how long a rank may owe an answer to a ping; 0: for ever."""
        self._ping, self._timeout_s = ping, timeout_s
        self._now_s = 0.0
        self._asked_at: list[float | None] = [None] * num_ranks  # by rank that owes an answer
        self._is_profiling = [False] * num_ranks
        self._step: tuple[float, float] | None = None  # the oldest in flight: since when, and how long it may take
        self.heard_at = [time.monotonic()] * num_ranks

    def expect_step(self, allowed_s: float) -> None:
        """The group begins a step now, which may take so long."""
        self._step = (self._now_s, allowed_s)

    def rest(self) -> None:
        """No step is in flight."""
        self._step = None

    async def run(self) -> None:
        """Returns never. Raises WorkerError when the group hangs or a rank is gone."""
        watching = asyncio.create_task(self._watch())
        pinging = [asyncio.create_task(self._ping_rank(rank)) for rank in range(len(self._asked_at))]
        tasks = [watching, *pinging]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ping_rank(self, rank: int) -> None:
        while True:
            self._asked_at[rank] = self._now_s
            self._is_profiling[rank] = (await self._ping(rank)).is_profiling
            self._asked_at[rank] = None
            self.heard_at[rank] = time.monotonic()
            await asyncio.sleep(_PING_S)

    async def _watch(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(_TICK_S)
            self._now_s += min(time.monotonic() - before, 2 * _TICK_S)
            self._check_ranks()
            self._check_step()

    def _check_ranks(self) -> None:
        for rank in range(len(self._asked_at)):
            timeout_s = self._timeout_s * (_PROFILING_FACTOR if self._is_profiling[rank] else 1)
            if 0 < timeout_s < (owed_s := self._owed_s(rank)):
                raise WorkerError(rank, f"it has not answered for {owed_s:.1f} s")

    def _owed_s(self, rank: int) -> float:
        """How long a rank has owed the answer to a ping."""
        asked_at = self._asked_at[rank]
        return 0.0 if asked_at is None else self._now_s - asked_at

    def _check_step(self) -> None:
        if any(self._is_profiling):  # writing the profile down may take minutes
            self._step = (self._now_s, self._step[1]) if self._step else None
        if self._step is None:
            return
        since, allowed_s = self._step
        if self._now_s - since > allowed_s > 0:
            late = f"a step has not ended after {self._now_s - since:.1f} s"
            for rank in range(len(self._asked_at)):
                if self._owed_s(rank) > _PING_S:
                    raise WorkerError(rank, f"it does not answer, and {late}")
            raise WorkerError(None, f"{late}; its ranks still answer")
