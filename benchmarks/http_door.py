"""OpenAI completions over HTTP/1.1, streamed, one connection a request.

httptools parses (llhttp, the server's own parser); httpx spends more time on a chunk than the server does, so that the
client would be what is measured.
"""

import asyncio
from collections.abc import Sequence
from urllib.parse import urlsplit

import httptools
import orjson

from ..errors import InvalidArgumentError, UnavailableError
from .observation import Clock, Observation

_EVENT_END = b"\n\n"
_NO_CHOICES = b'"choices":[]'  # of the last event, which carries the usage
_DONE = b"data: [DONE]"


class HttpDoor:
    """Asks one server."""

    def __init__(self, base_url: str, model: str, now: Clock) -> None:
        parts = urlsplit(base_url)
        if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/"):
            raise InvalidArgumentError(f"base_url must be http://HOST:PORT, got {base_url!r}", "base_url")
        self._host, self._port = parts.hostname, parts.port or 80
        self._model = model
        self._now = now

    async def generate(self, prompt: Sequence[int], output_len: int, observation: Observation) -> None:
        """Streams one request into `observation`. Raises UnavailableError if it is refused or breaks off."""
        loop = asyncio.get_running_loop()
        stream = _EventStream(observation, self._now, loop.create_future())
        try:
            transport, _ = await loop.create_connection(lambda: stream, self._host, self._port)
        except OSError as error:
            raise UnavailableError(f"{self._host}:{self._port} does not answer: {error}") from error
        try:
            transport.write(self._request(prompt, output_len))
            await stream.done
        finally:
            transport.close()

    async def close(self) -> None:
        """Nothing outlives a request."""

    def _request(self, prompt: Sequence[int], output_len: int) -> bytes:
        body = orjson.dumps(
            {
                "model": self._model,
                "prompt": list(prompt),
                "max_tokens": output_len,
                "temperature": 1.0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: {self._host}:{self._port}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


class _EventStream(asyncio.Protocol):
    """Reads one answer. Its on_* methods are what httptools calls."""

    def __init__(self, observation: Observation, now: Clock, done: "asyncio.Future[None]") -> None:
        self.done = done
        self._observation = observation
        self._now = now
        self._parser = httptools.HttpResponseParser(self)
        self._pending = bytearray()  # of an event or an error body that is not whole yet

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(f"the server closed the connection early ({error or 'end of stream'})")

    def on_body(self, data: bytes) -> None:
        self._pending += data
        if self._parser.get_status_code() != 200:
            return
        *events, rest = self._pending.split(_EVENT_END)
        self._pending = rest
        for event in events:
            self._take(bytes(event))

    def on_message_complete(self) -> None:
        if (status := self._parser.get_status_code()) != 200:
            self._fail(f"HTTP {status}: {self._pending.decode(errors='replace')[:300]}")
        elif not self.done.done():
            self.done.set_result(None)

    def _take(self, event: bytes) -> None:
        if event.startswith(b'data: {"error"'):
            self._fail(event.decode(errors="replace")[:300])
        elif _NO_CHOICES in event:
            usage = orjson.loads(event.removeprefix(b"data: "))["usage"]
            self._observation.num_tokens = usage["completion_tokens"]
        elif not event.startswith(_DONE):
            self._observation.event_times_s.append(self._now())

    def _fail(self, message: str) -> None:
        if not self.done.done():
            self.done.set_exception(UnavailableError(message))
