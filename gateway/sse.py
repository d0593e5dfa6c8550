"""HTTP answers of a generation: server-sent events or one JSON object, given up as soon as the client has gone."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import HttpError, to_http_error
from .slow_readers import LET_GO, SlowReaderError, in_time

logger = logging.getLogger(__name__)

_DONE = b"data: [DONE]\n\n"
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # the second: for nginx


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`content` as JSON."""
    return Response(orjson.dumps(content), status, headers, media_type="application/json")


def error_response(error: BaseException) -> Response:
    """The error in OpenAI's shape."""
    http_error: HttpError = to_http_error(error)
    return json_response(http_error.body, http_error.status, http_error.headers)


class _UntilDisconnect(Response, ABC):
    """Base: runs `_answer` until it is done or the client has gone, whichever is first."""

    media_type = "application/json"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = asyncio.ensure_future(self._answer(scope, receive, send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not answer.done():
                answer.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)
        if not answer.cancelled():
            answer.result()

    @abstractmethod
    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None: ...


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class JsonAnswer(_UntilDisconnect):
    """One JSON object that is worked out while the client waits."""

    def __init__(self, content: Callable[[], Awaitable[Any]]) -> None:
        super().__init__()
        self._content = content

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = json_response(await self._content())
        except Exception as error:
            response = error_response(error)
        await response(scope, receive, send)


class EventStream(_UntilDisconnect):
    """Events as they come, then [DONE]. An error before the first event is an ordinary error answer, later an event."""

    def __init__(self, events: AsyncGenerator[Any]) -> None:
        super().__init__()
        self._events = events

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._send_all(scope, receive, send)
        finally:
            await self._events.aclose()

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            event = await anext(self._events)
        except Exception as error:
            await error_response(error)(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": self._start_headers()})
        try:
            await in_time(send(_body(_encode(event))))
            async for event in self._events:
                await in_time(send(_body(_encode(event))))
            await in_time(send(_body(_DONE)))
        except OSError:
            logger.debug("a client went away while its events were sent")
            return
        except Exception as error:
            if isinstance(error, SlowReaderError):
                scope["extensions"][LET_GO]["call"]()
            await send(_body(_encode(to_http_error(error).body) + _DONE))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _start_headers(self) -> list[tuple[bytes, bytes]]:
        headers = {"content-type": "text/event-stream; charset=utf-8", **_HEADERS}
        return [(name.encode(), value.encode()) for name, value in headers.items()]


def _encode(event: object) -> bytes:
    return b"data: " + orjson.dumps(event) + b"\n\n"


def _body(data: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": True}
