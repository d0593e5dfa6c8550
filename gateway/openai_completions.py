"""POST /v1/completions: one or several prompts in, a choice for each out, whole or streamed."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from starlette.responses import Response

from ..errors import InvalidArgumentError
from .generation import CheckedRequest, GenerationService
from .http_check import check_stream_options, renamed
from .interleave import interleave
from .logprobs import PositionLogprobs
from .openai_format import CompletionLogprobs, finish_name, prompt_logprobs, usage
from .openai_models import MAX_PROMPTS, CompletionBody, sampling_request
from .output import LENGTH, OutputDelta
from .sampling import SamplingRequest
from .sse import EventStream, JsonAnswer

_DEFAULT_MAX_TOKENS = 16  # OpenAI's, for this endpoint only


async def answer_completion(service: GenerationService, body: CompletionBody) -> Response:
    """Checks everything, then answers. Raises OctavoError naming what is wrong."""
    model = service.check_model(body.model)
    check_stream_options(body)
    prompts = await _prompt_token_ids(service, body)
    sampling = _sampling(body)
    request_id = body.request_id or secrets.token_hex(12)
    names = [request_id] if len(prompts) == 1 else [f"{request_id}-{index}" for index in range(len(prompts))]
    with renamed({"prompt_logprobs": "logprobs"} if body.prompt_logprobs is None else {}):  # see _sampling
        checked = [service.check(p, sampling, name, body.priority) for p, name in zip(prompts, names, strict=True)]
    completion = _Completion(service, body, model, request_id, checked)
    return EventStream(completion.events()) if body.stream else JsonAnswer(completion.complete)


async def _prompt_token_ids(service: GenerationService, body: CompletionBody) -> list[Sequence[int]]:
    """Token ids of each prompt."""
    result: list[Sequence[int]] = []
    for one in _prompts(body):
        if isinstance(one, str):
            result.append(await service.encode_prompt(one, "prompt", body.add_special_tokens is not False))
        else:
            result.append(one)
    return result


def _prompts(body: CompletionBody) -> list[str | list[int]]:
    """A list of numbers is one prompt."""
    prompt: Any = body.prompt
    prompts = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise InvalidArgumentError(f"prompt takes 1 to {MAX_PROMPTS} prompts, got {len(prompts)}", "prompt")
    return list(prompts)


def _sampling(body: CompletionBody) -> SamplingRequest:
    """The parameters; echo with logprobs means those of the prompt too, and echo alone (max_tokens 0) is served."""
    max_tokens = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and body.echo:
        max_tokens = 1  # the engine samples at least one, which is left out
    sampling = sampling_request(body, body.logprobs, max_tokens)
    if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
        return replace(sampling, prompt_logprobs=body.logprobs)
    return sampling


class _Completion:
    """The checked requests of one call on their way."""

    def __init__(
        self,
        service: GenerationService,
        body: CompletionBody,
        model: str,
        request_id: str,
        checked: list[CheckedRequest],
    ) -> None:
        self._service = service
        self._body = body
        self._checked = checked
        self._common = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        prompts = zip(_prompts(body), checked, strict=True)
        self._choices = [_Choice(service, body, index, *prompt) for index, prompt in enumerate(prompts)]
        self._include_usage = bool(body.stream_options and body.stream_options.include_usage)

    async def complete(self) -> dict[str, Any]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_outcome(self._service, request)) for request in self._checked]
        outcomes = [task.result() for task in tasks]
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        deltas = [outcome for outcome in outcomes if isinstance(outcome, OutputDelta)]
        choices = [choice.build(delta, is_first=True) for choice, delta in zip(self._choices, deltas, strict=True)]
        return {**self._common, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncGenerator[dict[str, Any]]:
        """Text of the choices as it comes, then, when asked for, usage."""
        usage_field = {"usage": None} if self._include_usage else {}
        started: set[int] = set()
        streams = [self._service.stream(request) for request in self._checked]
        async with aclosing(interleave(streams)) as deltas:
            async for index, delta in deltas:
                choice = self._choices[index].build(delta, is_first=index not in started)
                started.add(index)
                if any(choice[name] for name in choice if name != "index"):
                    yield {**self._common, "choices": [choice], **usage_field}
        if self._include_usage:
            yield {**self._common, "choices": [], "usage": self._usage()}

    def _usage(self) -> dict[str, int]:
        num_prompt_tokens = sum(len(request.prompt_token_ids) for request in self._checked)
        return usage(num_prompt_tokens, sum(choice.num_output_tokens for choice in self._choices))


async def _outcome(service: GenerationService, request: CheckedRequest) -> OutputDelta | Exception:
    """Errors as values: a TaskGroup would wrap them, and one is enough for the client."""
    try:
        return await service.complete(request)
    except Exception as error:
        return error


class _Choice:
    """One prompt's choice. The first piece carries what is about the prompt."""

    def __init__(
        self,
        service: GenerationService,
        body: CompletionBody,
        index: int,
        prompt: str | list[int],
        request: CheckedRequest,
    ) -> None:
        self._text = service.limits.text
        self._body = body
        self._index = index
        self._prompt = prompt
        self._prompt_token_ids = request.prompt_token_ids
        self._skip_special_tokens = request.options.skip_special_tokens
        self._logprobs = CompletionLogprobs(self._text, self._skip_special_tokens)
        self._drops_output = bool(body.echo) and body.max_tokens == 0
        self.num_output_tokens = 0

    def build(self, delta: OutputDelta, is_first: bool) -> dict[str, Any]:
        echo = bool(self._body.echo) and is_first
        prefix = self._prompt_text() if echo else ""
        self.num_output_tokens = 0 if self._drops_output else delta.num_output_tokens
        ended_by = delta.finish_reason
        if self._drops_output and ended_by:
            ended_by = LENGTH  # of nothing, whatever the token that is left out
        choice = {
            "index": self._index,
            "text": prefix + ("" if self._drops_output else delta.text),
            "logprobs": self._logprobs_of(delta, echo),
            "finish_reason": finish_name(ended_by),
        }
        if delta.finish_reason:
            choice["stop_reason"] = None if self._drops_output else delta.stop_reason
        if self._body.return_token_ids:
            choice["token_ids"] = [] if self._drops_output else list(delta.token_ids)
        return choice | (self._about_prompt(delta) if is_first else {})

    def _about_prompt(self, delta: OutputDelta) -> dict[str, Any]:
        about: dict[str, Any] = {}
        if self._body.prompt_logprobs is not None:
            about["prompt_logprobs"] = prompt_logprobs(delta.prompt_logprobs, self._text)
        if self._body.return_token_ids:
            about["prompt_token_ids"] = self._prompt_token_ids.tolist()
        return about

    def _prompt_text(self) -> str:
        """The prompt as it was sent; token ids as text."""
        if isinstance(self._prompt, str):
            return self._prompt
        return self._text.decode(self._prompt, self._skip_special_tokens) if self._text is not None else ""

    def _logprobs_of(self, delta: OutputDelta, echo: bool) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        rows: list[PositionLogprobs | int] = [] if self._drops_output else list(delta.logprobs)
        if echo:
            rows[:0] = [int(self._prompt_token_ids[0]), *delta.prompt_logprobs]
        return self._logprobs.build(rows)
