"""What has arrived for one request: what has not been read, and what it would go on from if the session broke.

News merges until it is read, up to the bound of slow_readers.py, and a request that wants only the end is woken once.
"""

import asyncio
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import OctavoError
from ..proto import engine_pb2
from .logprobs import PositionLogprobs
from .submission import Submission


@dataclass(slots=True)
class EngineDelta:
    """News of one sample since the last that was read."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)  # beside token_ids, when asked for
    finish_reason: int = 0  # octavo.v1.FinishReason
    beam_score: float | None = None  # with the finish reason, of a beam search


class EngineStream:
    """One sample of a request: the session delivers to it."""

    def __init__(self, request: "EngineRequest", index: int) -> None:
        self.request = request
        self.index = index
        self.handle = request.handle + index
        self.ended = False  # no more will be delivered
        self._received = array("i")  # all its tokens, read or not
        self._news: EngineDelta | None = None

    def deliver(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[PositionLogprobs],
        finish_reason: int,
        beam_score: float | None = None,
    ) -> None:
        if (news := self._news) is None:
            news = self._news = EngineDelta()
            self.request.with_news.append(self)
        news.token_ids += token_ids
        self._received.extend(token_ids)
        news.logprobs += logprobs
        self.request.note_unread(token_ids, logprobs)
        if finish_reason:
            news.finish_reason = finish_reason
            news.beam_score = beam_score
            self.end()
        self.request.wake_if_ready()

    def end(self) -> None:
        if not self.ended:
            self.ended = True
            self.request.num_open -= 1

    def resumed(self) -> engine_pb2.ResumedOutput:
        """What another session would have it go on from."""
        output = engine_pb2.ResumedOutput(index=self.index, token_ids=_packed(self._received))
        if self.index == 0:
            output.num_prompt_logprobs = len(self.request.prompt_logprobs)
        return output

    def drop_news(self) -> None:
        self._news = None

    def take(self) -> EngineDelta:
        news, self._news = self._news, None
        assert news is not None, "only a stream with news is taken from"
        return news


class EngineRequest:
    """One accepted or waiting request and its samples, whose handles follow one another. One reader reads them all."""

    def __init__(self, handle: int, submission: Submission, only_end: bool = False) -> None:
        self.handle = handle
        self.is_beam_search = submission.beam_search is not None
        self.num_open = submission.num_samples  # samples that have not ended
        self.streams = [EngineStream(self, index) for index in range(submission.num_samples)]
        # From position 1 on, when asked for; whole before the first token of any sample.
        self.prompt_logprobs: list[PositionLogprobs] = []
        self.num_cached_tokens = 0  # of the prompt, as the first sample found them
        self._submission = submission
        self._was_sent = False  # on this session or on one before
        self._only_end = only_end
        self.with_news: list[EngineStream] = []  # in the order of its coming
        self.num_unread = 0  # tokens, and entries of logprobs, unless only the end is wanted
        self._failure: OctavoError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def submit(self) -> engine_pb2.Submit:
        """What a session is to hear of it first: a new request, or one that goes on from what it has."""
        resumed = [stream.resumed() for stream in self.streams if not stream.ended] if self._was_sent else []
        self._was_sent = True
        return self._submission.message(self.handle, resumed)

    @property
    def has_failed(self) -> bool:
        return self._failure is not None

    def fail(self, error: OctavoError) -> None:
        """The failure of one sample is that of the request, and all that its reader hears."""
        self._failure = error
        self.with_news, self.num_unread = [], 0
        for stream in self.streams:
            stream.drop_news()
        self._wake()

    def note_unread(self, token_ids: Sequence[int], logprobs: Sequence[PositionLogprobs]) -> None:
        if not self._only_end:
            self.num_unread += len(token_ids) + sum([1 + len(row.top) for row in logprobs])

    async def read(self) -> list[tuple[int, EngineDelta]]:
        """All news, by ascending index of the sample; waits for some. Raises the request's error if it failed."""
        if self._failure is None and not self._ready():
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._failure is not None:
            raise self._failure
        with_news, self.with_news, self.num_unread = self.with_news, [], 0
        if len(with_news) > 1:
            with_news.sort(key=_index)
        return [(stream.index, stream.take()) for stream in with_news]

    def wake_if_ready(self) -> None:
        if self._waiter is not None and self._ready():
            self._wake()

    def _ready(self) -> bool:
        return bool(self.with_news) and not (self._only_end and self.num_open)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _packed(token_ids: "array[int]") -> bytes:
    return np.asarray(token_ids, "<i4").tobytes()


def _index(stream: EngineStream) -> int:
    return stream.index
