"""One gateway's session: collects what steps gave its requests, until the stream takes it as one message."""

import asyncio
import itertools

import numpy as np

from ...errors import InvalidArgumentError, OctavoError, ResourceExhaustedError
from ...proto import engine_pb2, sampling_pb2
from ..core.sequence_group import BeamOutput
from ..core.step_outcome import SampledToken
from .codec import join_tables, pack

# Chunks of prompt logprobs in a message. Each has at most the rows of one step; many could pass gRPC's bound.
_MAX_CHUNKS = 16


class Session:
    """The news of one gateway's requests, on their way out.

    The engine adds; `flush` ends a step; the stream's writer takes messages with `next_response`. What the writer has
    not taken merges, so a gateway that reads nothing costs at most the tokens of its own requests.
    """

    def __init__(self, session_id: int) -> None:
        self.session_id = session_id
        self._has_news = asyncio.Event()
        self._ended = False
        self._prompt_logprobs: list[engine_pb2.PromptLogprobs] = []
        self._clear_entries()

    def _clear_entries(self) -> None:
        self._tokens: dict[int, list[int]] = {}  # by handle, as the rest
        self._finish_reasons: dict[int, int] = {}
        self._logprobs: dict[int, list[sampling_pb2.LogprobTable]] = {}
        self._num_cached_tokens: dict[int, int] = {}
        self._beam_scores: dict[int, float] = {}
        self._failures: list[engine_pb2.Failure] = []

    def add_token(self, token: SampledToken, logprobs: sampling_pb2.LogprobTable | None) -> None:
        handle = token.key.handle
        if (tokens := self._tokens.get(handle)) is None:
            self._tokens[handle] = [token.token_id]
        else:
            tokens.append(token.token_id)
        if logprobs is not None:
            self._logprobs.setdefault(handle, []).append(logprobs)
        if token.finish_reason is not None:
            self._finish_reasons[handle] = token.finish_reason.value
        if token.num_cached_tokens:
            self._num_cached_tokens[handle] = token.num_cached_tokens

    def add_beam(self, output: BeamOutput) -> None:
        """An output of a beam search, whole."""
        handle = output.key.handle
        self._tokens[handle] = list(output.token_ids)
        self._finish_reasons[handle] = output.finish_reason.value
        self._beam_scores[handle] = output.score
        if output.num_cached_tokens:
            self._num_cached_tokens[handle] = output.num_cached_tokens

    def add_prompt_logprobs(self, handle: int, start: int, table: sampling_pb2.LogprobTable) -> None:
        self._prompt_logprobs.append(engine_pb2.PromptLogprobs(handle=handle, start=start, table=table))

    def add_failure(self, handle: int, error: OctavoError) -> None:
        failure = engine_pb2.Failure(handle=handle, code=error.grpc_code, message=str(error))
        if isinstance(error, ResourceExhaustedError):
            failure.retry_after_s = error.retry_after_s or 0.0
        if isinstance(error, InvalidArgumentError):
            failure.field = error.field or ""
        self._failures.append(failure)

    def flush(self) -> None:
        """Ends a step: what was added may leave, if anything was."""
        if self._tokens or self._prompt_logprobs or self._failures:
            self._has_news.set()

    def end(self) -> None:
        """The gateway has closed its side; `next_response` says so."""
        self._ended = True
        self._has_news.set()

    async def next_response(self) -> engine_pb2.SessionResponse | None:
        """All news as one message, once there is some; None at the end."""
        await self._has_news.wait()
        if self._ended:
            return None
        chunks = self._prompt_logprobs[:_MAX_CHUNKS]
        del self._prompt_logprobs[:_MAX_CHUNKS]
        if self._prompt_logprobs:  # a request's tokens come after its prompt's logprobs
            return engine_pb2.SessionResponse(prompt_logprobs=chunks)
        self._has_news.clear()
        return self._take_entries(chunks)

    def _take_entries(self, chunks: list[engine_pb2.PromptLogprobs]) -> engine_pb2.SessionResponse:
        handles = list(self._tokens)
        tokens = list(self._tokens.values())
        response = engine_pb2.SessionResponse(
            handles=pack(handles, "<u4"),
            num_tokens=pack([len(of_one) for of_one in tokens], "<u4"),
            finish_reasons=bytes([self._finish_reasons.get(handle, 0) for handle in handles]),
            token_ids=pack(list(itertools.chain.from_iterable(tokens)), "<i4"),
            logprobs=self._entry_logprobs(handles),
            prompt_logprobs=chunks,
            failures=self._failures,
            cached_handles=pack(list(self._num_cached_tokens), "<u4"),
            num_cached_tokens=pack(list(self._num_cached_tokens.values()), "<u4"),
            beam_scores=np.array([self._beam_scores[h] for h in handles if h in self._beam_scores], "<f4").tobytes(),
        )
        self._clear_entries()
        return response

    def _entry_logprobs(self, handles: list[int]) -> list[engine_pb2.EntryLogprobs]:
        if not self._logprobs:
            return []
        return [
            engine_pb2.EntryLogprobs(entry=entry, table=join_tables(self._logprobs[handle]))
            for entry, handle in enumerate(handles)
            if handle in self._logprobs
        ]
