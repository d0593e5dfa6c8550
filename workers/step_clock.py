"""How long the device worked on one step."""

import time

import torch


class StepClock:
    """Starts when made. On CUDA it runs on the stream: from the end of the step before, not from the launch."""

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._duration_s = 0.0
        if device.type == "cuda":
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record()
        self._started_at = time.perf_counter()

    def stop(self) -> None:
        """The step is queued, or done on a CPU."""
        if self._events is not None:
            self._events[1].record()
        self._duration_s = time.perf_counter() - self._started_at

    def wait_us(self) -> int:
        """Waits until the step is done; its duration in microseconds."""
        if self._events is None:
            return round(self._duration_s * 1e6)
        started, stopped = self._events
        stopped.synchronize()
        return round(float(started.elapsed_time(stopped)) * 1e3)
