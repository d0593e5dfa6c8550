"""Which calls are being answered, and whether more may come: how a gateway ends without breaking one off."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import UnavailableError
from .sse import error_response

_RETRY_AFTER_S = 1.0  # by then another gateway may have the client's connection
_QUIET_S, _MOST_QUIET_S = 0.2, 2.0


class OpenCalls:
    """Counts them, at both doors."""

    def __init__(self) -> None:
        self.is_draining = False
        self.num_open = 0
        self._changed = asyncio.Event()

    def refuse_new(self) -> None:
        """From now on. Those that are open stay."""
        self.is_draining = True
        self._changed.set()

    @contextmanager
    def open(self) -> Iterator[None]:
        """One call, while entered. Raises UnavailableError if no more may come."""
        if self.is_draining:
            raise self.refusal()
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1
            self._changed.set()

    def refusal(self) -> UnavailableError:
        """What a call hears that comes too late."""
        self._changed.set()
        return UnavailableError("the server is shutting down; try again", retry_after_s=_RETRY_AFTER_S)

    async def wait_for_end(self) -> None:
        """Until none is open, none may come and none has come for a moment.

        Who has read the end of a call may ask again at once, and a call that comes as the doors close is broken off
        without a word: so they stay open until nobody asks.
        """
        while self.num_open or not self.is_draining:
            self._changed.clear()
            await self._changed.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(_MOST_QUIET_S):
                while await self._is_asked_within(_QUIET_S):
                    pass

    async def _is_asked_within(self, duration_s: float) -> bool:
        self._changed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(duration_s):
                return await self._changed.wait()
        return False


class CallCounter:
    """The HTTP door's: a POST is work, anything else a look at the server, which may be had to the end."""

    def __init__(self, app: ASGIApp, calls: OpenCalls) -> None:
        self._app, self._calls = app, calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self._calls.is_draining:
            await self._refuse(scope, receive, send)
            return
        with self._calls.open():
            await self._app(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The connection too: the next one may reach a gateway that goes on."""
        response = error_response(self._calls.refusal())
        response.headers["connection"] = "close"
        await response(scope, receive, send)
