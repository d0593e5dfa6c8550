"""How long the device worked on one step, and how long it waited for it."""

import time

import torch

_MOST_IDLE_US = 1_000_000  # nobody asks whether it was more, and a field of 32 bits ends after an hour


class StepClock:
    """On a CPU it starts when made. On CUDA it runs on the stream, from where `ready` was called.

    No moment is taken that is not needed: each costs the host 10 us, and 180 when it has just been idle.
    """

    def __init__(self, device: torch.device, previous: "StepClock | None" = None) -> None:
        """`previous`: of the step before, if there was one."""
        # Asked for once: it takes as long as all else here.
        self._stream: torch.cuda.Stream | None = previous._stream if previous is not None else _stream_of(device)
        self._previous = previous
        self._started: float | torch.cuda.Event | None = self._now() if self._stream is None else None
        self._stopped: float | torch.cuda.Event | None = None

    def _now(self) -> "float | torch.cuda.Event":
        """In seconds, or where the device's stream is."""
        if self._stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def ready(self) -> None:
        """All that the step reads is on its way to the device: what that waited for until here, it waited for the host.
        A CPU is its own host, and was at work."""
        if self._stream is not None:
            self._started = self._now()

    def stop(self) -> None:
        """The step is queued, or done on a CPU."""
        self._stopped = self._now()

    def wait_us(self) -> tuple[int, int]:
        """Waits until the step is done. In microseconds its duration, and for how long the device had stood still. On
        CUDA both are 0 if nothing was ever ready, as there was nothing to compute."""
        previous, self._previous = self._previous, None  # or a clock would keep all that were before it
        if isinstance(self._stopped, torch.cuda.Event):
            self._stopped.synchronize()
        idle_us = 0 if previous is None else _elapsed_us(previous._stopped, self._started)
        return _elapsed_us(self._started, self._stopped), min(max(0, idle_us), _MOST_IDLE_US)


def _stream_of(device: torch.device) -> "torch.cuda.Stream | None":
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _elapsed_us(start: "float | torch.cuda.Event | None", end: "float | torch.cuda.Event | None") -> int:
    if start is None or end is None:
        return 0
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return round(float(start.elapsed_time(end)) * 1e3)
    assert isinstance(start, float)
    assert isinstance(end, float)
    return round((end - start) * 1e6)
