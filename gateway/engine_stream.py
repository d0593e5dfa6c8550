"""What has arrived for one request and has not been read: the end of the engine's session that a request holds.

News merges until it is read, up to the bound of slow_readers.py, and a request that wants only the end is woken once.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import OctavoError
from .logprobs import PositionLogprobs


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

    def drop_news(self) -> None:
        self._news = None

    def take(self) -> EngineDelta:
        news, self._news = self._news, None
        assert news is not None, "only a stream with news is taken from"
        return news


class EngineRequest:
    """One accepted or waiting request and its samples, whose handles follow one another. One reader reads them all."""

    def __init__(self, handle: int, num_samples: int = 1, only_end: bool = False, is_beam_search: bool = False) -> None:
        self.handle = handle
        self.is_beam_search = is_beam_search
        self.num_open = num_samples  # samples that have not ended
        self.streams = [EngineStream(self, index) for index in range(num_samples)]
        # From position 1 on, when asked for; whole before the first token of any sample.
        self.prompt_logprobs: list[PositionLogprobs] = []
        self.num_cached_tokens = 0  # of the prompt, as the first sample found them
        self._only_end = only_end
        self.with_news: list[EngineStream] = []  # in the order of its coming
        self.num_unread = 0  # tokens, and entries of logprobs, unless only the end is wanted
        self._failure: OctavoError | None = None
        self._waiter: asyncio.Future[None] | None = None

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


def _index(stream: EngineStream) -> int:
    return stream.index
