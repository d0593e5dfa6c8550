"""Measures one running system over its gRPC door: the time of a decode step in the steady state, and of a prefill."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
from grpc.experimental import ChannelOptions

from ..errors import InternalError, InvalidArgumentError, UnavailableError
from ..proto import admin_pb2, admin_pb2_grpc, generation_pb2_grpc
from .grpc_door import generate_request
from .observation import Observation
from .workload import LengthRange, Workload

_WARM_UP_STEPS = 16  # of the full batch, before the steps that count
_POLL_S = 0.02
_ADMISSION_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class DecodeCase:
    """`batch_size` sequences that know about `context_len` tokens each, over `num_steps` steps."""

    batch_size: int
    context_len: int
    num_steps: int
    vocab_size: int
    max_model_len: int
    seed: int

    def __post_init__(self) -> None:
        if self.prompt_len < 1:
            needed = self.context_len - self.prompt_len + 1
            raise InvalidArgumentError(f"context must be at least {needed} for {self.num_steps} steps", "context")
        if self.output_len < 2 * (_WARM_UP_STEPS + self.num_steps):
            raise InvalidArgumentError(
                f"context {self.context_len} and {self.num_steps} steps need a max_model_len of "
                f"{self.prompt_len + 2 * (_WARM_UP_STEPS + self.num_steps)}, not {self.max_model_len}",
                "context",
            )

    @property
    def prompt_len(self) -> int:
        """Such that the context is `context_len` in the middle of the measured steps."""
        return self.context_len - _WARM_UP_STEPS - self.num_steps // 2

    @property
    def output_len(self) -> int:
        """As far as the model goes: nobody may leave before the measurement ends."""
        return self.max_model_len - self.prompt_len

    def prompts(self) -> list[list[int]]:
        lengths = LengthRange(self.prompt_len, self.prompt_len)
        return Workload(self.batch_size, lengths, self.output_len, self.seed).prompts(self.vocab_size)


@dataclass(frozen=True, slots=True)
class StepMeans:
    """Over an interval. Times as StepCounters defines them."""

    num_steps: int
    step_s: float
    model_s: float
    plan_bytes: float
    num_tokens: float

    @classmethod
    def between(cls, before: admin_pb2.StepCounters, after: admin_pb2.StepCounters) -> "StepMeans":
        num_steps = after.num_steps - before.num_steps
        if num_steps < 1:
            raise InternalError("no step was made between two snapshots of the status")
        return cls(
            num_steps,
            (after.step_time_s - before.step_time_s) / num_steps,
            (after.model_time_s - before.model_time_s) / num_steps,
            (after.plan_bytes - before.plan_bytes) / num_steps,
            (after.num_tokens - before.num_tokens) / num_steps,
        )

    @property
    def share_outside_model(self) -> float:
        return 1 - self.model_s / self.step_s


def total_steps(status: admin_pb2.GetStatusResponse) -> admin_pb2.StepCounters:
    """Of all groups."""
    counters = [group.steps for group in status.groups]
    return admin_pb2.StepCounters(
        num_steps=sum(one.num_steps for one in counters),
        num_tokens=sum(one.num_tokens for one in counters),
        step_time_s=sum(one.step_time_s for one in counters),
        model_time_s=sum(one.model_time_s for one in counters),
        plan_bytes=sum(one.plan_bytes for one in counters),
    )


def total_blocks(status: admin_pb2.GetStatusResponse) -> admin_pb2.BlockCounters:
    """Of all groups."""
    counters = [group.block_counters for group in status.groups]
    names = [field.name for field in admin_pb2.BlockCounters.DESCRIPTOR.fields]
    return admin_pb2.BlockCounters(**{name: sum(getattr(one, name) for one in counters) for name in names})


@dataclass(frozen=True, slots=True)
class DecodeTimes:
    steps: StepMeans
    gaps_s: list[float]  # inter-token latencies that one client saw, of the same steps


class Probe:
    """A client of one idle system."""

    def __init__(self, channel: grpc.aio.Channel, blocking_channel: grpc.Channel) -> None:
        self._generation = generation_pb2_grpc.GenerationStub(channel)
        self._blocking_generation = generation_pb2_grpc.GenerationStub(blocking_channel)
        self._admin = admin_pb2_grpc.AdminStub(channel)

    async def status(self) -> admin_pb2.GetStatusResponse:
        response: admin_pb2.GetStatusResponse = await self._admin.GetStatus(admin_pb2.GetStatusRequest())
        return response

    async def measure_decode(self, case: DecodeCase) -> DecodeTimes:
        """The last request to come in is the probe: at its first token, all others decode already."""
        *others, probe = case.prompts()
        requests = [generate_request(prompt, case.output_len, only_end=True) for prompt in others]
        calls = [self._generation.Generate(request) for request in requests]
        try:
            await self._wait_for_requests(len(others))
            times = await self._watch(probe, case)
            if any(call.done() for call in calls):
                raise InternalError("a request ended before the measurement did")
        finally:
            for call in calls:
                call.cancel()
        await self._wait_for_requests(0)
        return times

    async def _watch(self, prompt: list[int], case: DecodeCase) -> DecodeTimes:
        """Snapshots are taken while the stream is read on, so that they do not hold up the times of its tokens."""
        snapshots: list[asyncio.Task[admin_pb2.GetStatusResponse]] = []
        event_times_s: list[float] = []
        call = self._generation.Generate(generate_request(prompt, case.output_len))
        async for response in call:
            if response.outputs:
                event_times_s.append(time.perf_counter())
            if len(event_times_s) in (_WARM_UP_STEPS, _WARM_UP_STEPS + case.num_steps):
                snapshots.append(asyncio.create_task(self.status()))
            if len(snapshots) == 2:
                break
        before, after = await asyncio.gather(*snapshots)
        call.cancel()
        gaps_s = Observation(0.0, event_times_s[_WARM_UP_STEPS - 1 :]).gaps_s
        return DecodeTimes(StepMeans.between(total_steps(before), total_steps(after)), gaps_s)

    async def measure_ttft(self, prompt: list[int]) -> float:
        """Seconds from sending one prompt until its first token, alone in the system.

        Blocks the loop, which has nothing else to do: a call that hands its events from thread to thread would add
        half a millisecond of the client's own.
        """
        request = generate_request(prompt, 1)
        started = time.perf_counter()
        times_s = [time.perf_counter() - started for r in self._blocking_generation.Generate(request) if r.outputs]
        if not times_s:
            raise InternalError("a request ended without a token")
        return times_s[0]

    async def _wait_for_requests(self, number: int) -> None:
        """Until exactly so many are in the system."""
        deadline = time.monotonic() + _ADMISSION_TIMEOUT_S
        while (present := _num_requests(await self.status())) != number:
            if time.monotonic() > deadline:
                raise UnavailableError(f"{present} requests are in the system, not {number}: is it used by others?")
            await asyncio.sleep(_POLL_S)


def _num_requests(status: admin_pb2.GetStatusResponse) -> int:
    return status.num_waiting + sum(group.num_running for group in status.groups)


@asynccontextmanager
async def open_probe(address: str) -> AsyncIterator[Probe]:
    """`address` as gRPC writes it."""
    options = [(ChannelOptions.SingleThreadedUnaryStream, 1)]
    async with grpc.aio.insecure_channel(address) as channel:
        with grpc.insecure_channel(address, options) as blocking_channel:
            yield Probe(channel, blocking_channel)
