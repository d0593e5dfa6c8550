"""What waits to be sent on one session: submits, cancels and stops, merged into a message for each turn of the loop."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import numpy as np

from ..proto import engine_pb2

# Of the submits in a message, but for the last of them. A gateway with many long requests sends them all again at once.
_MAX_BYTES = 4 * 1024 * 1024


class EngineOutbox:
    """Belongs to one session. Another session gets another, so that nothing is handed to a session that has ended."""

    def __init__(self) -> None:
        self._submits: dict[int, engine_pb2.Submit] = {}  # by handle
        self._cancels: list[int] = []
        self._stops: list[int] = []
        self._changed = asyncio.Event()
        self._closed = False

    def submit(self, submit: engine_pb2.Submit) -> None:
        self._submits[submit.handle] = submit
        self._changed.set()

    def cancel(self, request_handle: int, handles: Sequence[int]) -> bool:
        """The open samples of one request. One that has not been sent is only taken back; whether it had been."""
        if self._submits.pop(request_handle, None) is not None:
            return False
        self._cancels += handles
        self._changed.set()
        return True

    def stop(self, handle: int) -> None:
        """The sample's text has reached a stop string."""
        self._stops.append(handle)
        self._changed.set()

    def close(self) -> None:
        """Ends `messages`; what has not been sent is dropped."""
        self._closed = True
        self._changed.set()

    async def messages(self) -> AsyncIterator[engine_pb2.SessionRequest]:
        """All that came up since the message before, whenever there is something."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._closed:
                return
            if self._submits or self._cancels or self._stops:
                yield self._next_message()

    def _next_message(self) -> engine_pb2.SessionRequest:
        message = engine_pb2.SessionRequest(submits=self._take_submits())
        if self._submits:
            self._changed.set()
            return message
        # Only now: one may be of a sample whose request was still to be sent again.
        message.cancel_handles = np.array(self._cancels, "<u4").tobytes()
        message.stop_handles = np.array(self._stops, "<u4").tobytes()
        self._cancels, self._stops = [], []
        return message

    def _take_submits(self) -> list[engine_pb2.Submit]:
        taken: list[engine_pb2.Submit] = []
        num_bytes = 0
        while self._submits and num_bytes < _MAX_BYTES:
            taken.append(self._submits.pop(next(iter(self._submits))))
            num_bytes += taken[-1].ByteSize()
        return taken
