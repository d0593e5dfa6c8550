"""Runs one worker group: keeps steps in flight, takes their results, counts their time."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ...errors import InternalError, OctavoError
from ...proto import admin_pb2, engine_pb2, worker_pb2
from ..core.batch_plan import BatchPlan
from ..core.scheduler import Scheduler
from .codec import encode_plan
from .worker_link import WorkerLink

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GroupEvents:
    """What a running group tells the engine."""

    on_result: Callable[[int, worker_pb2.StepResult], None]  # group id, result
    on_failure: Callable[[int, OctavoError], None]  # group id, why; once


class GroupRunner:
    """The engine loop of one group: `schedule` while there is room in flight, then wait for a result or new work."""

    def __init__(
        self, request: engine_pb2.AddGroupRequest, epoch: int, scheduler: Scheduler, events: GroupEvents
    ) -> None:
        self.group_id: int = request.group_id
        self.epoch = epoch
        self.link = WorkerLink(request, epoch)
        self.state = admin_pb2.GROUP_STATE_STARTING
        self.failure = ""  # why, once it failed
        self.steps = admin_pb2.StepCounters()
        self._scheduler = scheduler
        self._events = events
        self._wake = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None  # of the link, once it failed
        self._sent_at: deque[float] = deque()  # of the steps in flight
        self._last_result_at = 0.0

    def start(self) -> None:
        """The ranks are configured: begin to give them work."""
        self.state = admin_pb2.GROUP_STATE_READY
        self.link.open(self._take_result, self._fail)
        self._pump = asyncio.create_task(self._run())

    def wake(self) -> None:
        """There may be something to schedule."""
        self._wake.set()

    async def _run(self) -> None:
        try:
            while self.state == admin_pb2.GROUP_STATE_READY:
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
        while self.state == admin_pb2.GROUP_STATE_READY:
            plan = self._scheduler.schedule(self.group_id)
            if plan is None:
                return
            await self._send(plan)

    async def _send(self, plan: BatchPlan) -> None:
        encoded = encode_plan(plan, self.epoch)
        self.steps.plan_bytes += len(encoded)
        self.steps.num_tokens += plan.num_tokens
        self._sent_at.append(time.monotonic())
        await self.link.send(encoded)

    def _take_result(self, result: worker_pb2.StepResult) -> None:
        if self.state != admin_pb2.GROUP_STATE_READY:
            return
        self._check_result(result)
        now = time.monotonic()
        self.steps.num_steps += 1
        self.steps.step_time_s += now - max(self._sent_at.popleft(), self._last_result_at)
        self.steps.model_time_s += result.model_time_us / 1e6
        self._last_result_at = now
        self._events.on_result(self.group_id, result)
        self.wake()

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
        if self.state != admin_pb2.GROUP_STATE_FAILED:
            self.state = admin_pb2.GROUP_STATE_FAILED
            self.failure = str(error)
            self._closing = asyncio.create_task(self.link.close())  # a task: the caller may be one of those it ends
            self.wake()  # so that the pump ends
            self._events.on_failure(self.group_id, error)

    async def close(self) -> None:
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.gather(self._pump, return_exceptions=True)
        await (self._closing or self.link.close())
