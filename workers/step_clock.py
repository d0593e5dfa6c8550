"""How long the device worked on one step, and how long it waited for it."""

import time

import torch


class StepClock:
    """Starts when made. On CUDA it runs on the stream: from the end of the step before, not from the launch."""

    def __init__(self, device: torch.device, previous: "StepClock | None" = None) -> None:
        """`previous`: of the step before, if there was one."""
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record()
        self._started_at = self._stopped_at = time.perf_counter()
        self._previous = previous

    def stop(self) -> None:
        """The step is queued, or done on a CPU."""
        if self._events is not None:
            self._events[1].record()
        self._stopped_at = time.perf_counter()

    def wait_us(self) -> tuple[int, int]:
        """Waits until the step is done. In microseconds its duration, and for how long the device had stood still."""
        previous, self._previous = self._previous, None  # or a clock would keep all that were before it
        if self._events is None:
            idle_s = 0.0 if previous is None else self._started_at - previous._stopped_at
            return round((self._stopped_at - self._started_at) * 1e6), round(idle_s * 1e6)
        started, stopped = self._events
        stopped.synchronize()
        idle_ms = 0.0
        if previous is not None and previous._events is not None:
            idle_ms = max(0.0, float(previous._events[1].elapsed_time(started)))
        return round(float(started.elapsed_time(stopped)) * 1e3), round(idle_ms * 1e3)
