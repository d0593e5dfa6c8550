"""Where transfers between device and host run: beside the steps, in the order of the plans."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_POLL_S = 0.0005


class TransferStream:
    """A stream of its own on a GPU. On a CPU transfers are done by the time they are queued.

    The device thread queues; any thread may ask what has ended.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._lock = threading.Lock()
        self._running: deque[tuple[int, torch.cuda.Event]] = deque()  # by step, ascending
        self._finished = 0
        self._last_step = 0  # that was queued

    def note_step(self, step_id: int) -> None:
        """A step is about to be queued."""
        self._last_step = step_id

    @contextmanager
    def behind_steps(self, step_id: int) -> Iterator[None]:
        """Has what is queued meanwhile run as the transfers of this step, after the steps that are queued already."""
        if self._stream is None:
            yield
            self._finished = step_id
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
            ended = torch.cuda.Event()
            ended.record()
        with self._lock:
            self._running.append((step_id, ended))

    def hold_steps(self, step_id: int) -> None:
        """Has steps that are queued from now on wait for the transfers of steps up to this one."""
        if event := self._last_event(step_id):
            torch.cuda.current_stream().wait_event(event)

    def finished(self, awaited: int = 0) -> int:
        """The last step whose transfers, and all before them, have ended. Waits for those of steps up to `awaited`, but
        no longer than until another step is queued: its result is not to wait for them too."""
        event = self._last_event(awaited)
        while event is not None and not event.query() and self._last_step <= awaited:
            time.sleep(_POLL_S)
        with self._lock:
            while self._running and self._running[0][1].query():
                self._finished, _ = self._running.popleft()
            return self._finished

    def is_idle(self) -> bool:
        return self._stream is None or self._stream.query()

    def wait(self) -> None:
        """Until all that is queued has ended."""
        if self._stream is not None:
            self._stream.synchronize()

    def _last_event(self, step_id: int) -> torch.cuda.Event | None:
        with self._lock:
            return next((event for running, event in reversed(self._running) if running <= step_id), None)
