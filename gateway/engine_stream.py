"""What has arrived for one request and has not been read: the end of the engine's session that a request holds.

News merges until it is read, so a slow client costs at most its own max_tokens of memory, and a request that wants only
the end is woken once.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import OctavoError
from .logprobs import PositionLogprobs


@dataclass(slots=True)
class EngineDelta:
    """News of one request since the last that was read."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)  # beside token_ids, when asked for
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)  # from position 1 on, when asked for
    finish_reason: int = 0  # octavo.v1.FinishReason


class EngineStream:
    """One accepted or waiting request. The session delivers, one reader reads."""

    def __init__(self, handle: int, only_end: bool) -> None:
        self.handle = handle
        self.ended = False  # no more will be delivered
        self._only_end = only_end
        self._news = EngineDelta()
        self._failure: OctavoError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def deliver(self, token_ids: Sequence[int], logprobs: Sequence[PositionLogprobs], finish_reason: int) -> None:
        self._news.token_ids += token_ids
        self._news.logprobs += logprobs
        if finish_reason:
            self._news.finish_reason = finish_reason
            self.ended = True
        if self.ended or not self._only_end:
            self._wake()

    def deliver_prompt_logprobs(self, logprobs: Sequence[PositionLogprobs]) -> None:
        self._news.prompt_logprobs += logprobs  # the tokens that follow wake the reader

    def fail(self, error: OctavoError) -> None:
        self._failure = error
        self.ended = True
        self._wake()

    async def read(self) -> EngineDelta:
        """All news, waiting for some. Raises the request's error if it failed."""
        if not self._ready():
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._failure is not None:
            raise self._failure
        news, self._news = self._news, EngineDelta()
        return news

    def _ready(self) -> bool:
        return self.ended or (bool(self._news.token_ids) and not self._only_end)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
