"""One gateway's session: collects what a step gave its requests, and sends it as one message."""

import asyncio

from ...errors import OctavoError, ResourceExhaustedError
from ...proto import engine_pb2, sampling_pb2
from ..core.scheduler import SampledToken
from .codec import pack


class Session:
    """The news of one gateway's requests, on their way out.

    The engine adds; `flush` ends a step; the stream's writer takes one message a step with `next_response`.
    """

    def __init__(self, session_id: int) -> None:
        self.session_id = session_id
        self._ready: asyncio.Queue[engine_pb2.SessionResponse] = asyncio.Queue()
        self._clear()

    def _clear(self) -> None:
        self._handles: list[int] = []
        self._token_ids: list[int] = []
        self._finish_reasons: list[int] = []
        self._logprobs: list[engine_pb2.EntryLogprobs] = []
        self._prompt_logprobs: list[engine_pb2.PromptLogprobs] = []
        self._failures: list[engine_pb2.Failure] = []

    def add_token(self, token: SampledToken, logprobs: sampling_pb2.LogprobTable | None) -> None:
        if logprobs is not None:
            self._logprobs.append(engine_pb2.EntryLogprobs(entry=len(self._handles), table=logprobs))
        self._handles.append(token.key.handle)
        self._token_ids.append(token.token_id)
        self._finish_reasons.append(token.finish_reason.value if token.finish_reason else 0)

    def add_prompt_logprobs(self, handle: int, start: int, table: sampling_pb2.LogprobTable) -> None:
        self._prompt_logprobs.append(engine_pb2.PromptLogprobs(handle=handle, start=start, table=table))

    def add_failure(self, handle: int, error: OctavoError) -> None:
        failure = engine_pb2.Failure(handle=handle, code=error.grpc_code, message=str(error))
        if isinstance(error, ResourceExhaustedError):
            failure.retry_after_s = error.retry_after_s or 0.0
        self._failures.append(failure)

    def flush(self) -> None:
        """Ends a step: what was added becomes one message, if anything was."""
        if not (self._handles or self._prompt_logprobs or self._failures):
            return
        self._ready.put_nowait(
            engine_pb2.SessionResponse(
                handles=pack(self._handles, "<u4"),
                num_tokens=pack([1] * len(self._handles), "<u4"),
                finish_reasons=pack(self._finish_reasons, "u1"),
                token_ids=pack(self._token_ids, "<i4"),
                logprobs=self._logprobs,
                prompt_logprobs=self._prompt_logprobs,
                failures=self._failures,
            )
        )
        self._clear()

    async def next_response(self) -> engine_pb2.SessionResponse:
        return await self._ready.get()
