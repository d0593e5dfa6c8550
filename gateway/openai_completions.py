"""POST /v1/completions: one or several prompts in, n choices for each out, whole or streamed."""

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
from .interleave import interleave
from .openai_choice import PromptChoices
from .openai_format import usage_object
from .openai_models import MAX_PROMPTS, CompletionBody
from .openai_sampling import check_stream_options, names_of_beams, renamed, request_options, sampling_request
from .output import RequestDelta, Usage
from .sampling import MAX_PROMPT_LOGPROBS, SamplingRequest
from .sse import EventStream, JsonAnswer

_DEFAULT_MAX_TOKENS = 16  # OpenAI's, for this endpoint only
_MAX_SAMPLES = 4096  # of a call
_MAX_ECHOED_TOKENS = 2**21  # of a call, about 8 MiB of text


async def answer_completion(service: GenerationService, body: CompletionBody) -> Response:
    """Checks everything, then answers. Raises OctavoError naming what is wrong."""
    model = service.check_model(body.model)
    check_stream_options(body)
    prompts = await _prompt_token_ids(service, body)
    sampling = _sampling(body)
    request_id = body.request_id or secrets.token_hex(12)
    names = [request_id] if len(prompts) == 1 else [f"{request_id}-{index}" for index in range(len(prompts))]
    with renamed(_names(body)):
        options = [request_options(body, name) for name in names]
        checked = [service.check(p, sampling, one) for p, one in zip(prompts, options, strict=True)]
        _check_num_choices(body, checked)
    completion = _Completion(service, body, model, request_id, checked)
    return EventStream(completion.events()) if body.stream else JsonAnswer(completion.complete)


def _names(body: CompletionBody) -> dict[str, str]:
    """What this door calls the fields that it has under another name; for prompt_logprobs see _sampling."""
    names = names_of_beams(body)
    return names if body.prompt_logprobs is not None else {"prompt_logprobs": "logprobs", **names}


def _check_num_choices(body: CompletionBody, checked: Sequence[CheckedRequest]) -> None:
    """A short body may ask for many samples, and for its prompts in each: what that makes is bounded."""
    n, num_drawn = checked[0].samples.n, checked[0].samples.num_drawn
    if num_drawn > 1 and len(checked) * num_drawn > _MAX_SAMPLES:
        name = "best_of" if num_drawn > n else "n"
        message = f"{name}: {len(checked)} prompts with {num_drawn} samples each make {len(checked) * num_drawn}"
        raise InvalidArgumentError(f"{message}; a call takes at most {_MAX_SAMPLES}", name)
    num_echoed = n * sum(len(request.prompt_token_ids) for request in checked) if body.echo and n > 1 else 0
    num_entries = num_echoed * (1 + body.logprobs) if body.logprobs is not None else 0
    if num_echoed > _MAX_ECHOED_TOKENS or num_entries > MAX_PROMPT_LOGPROBS:
        message = f"echo: prompts in each of {n} choices make {num_echoed} tokens, {num_entries} log probabilities"
        message = f"{message}; a call takes at most {_MAX_ECHOED_TOKENS} and {MAX_PROMPT_LOGPROBS}"
        raise InvalidArgumentError(message, "echo")


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
        self._prompts = [PromptChoices(service.limits.text, body, index, *one) for index, one in enumerate(prompts)]
        self._usage = Usage(0, 0, 0)
        self._include_usage = bool(body.stream_options and body.stream_options.include_usage)

    async def complete(self) -> dict[str, Any]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_outcome(self._service, request)) for request in self._checked]
        choices: list[dict[str, Any]] = []
        for prompt, task in zip(self._prompts, tasks, strict=True):
            outcome = task.result()
            if isinstance(outcome, Exception):
                raise outcome
            choices += self._read(prompt, outcome)
        return {**self._common, "choices": choices, "usage": usage_object(self._usage)}

    async def events(self) -> AsyncGenerator[dict[str, Any]]:
        """Text of the choices as it comes, then, when asked for, usage."""
        usage_field = {"usage": None} if self._include_usage else {}
        streams = [self._service.stream(request) for request in self._checked]
        async with aclosing(interleave(streams)) as deltas:
            async for index, delta in deltas:
                for choice in self._read(self._prompts[index], delta):
                    if any(choice[name] for name in choice if name != "index"):
                        yield {**self._common, "choices": [choice], **usage_field}
        if self._include_usage:
            yield {**self._common, "choices": [], "usage": usage_object(self._usage)}

    def _read(self, prompt: PromptChoices, delta: RequestDelta) -> list[dict[str, Any]]:
        """The choices, or pieces of them, that the news makes; counts usage."""
        if delta.usage is not None:
            self._usage += prompt.usage(delta.usage)
        return [prompt.choice(output, delta) for output in delta.outputs]


async def _outcome(service: GenerationService, request: CheckedRequest) -> RequestDelta | Exception:
    """Errors as values: a TaskGroup would wrap them, and one is enough for the client."""
    try:
        return await service.complete(request)
    except Exception as error:
        return error
