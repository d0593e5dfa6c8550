"""What waits to be sent on one session: submits, cancels and stops, merged into a message for each turn of the loop."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import numpy as np

from ..proto import engine_pb2


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

    def cancel(self, handles: Sequence[int]) -> bool:
        """The open samples of one request. One that has not been sent is only taken back; whether it had been."""
        if self._submits.pop(handles[0], None) is not None:
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
            submits, self._submits = self._submits, {}
            cancels, self._cancels = self._cancels, []
            stops, self._stops = self._stops, []
            if submits or cancels or stops:
                yield engine_pb2.SessionRequest(
                    submits=submits.values(),
                    cancel_handles=np.array(cancels, "<u4").tobytes(),
                    stop_handles=np.array(stops, "<u4").tobytes(),
                )
