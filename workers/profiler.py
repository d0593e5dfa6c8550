"""Where the device's time goes: torch's profiler around the next steps of a rank, as a trace and as a table."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..errors import FailedPreconditionError
from ..proto import worker_pb2

# A step on a GPU begins with the copy of what it needs.
_STEP_START = "Memcpy HtoD"
_MAX_ROWS = 40


@dataclass(frozen=True, slots=True)
class DeviceEvent:
    """One kernel or copy on the device. Times in microseconds, on one clock."""

    name: str
    start_us: float
    end_us: float


class StepProfiler:
    """Profiles some steps, then is done. Belongs to the device thread."""

    def __init__(self, device: torch.device, num_steps: int, trace_path: Path) -> None:
        """The trace goes to `trace_path`, in Chrome's format. Raises FailedPreconditionError off a GPU."""
        if device.type != "cuda":
            raise FailedPreconditionError("only a GPU's steps can be profiled; this rank runs on the CPU")
        self._device = device
        self._num_steps, self._num_left = num_steps, num_steps
        self._trace_path = trace_path
        # Without the CPU's activity: recording that would slow the launches that are to be seen.
        self._profile = profile(activities=[ProfilerActivity.CUDA])
        torch.cuda.synchronize(device)
        self._profile.start()

    def abandon(self) -> None:
        """Nobody waits for the profile any more."""
        self._profile.stop()

    def note_step(self) -> worker_pb2.ProfileResponse | None:
        """A step was queued; after the last, waits for the device and says what was seen."""
        self._num_left -= 1
        if self._num_left:
            return None
        torch.cuda.synchronize(self._device)
        self._profile.stop()
        self._trace_path.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._trace_path))
        return summarise(_device_events(self._profile.events()), self._num_steps)


def _device_events(events: Iterable[Any]) -> list[DeviceEvent]:
    found = [event for event in events or () if event.device_type == torch.autograd.DeviceType.CUDA]
    return [DeviceEvent(event.name, event.time_range.start, event.time_range.end) for event in found]


def summarise(events: list[DeviceEvent], num_steps: int) -> worker_pb2.ProfileResponse:
    """Time by kernel, per step, the largest first; and how long the device was idle."""
    if not events:
        raise FailedPreconditionError("nothing ran on the device while it was profiled")
    events = sorted(events, key=lambda event: event.start_us)
    totals: dict[str, list[float]] = defaultdict(list)
    for event in events:
        totals[event.name].append(event.end_us - event.start_us)
    rows = sorted(totals.items(), key=lambda item: -sum(item[1]))
    idle_us, step_gaps_us = _idle(events)
    return worker_pb2.ProfileResponse(
        num_steps=num_steps,
        span_us=(max(event.end_us for event in events) - events[0].start_us) / num_steps,
        idle_us=idle_us / num_steps,
        step_gaps_us=step_gaps_us,
        kernels=[
            worker_pb2.KernelTime(
                name=name, calls=len(times) / num_steps, time_us=sum(times) / num_steps, mean_us=sum(times) / len(times)
            )
            for name, times in rows[:_MAX_ROWS]
        ],
    )


def _idle(events: list[DeviceEvent]) -> tuple[float, list[float]]:
    """Total time in which nothing ran; and of that, the time before each step."""
    total_us, gaps_us, busy_until_us = 0.0, [], events[0].end_us
    for event in events[1:]:
        gap_us = max(0.0, event.start_us - busy_until_us)
        total_us += gap_us
        if event.name.startswith(_STEP_START):
            gaps_us.append(gap_us)
        busy_until_us = max(busy_until_us, event.end_us)
    return total_us, gaps_us
