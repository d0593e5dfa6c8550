"""The gateway's one connection to the coordinator: a multiplexed Engine.Session, with reconnection.

Submits, cancels and stops that come up in one turn of the event loop leave in one message. A session that breaks ends
every open request with UNAVAILABLE: the coordinator cancels what a session leaves behind, so none could go on.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np

from ..errors import OctavoError, UnavailableError
from ..internal_channel import CHANNEL_OPTIONS
from ..proto import admin_pb2, engine_pb2, engine_pb2_grpc, sampling_pb2
from .engine_outbox import EngineOutbox
from .engine_stream import EngineStream
from .errors import from_engine_failure, raise_from_rpc
from .logprobs import PositionLogprobs, unpack_table

logger = logging.getLogger(__name__)

_MIN_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 2.0
_STATUS_TIMEOUT_S = 5.0
_MAX_HANDLE = 2**32 - 1
_CHANNEL_OPTIONS = [
    *CHANNEL_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", round(_MIN_BACKOFF_S * 1000)),
    ("grpc.max_reconnect_backoff_ms", round(_MAX_BACKOFF_S * 1000)),
]


class EngineClient:
    """Owner of the session and of the handles of its requests. Belongs to one event loop."""

    def __init__(self, address: str, on_ready: Callable[[bool], None] = lambda ready: None) -> None:
        """`on_ready` is called when the session stands and when it breaks."""
        self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._stub = engine_pb2_grpc.EngineStub(self._channel)
        self._on_ready = on_ready
        self._ready = False
        self._streams: dict[int, EngineStream] = {}
        self._last_handle = 0
        self._outbox = EngineOutbox()

    @property
    def ready(self) -> bool:
        return self._ready

    def submit(
        self,
        prompt_token_ids: bytes,
        sampling_params: sampling_pb2.SamplingParams,
        priority: int = 0,
        only_end: bool = False,
    ) -> EngineStream:
        """Sends a request; `prompt_token_ids` is packed int32. Raises UnavailableError without a session."""
        if not self._ready:
            raise UnavailableError("the engine is not ready; try again")
        stream = EngineStream(self._next_handle(), only_end)
        self._streams[stream.handle] = stream
        self._outbox.submit(
            engine_pb2.Submit(
                handle=stream.handle,
                prompt_token_ids=prompt_token_ids,
                sampling_params=sampling_params,
                priority=priority,
            )
        )
        return stream

    def release(self, stream: EngineStream) -> None:
        """The reader has gone: an unfinished request is cancelled in the engine. May be called again."""
        if self._streams.pop(stream.handle, None) is not None:
            self._outbox.cancel(stream.handle)

    def stop(self, stream: EngineStream) -> None:
        """Its text has reached a stop string: the engine ends the request, unless it has already."""
        if self._streams.pop(stream.handle, None) is not None:
            self._outbox.stop(stream.handle)

    async def get_status(self) -> admin_pb2.GetStatusResponse:
        """Raises UnavailableError if the coordinator does not answer."""
        try:
            status: admin_pb2.GetStatusResponse = await self._stub.GetStatus(
                admin_pb2.GetStatusRequest(), timeout=_STATUS_TIMEOUT_S
            )
            return status
        except grpc.aio.AioRpcError as error:
            raise_from_rpc(error, "status")

    async def run(self) -> None:
        """Holds a session, again and again, until cancelled."""
        backoff_s = _MIN_BACKOFF_S
        try:
            while True:
                stood = await self._hold_session()
                backoff_s = _MIN_BACKOFF_S if stood else min(2 * backoff_s, _MAX_BACKOFF_S)
                await asyncio.sleep(backoff_s)
        finally:
            await self._channel.close()

    async def _hold_session(self) -> bool:
        """One session to its end; whether it ever stood."""
        stood = False
        self._outbox = EngineOutbox()
        session = self._stub.Session(self._outbox.messages())
        try:
            async for response in session:
                if not stood:
                    stood = True
                    self._set_ready(True)
                self._dispatch(response)
            reason = "the coordinator closed it"
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        except Exception:
            logger.exception("a message of the coordinator could not be read")
            reason = "a message could not be read"
        finally:
            session.cancel()
            self._break()
        if stood:
            logger.warning("the session to the coordinator broke: %s", reason)
        else:
            logger.debug("no session to the coordinator yet: %s", reason)
        return stood

    def _break(self) -> None:
        """Ends what the session carried."""
        self._set_ready(False)
        self._outbox.close()
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(UnavailableError("the connection to the engine broke; try again"))

    def _set_ready(self, ready: bool) -> None:
        if ready != self._ready:
            self._ready = ready
            self._on_ready(ready)

    def _next_handle(self) -> int:
        while True:
            self._last_handle = self._last_handle % _MAX_HANDLE + 1
            if self._last_handle not in self._streams:
                return self._last_handle

    def _dispatch(self, response: engine_pb2.SessionResponse) -> None:
        """Splits one step's packed arrays among the requests. News of released ones is dropped."""
        for chunk in response.prompt_logprobs:
            if stream := self._streams.get(chunk.handle):
                stream.deliver_prompt_logprobs(unpack_table(chunk.table))
        if response.handles:
            self._dispatch_entries(response)
        for failure in response.failures:
            if stream := self._streams.pop(failure.handle, None):
                stream.fail(_failure_error(failure))

    def _dispatch_entries(self, response: engine_pb2.SessionResponse) -> None:
        handles: list[int] = np.frombuffer(response.handles, "<u4").tolist()
        counts: list[int] = np.frombuffer(response.num_tokens, "<u4").tolist()
        token_ids: list[int] = np.frombuffer(response.token_ids, "<i4").tolist()
        logprobs = {entry.entry: entry.table for entry in response.logprobs}
        no_logprobs: list[PositionLogprobs] = []
        start = 0
        entries: Any = zip(handles, counts, response.finish_reasons, strict=True)
        for index, (handle, count, finish_reason) in enumerate(entries):
            end = start + count
            stream = self._streams.get(handle)
            if stream is not None:
                rows = unpack_table(logprobs[index]) if index in logprobs else no_logprobs
                stream.deliver(token_ids[start:end], rows, finish_reason)
                if finish_reason:
                    del self._streams[handle]
            start = end


def _failure_error(failure: engine_pb2.Failure) -> OctavoError:
    return from_engine_failure(failure.code, failure.message, failure.retry_after_s, failure.field)
