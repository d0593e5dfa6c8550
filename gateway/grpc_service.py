"""The public gRPC door: octavo.v1.Generation and octavo.v1.Admin."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import NoReturn, TypeVar

import grpc

from ..errors import InvalidArgumentError
from ..proto import admin_pb2, admin_pb2_grpc, generation_pb2, generation_pb2_grpc
from .errors import to_grpc_status
from .generation import CheckedRequest, GenerationService, RequestOptions
from .launcher_client import RefusedByLauncherError, scale
from .logprobs import Logprob, PositionLogprobs
from .output import OutputDelta, RequestDelta
from .samples import StreamField
from .sampling import SamplingRequest
from .slow_readers import LINGER_S, in_time
from .text import TextModel
from .unknown_fields import refuse_unknown_fields

Q = TypeVar("Q")
T = TypeVar("T")

_ROLES = ("system", "user", "assistant")
_OUTPUT_MODES = generation_pb2.OutputMode.values()
_SAMPLING_PREFIX = "sampling_params."
_STREAMS_BY = StreamField("output_mode", "set output_mode to OUTPUT_MODE_FINAL")


async def abort(context: grpc.aio.ServicerContext, error: BaseException) -> NoReturn:
    """Ends the call with the error's status, or breaks it off if the client does not even read that."""
    try:
        async with asyncio.timeout(LINGER_S):
            await context.abort_with_status(to_grpc_status(error))
    except TimeoutError:
        raise asyncio.CancelledError from None
    raise AssertionError("abort_with_status raises")


async def _unary(context: grpc.aio.ServicerContext, answer: Awaitable[T]) -> T:
    try:
        return await answer
    except Exception as error:
        await abort(context, error)


class GenerationServicer(generation_pb2_grpc.GenerationServicer):
    """Validates, then lets GenerationService work. A call that its client cancels cancels the request."""

    def __init__(self, service: GenerationService) -> None:
        self._service = service

    async def Generate(  # noqa: N802
        self, request: generation_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        try:
            with self._service.calls.open():
                await self._answer(request, await self._check(request), context.write)
        except Exception as error:
            await abort(context, error)

    async def ListModels(  # noqa: N802
        self, request: generation_pb2.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> generation_pb2.ListModelsResponse:
        limits = self._service.limits
        return generation_pb2.ListModelsResponse(
            models=[
                generation_pb2.Model(name=name, max_model_len=limits.max_model_len, vocab_size=limits.vocab_size)
                for name in self._service.model_names
            ]
        )

    async def Tokenize(  # noqa: N802
        self, request: generation_pb2.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> generation_pb2.TokenizeResponse:
        return await _unary(context, self._counted(self._tokenize, request))

    async def Detokenize(  # noqa: N802
        self, request: generation_pb2.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> generation_pb2.DetokenizeResponse:
        return await _unary(context, self._counted(self._detokenize, request))

    async def _counted(self, answer: Callable[[Q], Awaitable[T]], request: Q) -> T:
        with self._service.calls.open():
            return await answer(request)

    async def _check(self, request: generation_pb2.GenerateRequest) -> CheckedRequest:
        refuse_unknown_fields(request)
        self._service.check_model(request.model)
        if request.output_mode not in _OUTPUT_MODES:
            raise InvalidArgumentError(f"output_mode: {request.output_mode} is not one of its values", "output_mode")
        sampling = _sampling_request(request.sampling_params)
        prompt_token_ids = await self._prompt_token_ids(request)
        try:
            return self._service.check(prompt_token_ids, sampling, _options(request))
        except InvalidArgumentError as error:
            if error.field in SamplingRequest.__dataclass_fields__:
                raise InvalidArgumentError(str(error), _SAMPLING_PREFIX + error.field) from error
            if error.field == "prompt":
                raise InvalidArgumentError(str(error), request.WhichOneof("prompt")) from error
            raise

    async def _prompt_token_ids(self, request: generation_pb2.GenerateRequest) -> Sequence[int]:
        kind = request.WhichOneof("prompt")
        if kind == "token_ids":
            return request.token_ids.ids  # not copied: numpy reads it as a buffer
        if kind == "text":
            return await self._service.encode_prompt(request.text, "text")
        if kind == "chat":
            return await self._encode_chat(request.chat)
        raise InvalidArgumentError("prompt: one of text, token_ids and chat must be set", "prompt")

    async def _encode_chat(self, chat: generation_pb2.ChatPrompt) -> Sequence[int]:
        for index, message in enumerate(chat.messages):
            if message.role not in _ROLES:
                field = f"chat.messages[{index}].role"
                raise InvalidArgumentError(f"{field} must be one of {', '.join(_ROLES)}, got {message.role!r}", field)
        messages = [{"role": message.role, "content": message.content} for message in chat.messages]
        try:
            return await self._service.encode_chat(messages)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"chat.{error}", f"chat.{error.field}") from error

    async def _answer(
        self,
        request: generation_pb2.GenerateRequest,
        checked: CheckedRequest,
        write: Callable[[generation_pb2.GenerateResponse], Awaitable[None]],
    ) -> None:
        builder = _ResponseBuilder(checked, self._service.limits.text, request.return_prompt_token_ids)
        if _wants_final(request):
            await write(builder.build(await self._service.complete(checked)))
            return
        async with aclosing(self._service.stream(checked)) as deltas:
            async for delta in deltas:
                await in_time(write(builder.build(delta)))

    async def _tokenize(self, request: generation_pb2.TokenizeRequest) -> generation_pb2.TokenizeResponse:
        refuse_unknown_fields(request)
        self._service.check_model(request.model)
        kind = request.WhichOneof("prompt")
        if kind == "chat":
            token_ids = await self._encode_chat(request.chat)
        elif kind == "text":
            add = request.add_special_tokens if request.HasField("add_special_tokens") else True
            token_ids = await self._service.require_text("text").encode_async(request.text, add)
        else:
            raise InvalidArgumentError("prompt: one of text and chat must be set", "prompt")
        max_model_len = self._service.limits.max_model_len
        return generation_pb2.TokenizeResponse(token_ids=token_ids, max_model_len=max_model_len)

    async def _detokenize(self, request: generation_pb2.DetokenizeRequest) -> generation_pb2.DetokenizeResponse:
        refuse_unknown_fields(request)
        self._service.check_model(request.model)
        return generation_pb2.DetokenizeResponse(text=self._service.decode(request.token_ids, "token_ids"))


def _wants_final(request: generation_pb2.GenerateRequest) -> bool:
    return bool(request.output_mode == generation_pb2.OUTPUT_MODE_FINAL)


def _options(request: generation_pb2.GenerateRequest) -> RequestOptions:
    streams_by = None if _wants_final(request) else _STREAMS_BY
    return RequestOptions(request.request_id, request.priority, request.cache_salt, streams_by)


def _sampling_request(params: generation_pb2.SamplingParams) -> SamplingRequest:
    """The fields that are set; the rest take SamplingRequest's defaults."""
    values = {descriptor.name: value for descriptor, value in params.ListFields()}
    return SamplingRequest(**values)


class _ResponseBuilder:
    """Deltas of one request to GenerateResponses."""

    def __init__(self, checked: CheckedRequest, text: TextModel | None, return_prompt_token_ids: bool) -> None:
        self._checked = checked
        self._text = text
        self._prompt_token_ids = checked.prompt_token_ids.tolist() if return_prompt_token_ids else []
        self._wants_prompt_logprobs = checked.sampling_params.HasField("num_prompt_logprobs")

    def build(self, delta: RequestDelta) -> generation_pb2.GenerateResponse:
        response = generation_pb2.GenerateResponse(
            request_id=self._checked.request_id,
            outputs=map(self._output, delta.outputs),
            prompt_token_ids=self._prompt_token_ids,
            prompt_logprobs=self._prompt_rows(delta),
        )
        if delta.usage is not None:
            response.usage.prompt_tokens = delta.usage.num_prompt_tokens
            response.usage.completion_tokens = delta.usage.num_completion_tokens
            response.usage.cached_tokens = delta.usage.num_cached_tokens
        self._prompt_token_ids = []
        return response

    def _prompt_rows(self, delta: RequestDelta) -> list[generation_pb2.TokenLogprobs]:
        if not self._wants_prompt_logprobs:
            return []
        self._wants_prompt_logprobs = False
        return [generation_pb2.TokenLogprobs(), *map(self._row, delta.prompt_logprobs)]

    def _output(self, delta: OutputDelta) -> generation_pb2.SequenceOutput:
        output = generation_pb2.SequenceOutput(
            index=delta.index,
            text=delta.text,
            token_ids=delta.token_ids,
            logprobs=map(self._row, delta.logprobs),
            finish_reason=delta.finish_reason,  # type: ignore[arg-type]
            beam_score=delta.beam_score,
        )
        if isinstance(delta.stop_reason, str):
            output.stop_string = delta.stop_reason
        elif delta.stop_reason is not None:
            output.stop_token_id = delta.stop_reason
        return output

    def _row(self, row: PositionLogprobs) -> generation_pb2.TokenLogprobs:
        return generation_pb2.TokenLogprobs(token=self._entry(row.token), top=map(self._entry, row.top))

    def _entry(self, entry: Logprob) -> generation_pb2.Logprob:
        text = self._text.token_text(entry.token_id) if self._text is not None else ""
        return generation_pb2.Logprob(token_id=entry.token_id, logprob=entry.logprob, rank=entry.rank, text=text)


class AdminServicer(admin_pb2_grpc.AdminServicer):
    """Hands on the coordinator's status, and changes of scale to the launcher."""

    def __init__(self, service: GenerationService, launcher_address: str) -> None:
        self._service, self._launcher_address = service, launcher_address

    async def GetStatus(  # noqa: N802
        self, request: admin_pb2.GetStatusRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.GetStatusResponse:
        return await _unary(context, self._service.engine.get_status())

    async def Scale(  # noqa: N802
        self, request: admin_pb2.ScaleRequest, context: grpc.aio.ServicerContext
    ) -> None:
        try:
            refuse_unknown_fields(request)
            async with aclosing(scale(self._launcher_address, request)) as news:
                async for progress in news:
                    await context.write(progress)
        except RefusedByLauncherError as refusal:
            await context.abort_with_status(refusal.status)
        except Exception as error:
            await abort(context, error)
