"""The gateway's one connection to the coordinator: a multiplexed Engine.Session, with reconnection.

Submits, cancels and stops that come up in one turn of the event loop leave in one message. When a session breaks, its
open requests are kept: the next session is sent each again, with the tokens that came, and goes on behind them. So the
journal of what was accepted is here, where its readers are; a coordinator that dies takes nothing with it.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import numpy as np

from ..errors import OctavoError, UnavailableError
from ..internal_channel import CHANNEL_OPTIONS
from ..proto import admin_pb2, engine_pb2, engine_pb2_grpc
from .engine_outbox import EngineOutbox
from .engine_stream import EngineRequest, EngineStream
from .errors import from_engine_failure, raise_from_rpc
from .logprobs import PositionLogprobs, unpack_table
from .released_beams import ReleasedBeams
from .slow_readers import MAX_UNREAD, SlowReaderError
from .submission import Submission

logger = logging.getLogger(__name__)

_RETRY_S = 0.1  # always: streams stand still meanwhile, and an attempt on a Unix socket costs next to nothing
# Sessions, one after another, that break before they bring anything: then it may be the requests that break them.
_MAX_NUM_FRUITLESS = 10
_STATUS_TIMEOUT_S = 5.0
_MAX_HANDLE = 2**32 - 1
_CHANNEL_OPTIONS = [
    *CHANNEL_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", round(_RETRY_S * 1000)),
    ("grpc.max_reconnect_backoff_ms", round(_RETRY_S * 1000)),
]


class EngineClient:
    """Owner of the session and of the handles of its requests. Belongs to one event loop."""

    def __init__(
        self, address: str, on_ready: Callable[[bool], None] = lambda ready: None, max_outage_s: float = 0.0
    ) -> None:
        """`on_ready` is called when the session stands and when it breaks. `max_outage_s`: how long requests wait for
        the next one before they end with UNAVAILABLE."""
        self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._stub = engine_pb2_grpc.EngineStub(self._channel)
        self._on_ready = on_ready
        self._ready = False
        self._max_outage_s = max_outage_s
        self._outage: asyncio.TimerHandle | None = None  # while a session is awaited that goes on with what there is
        self._num_fruitless = 0
        self._streams: dict[int, EngineStream] = {}  # open samples, by handle
        self._requests: dict[int, EngineRequest] = {}  # those with an open sample, by the handle of the first
        self._released_beams = ReleasedBeams()
        self._last_handle = 0
        self._outbox = EngineOutbox()
        self._refusal: OctavoError | None = None  # of all requests, in the end

    @property
    def ready(self) -> bool:
        return self._ready

    def submit(self, submission: Submission, only_end: bool = False) -> EngineRequest:
        """Sends a request, in an outage when it is over. Raises UnavailableError where none is to follow or none has
        stood yet, and what `give_up` said."""
        if self._refusal is not None:
            raise self._refusal
        if not self._ready and self._outage is None:
            raise UnavailableError("the engine is not ready; try again")
        request = EngineRequest(self._next_handles(submission.num_samples), submission, only_end)
        self._requests[request.handle] = request
        self._streams.update((stream.handle, stream) for stream in request.streams)
        if self._ready:
            self._outbox.submit(request.submit())
        return request

    def release(self, request: EngineRequest) -> None:
        """The reader has gone: unfinished samples are cancelled in the engine. May be called again."""
        if request.num_open == 0:
            return
        handles = [stream.handle for stream in request.streams if self._close(stream)]
        if handles and self._ready and self._outbox.cancel(request.handle, handles) and request.is_beam_search:
            self._released_beams.add(handles)

    def give_up(self, error: OctavoError) -> None:
        """Ends every request with `error`, also each that is still to be sent."""
        self._refusal = error
        for request in self._requests.values():
            request.fail(error)

    def stop(self, stream: EngineStream) -> None:
        """Its text has reached a stop string: the engine ends the sample, unless it has already."""
        if self._close(stream) and self._ready:
            self._outbox.stop(stream.handle)

    def _close(self, stream: EngineStream) -> bool:
        """Nothing more is delivered to it; whether something might have been."""
        stream.end()
        if self._streams.get(stream.handle) is not stream:
            return False
        del self._streams[stream.handle]
        if stream.request.num_open == 0:
            del self._requests[stream.request.handle]
        return True

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
        try:
            while True:
                await self._hold_session()
                await asyncio.sleep(_RETRY_S)
        finally:
            self._end_requests()
            await self._channel.close()

    async def _hold_session(self) -> None:
        """One session to its end."""
        stood = is_fruitful = False
        self._outbox = EngineOutbox()
        session = self._stub.Session(self._outbox.messages())
        try:
            async for response in session:
                if not stood:
                    stood = True
                    self._begin()
                self._dispatch(response)
                is_fruitful = is_fruitful or bool(response.handles)
            reason = "the coordinator closed it"
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        except Exception:
            logger.exception("a message of the coordinator could not be read")
            reason = "a message could not be read"
        finally:
            session.cancel()
            self._set_ready(False)
            self._outbox.close()
            self._released_beams = ReleasedBeams()
        if stood:
            logger.warning("the session to the coordinator broke: %s", reason)
            self._num_fruitless = 0 if is_fruitful else self._num_fruitless + 1
            self._await_next()
        else:
            logger.debug("no session to the coordinator yet: %s", reason)

    def _begin(self) -> None:
        """The session stands: it is sent what is open, in the order of arrival."""
        self._set_ready(True)
        self._end_outage()
        for request in self._requests.values():
            if not request.has_failed:
                self._outbox.submit(request.submit())

    def _await_next(self) -> None:
        """What is open waits for another session, for a while."""
        if self._num_fruitless < _MAX_NUM_FRUITLESS and self._max_outage_s:
            self._outage = asyncio.get_running_loop().call_later(self._max_outage_s, self._end_requests)
        else:
            self._end_requests()

    def _end_requests(self) -> None:
        """No session will go on with them."""
        self._end_outage()
        requests, self._requests = self._requests, {}
        self._streams = {}
        for request in requests.values():
            if not request.has_failed:
                request.fail(UnavailableError("the connection to the engine broke; try again"))

    def _end_outage(self) -> None:
        if self._outage is not None:
            self._outage.cancel()
            self._outage = None

    def _set_ready(self, ready: bool) -> None:
        if ready != self._ready:
            self._ready = ready
            self._on_ready(ready)

    def _next_handles(self, num_samples: int) -> int:
        """The first of so many that follow one another and are free."""
        while True:
            first = self._last_handle + 1
            if first + num_samples - 1 > _MAX_HANDLE:
                first = 1
            self._last_handle = first + num_samples - 1
            if not any(self._in_use(handle) for handle in range(first, first + num_samples)):
                return first

    def _in_use(self, handle: int) -> bool:
        return handle in self._streams or handle in self._requests or handle in self._released_beams

    def _dispatch(self, response: engine_pb2.SessionResponse) -> None:
        """Splits one step's packed arrays among the requests. News of released ones is dropped."""
        for chunk in response.prompt_logprobs:
            if request := self._requests.get(chunk.handle):
                request.prompt_logprobs += unpack_table(chunk.table)
        if response.cached_handles:
            self._dispatch_cached(response)
        if response.handles:
            self._dispatch_entries(response)
        for failure in response.failures:
            self._fail(failure)

    def _dispatch_cached(self, response: engine_pb2.SessionResponse) -> None:
        """What the first sample found counts; the others share its prompt."""
        handles = np.frombuffer(response.cached_handles, "<u4").tolist()
        counts = np.frombuffer(response.num_cached_tokens, "<u4").tolist()
        for handle, count in zip(handles, counts, strict=True):
            if request := self._requests.get(handle):
                request.num_cached_tokens = count

    def _dispatch_entries(self, response: engine_pb2.SessionResponse) -> None:
        handles: list[int] = np.frombuffer(response.handles, "<u4").tolist()
        counts: list[int] = np.frombuffer(response.num_tokens, "<u4").tolist()
        token_ids: list[int] = np.frombuffer(response.token_ids, "<i4").tolist()
        logprobs = {entry.entry: entry.table for entry in response.logprobs}
        beam_scores = self._beam_scores(response, handles) if response.beam_scores else {}
        no_logprobs: list[PositionLogprobs] = []
        start = 0
        entries: Any = zip(handles, counts, response.finish_reasons, strict=True)
        for index, (handle, count, finish_reason) in enumerate(entries):
            end = start + count
            stream = self._streams.get(handle)
            if stream is not None and stream.request.num_unread > MAX_UNREAD * len(stream.request.streams):
                self._let_go(stream.request)
            elif stream is not None:
                rows = unpack_table(logprobs[index]) if index in logprobs else no_logprobs
                stream.deliver(token_ids[start:end], rows, finish_reason, beam_scores.get(handle))
                if finish_reason:
                    self._close(stream)
            start = end

    def _let_go(self, request: EngineRequest) -> None:
        """Its client reads nothing. What runs of it ends now, not when a write of its reader does."""
        self.release(request)
        request.fail(SlowReaderError())

    def _beam_scores(self, response: engine_pb2.SessionResponse, handles: Sequence[int]) -> dict[int, float]:
        """By handle. Those of released beam searches, which the engine has not heard of, take theirs too."""
        ended = [
            handle
            for handle, finish_reason in zip(handles, response.finish_reasons, strict=True)
            if finish_reason and (self._is_beam(handle) or self._released_beams.take(handle))
        ]
        scores = np.frombuffer(response.beam_scores, "<f4").tolist()
        return dict(zip(ended, scores, strict=True))

    def _is_beam(self, handle: int) -> bool:
        stream = self._streams.get(handle)
        return stream is not None and stream.request.is_beam_search

    def _fail(self, failure: engine_pb2.Failure) -> None:
        """One of a sample, or by the handle of a first one that has ended, ends the request; the other samples are
        cancelled when its reader hears of it. Where there are none, since the request was refused, the engine takes no
        notice of that."""
        stream = self._streams.get(failure.handle)
        request = stream.request if stream is not None else self._requests.get(failure.handle)
        if request is None:
            return
        if stream is not None:
            for sample in request.streams if request.is_beam_search else [stream]:
                self._close(sample)
        request.fail(_failure_error(failure))


def _failure_error(failure: engine_pb2.Failure) -> OctavoError:
    return from_engine_failure(failure.code, failure.message, failure.retry_after_s, failure.field)
