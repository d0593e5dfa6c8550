"""Ctrl-C and SIGTERM of a server: the first asks for an orderly end, the second for a quick one."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class StopSignals:
    """While entered, the first signal raises KeyboardInterrupt in the main thread, and later ones set `hurry`."""

    def __init__(self) -> None:
        self.hurry = threading.Event()
        self._stopping = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def begin_stop(self) -> None:
        """From here on a signal interrupts nothing: the end is under way."""
        self._stopping = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._stopping:
            self.hurry.set()
            return
        self._stopping = True
        raise KeyboardInterrupt

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
