"""Streams whose clients do not read: how much and how long they are waited for, and how they are let go.

Between a stream's next token and its client lie buffers of fixed sizes: of gRPC the flow-control window, of HTTP the
kernel's (unsent bytes: UNSENT_BYTES) and the transport's. When they are full a write waits, news collects in the
EngineRequest, and the first bound that is reached ends the request with RESOURCE_EXHAUSTED. Nobody else waits for it:
each request has a task of its own, and the engine's session none.
"""

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ..errors import ResourceExhaustedError

# Tokens and entries of logprobs that wait unread for one request: a minute of most streams, and about a megabyte.
MAX_UNREAD = 16_384
MAX_WRITE_S = 30.0  # for one write of a stream; each has a token or more
LINGER_S = 30.0  # for a client to read the error behind what it has not read; then the call is broken off
UNSENT_BYTES = 128 * 1024  # of an HTTP connection that the kernel takes; what is on its way does not count
LET_GO = "octavo.let_go"  # the ASGI extension: a LetGo

LetGo = Callable[[], None]


class SlowReaderError(ResourceExhaustedError):
    """The client does not read its stream."""

    def __init__(self) -> None:
        super().__init__("the client does not read its stream: too much has waited for it, or for too long")


async def in_time(write: Awaitable[None]) -> None:
    """Awaits a write of a stream. Raises SlowReaderError if it waits too long for its client."""
    try:
        async with asyncio.timeout(MAX_WRITE_S):
            await write
    except TimeoutError:
        raise SlowReaderError from None


class LenientHttpProtocol(HttpToolsProtocol):
    """uvicorn's, of which a request can ask to be rid of its client."""

    _is_let_go = False

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {LET_GO: {"call": self._let_go}}

    def _let_go(self) -> None:
        """What is still written goes to the transport's buffer at once. The connection ends when the client has read
        it, or after LINGER_S."""
        self._is_let_go = True
        self.flow.resume_writing()
        self.loop.call_later(LINGER_S, self._break_off)

    def _break_off(self) -> None:
        """The kernel, too, is to forget what it still has to send."""
        if not self.transport.is_closing() or self.transport.get_write_buffer_size():
            connection: socket.socket = self.transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_let_go:
            self.transport.close()
