"""Runs one incarnation of a worker group: keeps steps in flight, takes their results, counts their time."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...errors import InternalError, OctavoError
from ...proto import admin_pb2, engine_pb2, worker_pb2
from ..core.batch_plan import BatchPlan
from ..core.scheduler import Scheduler
from ..core.step_deadlines import StepDeadlines
from ..core.step_lead import StepLead
from ..core.worker_group import GroupMemory
from .codec import encode_plan
from .watchdog import Watchdog
from .worker_error import WorkerError
from .worker_link import WorkerLink

_log = logging.getLogger(__name__)

# While a rank loads its weights, Python may hold its lock for long.
_CONFIGURE_FACTOR = 12.0  # times the timeout of its answers to pings


@dataclass(frozen=True, slots=True)
class GroupEvents:
    """What a running group tells the engine."""

    on_result: Callable[[int, worker_pb2.StepResult], None]  # group id, result
    on_failure: Callable[[int, OctavoError], None]  # group id, why; once
    on_wanted_copies: Callable[[], None]  # the scheduler has some


@dataclass(frozen=True, slots=True)
class Downfall:
    """When a group failed, on this process's clock, and how long nothing had been heard then of what failed."""

    at: float
    silent_s: float


@dataclass(frozen=True, slots=True)
class _SentStep:
    sent_at: float
    num_tokens: int
    was_held: bool  # it could have been planned earlier


class GroupRunner:
    """The engine loop of one group: `schedule` while there is room in flight, then wait for a result or new work.
    Behind a step that takes its time, the next one is scheduled towards its end.

    Once it has failed it takes nothing more from its ranks: its epoch is over.
    """

    def __init__(
        self,
        request: engine_pb2.AddGroupRequest,
        epoch: int,
        scheduler: Scheduler,
        events: GroupEvents,
        deadlines: StepDeadlines,
    ) -> None:
        """`deadlines`: those of the last incarnation, if there was one: sizes that it has seen are no news."""
        self.group_id: int = request.group_id
        self.epoch = epoch
        self.link = WorkerLink(request, epoch)
        self.downfall: Downfall | None = None
        self.steps = admin_pb2.StepCounters()
        self._scheduler = scheduler
        self._events = events
        self.deadlines = deadlines
        self._watchdog = Watchdog(self.link.ping, len(self.link.endpoints), deadlines.least_s)
        self._is_running = False
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._closing: asyncio.Task[None] | None = None  # of the link, once it failed
        self._inflight: deque[_SentStep] = deque()
        self._last_result_at = 0.0
        self._lead = StepLead()
        self._is_holding = False  # the next step is better planned later, or was so until now
        self._hold: asyncio.TimerHandle | None = None  # wakes the loop then

    async def configure(self, report: Callable[[str, float], Any]) -> GroupMemory:
        """As WorkerLink.configure; a rank that hangs fails it too."""
        timeout_s = _CONFIGURE_FACTOR * self.deadlines.least_s
        watchdog = Watchdog(self.link.ping, len(self.link.endpoints), timeout_s)
        configuring = asyncio.ensure_future(self.link.configure(report))
        watching = asyncio.ensure_future(watchdog.run())
        try:
            await asyncio.wait({configuring, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not configuring.done():
                watching.result()  # raises
            return configuring.result()
        finally:
            configuring.cancel()
            watching.cancel()
            await asyncio.gather(configuring, watching, return_exceptions=True)

    def start(self) -> None:
        """The ranks are configured: begin to give them work."""
        self._is_running = True
        self.link.open(self._take_result, self._fail)
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._watch())]

    def wake(self) -> None:
        """There may be something to schedule."""
        self._wake.set()

    async def _watch(self) -> None:
        try:
            await self._watchdog.run()
        except OctavoError as error:
            self._fail(error)
        except Exception as error:  # nobody awaits this task: unheard, no hang would be found any more
            _log.exception("group %d: it can no longer be watched", self.group_id)
            self._fail(InternalError(f"it can no longer be watched: {error}"))

    async def _run(self) -> None:
        try:
            while self._is_running:
                await self._wake.wait()
                self._wake.clear()
                await self._send_steps()
        except OctavoError as error:
            self._fail(error)
        except Exception as error:  # nobody awaits this task: unheard, the group would wait forever
            _log.exception("group %d: its next step could not be made", self.group_id)
            self._fail(InternalError(f"its next step could not be made: {error}"))

    async def _send_steps(self) -> None:
        """As many as may be in flight. A group that failed meanwhile is no longer the scheduler's."""
        while self._is_running:
            if self._is_too_early():
                return
            plan = self._scheduler.schedule(self.group_id)
            if self._scheduler.has_wanted_copies:
                self._events.on_wanted_copies()
            if plan is None:
                self._is_holding = False
                return
            await self._send(plan)

    def _is_too_early(self) -> bool:
        """Whether the next step is better planned later. The loop is woken then, if nothing wakes it before."""
        if self._hold is not None:
            self._hold.cancel()
            self._hold = None
        expected_ms = self._scheduler.expected_ms(self.group_id)
        if not expected_ms:
            return False
        started_at = max(self._inflight[0].sent_at, self._last_result_at)
        hold_s = started_at + self._lead.hold_ms(expected_ms) / 1e3 - time.monotonic()
        if hold_s <= 0:
            return False
        self._is_holding = True
        self._hold = asyncio.get_running_loop().call_later(hold_s, self.wake)
        return True

    async def _send(self, plan: BatchPlan) -> None:
        encoded = encode_plan(plan, self.epoch)
        self.steps.plan_bytes += len(encoded)
        self.steps.num_tokens += plan.num_tokens
        self._inflight.append(_SentStep(time.monotonic(), plan.num_tokens, self._is_holding))
        self._is_holding = False
        if len(self._inflight) == 1:
            self._expect_oldest()
        await self.link.send(encoded)

    def _expect_oldest(self) -> None:
        """The workers are at the oldest step in flight."""
        if self._inflight:
            self._watchdog.expect_step(self.deadlines.allowed_s(self._inflight[0].num_tokens))
        else:
            self._watchdog.rest()

    def _take_result(self, result: worker_pb2.StepResult) -> None:
        if not self._is_running:
            return
        self._check_result(result)
        self._count_step(result)
        self._expect_oldest()
        self._events.on_result(self.group_id, result)
        self.wake()

    def _count_step(self, result: worker_pb2.StepResult) -> None:
        now = time.monotonic()
        step = self._inflight.popleft()
        duration_s = now - max(step.sent_at, self._last_result_at)
        if step.was_held:
            self._lead.observe(result.idle_us / 1e3)
        self.deadlines.observe(step.num_tokens, duration_s)
        self.steps.num_steps += 1
        self.steps.step_time_s += duration_s
        self.steps.model_time_s += result.model_time_us / 1e6
        self._last_result_at = now

    def _check_result(self, result: worker_pb2.StepResult) -> None:
        """Raises InternalError unless `result` answers the oldest step in flight."""
        inflight = self._scheduler.groups[self.group_id].inflight
        if not inflight:
            raise InternalError(f"a result of step {result.step_id} came, and no step is in flight")
        expected = (self.epoch, inflight[0].step_id, inflight[0].num_samples)
        answered = (result.epoch, result.step_id, len(result.token_ids) // 4)
        if answered != expected:
            raise InternalError(f"(epoch, step, tokens) of a result are {answered}; the oldest plan's are {expected}")

    def _fail(self, error: OctavoError) -> None:
        if not self._is_running:
            return
        self._is_running = False
        self.downfall = self._describe(error)
        self._closing = asyncio.create_task(self._shut())  # a task: the caller may be one of those it ends
        self._events.on_failure(self.group_id, error)

    def _describe(self, error: OctavoError) -> Downfall:
        now, heard_at = time.monotonic(), list(self._watchdog.heard_at)
        heard_at[0] = max(heard_at[0], self._last_result_at)
        rank = error.rank if isinstance(error, WorkerError) else None
        return Downfall(now, now - (self._last_result_at if rank is None else heard_at[rank]))

    async def _shut(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.link.close()

    async def close(self) -> None:
        """Ends the streams; their ranks live on."""
        self._is_running = False
        await (self._closing or self._shut())
