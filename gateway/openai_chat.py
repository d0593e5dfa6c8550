"""POST /v1/chat/completions: one conversation in, one choice out, whole or streamed."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import Response

from ..errors import InvalidArgumentError
from .generation import CheckedRequest, GenerationService
from .http_check import check_stream_options, renamed
from .openai_format import chat_logprobs, finish_name, prompt_logprobs, usage
from .openai_models import ChatBody, plain_messages, sampling_request
from .output import OutputDelta
from .sse import EventStream, JsonAnswer


async def answer_chat(service: GenerationService, body: ChatBody) -> Response:
    """Checks everything, then answers. Raises OctavoError naming what is wrong."""
    model = service.check_model(body.model)
    check_stream_options(body)
    sampling = sampling_request(body, _num_logprobs(body), _max_tokens(body))
    messages = plain_messages(body.messages)
    token_ids = await service.encode_chat(messages, add_special_tokens=bool(body.add_special_tokens))
    with renamed(_names(body)):
        checked = service.check(token_ids, sampling, body.request_id, body.priority)
    chat = _Chat(service, body, model, checked)
    return EventStream(chat.events()) if body.stream else JsonAnswer(chat.complete)


def _names(body: ChatBody) -> dict[str, str]:
    """What this door calls the fields that it has under another name."""
    names = {"logprobs": "top_logprobs", "prompt": "messages"}
    return names | ({"max_tokens": "max_completion_tokens"} if body.max_completion_tokens is not None else {})


def _num_logprobs(body: ChatBody) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidArgumentError("top_logprobs needs logprobs to be true", "top_logprobs")
    return None


def _max_tokens(body: ChatBody) -> int | None:
    if body.max_completion_tokens is None:
        return body.max_tokens
    if body.max_tokens not in (None, body.max_completion_tokens):
        message = "max_tokens and max_completion_tokens differ; send one"
        raise InvalidArgumentError(message, "max_tokens")
    return body.max_completion_tokens


class _Chat:
    """One checked chat request on its way."""

    def __init__(self, service: GenerationService, body: ChatBody, model: str, checked: CheckedRequest) -> None:
        self._service = service
        self._body = body
        self._checked = checked
        self._common = {"id": f"chatcmpl-{checked.request_id}", "created": int(time.time()), "model": model}
        self._include_usage = bool(body.stream_options and body.stream_options.include_usage)

    async def complete(self) -> dict[str, Any]:
        delta = await self._service.complete(self._checked)
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        choice = {"index": 0, "message": message, **self._choice_end(delta)}
        response = {**self._common, "object": "chat.completion", "choices": [choice], "usage": self._usage(delta)}
        return response | self._about_prompt(delta)

    async def events(self) -> AsyncGenerator[dict[str, Any]]:
        """The role once tokens come, then text, then, when asked for, usage."""
        async with aclosing(self._service.stream(self._checked)) as deltas:
            is_first = True
            async for delta in deltas:
                if is_first:
                    role = self._delta_choice({"role": "assistant", "content": ""})
                    yield {**self._chunk([role]), **self._about_prompt(delta)}
                    is_first = False
                if delta.text or delta.logprobs or delta.finish_reason or self._body.return_token_ids:
                    choice = self._delta_choice({"content": delta.text} if delta.text else {})
                    yield self._chunk([{**choice, **self._choice_end(delta)}])
        if self._include_usage:
            yield {**self._chunk([]), "usage": self._usage(delta)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._common, "object": "chat.completion.chunk", "choices": choices}
        if self._include_usage:
            chunk["usage"] = None
        return chunk

    def _about_prompt(self, delta: OutputDelta) -> dict[str, Any]:
        about: dict[str, Any] = {}
        if self._body.prompt_logprobs is not None:
            about["prompt_logprobs"] = prompt_logprobs(delta.prompt_logprobs, self._service.limits.text)
        if self._body.return_token_ids:
            about["prompt_token_ids"] = self._checked.prompt_token_ids.tolist()
        return about

    @staticmethod
    def _delta_choice(delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}

    def _choice_end(self, delta: OutputDelta) -> dict[str, Any]:
        logprobs = None
        if self._body.logprobs:
            logprobs = chat_logprobs(delta.logprobs, self._body.top_logprobs or 0, self._service.limits.text)
        end: dict[str, Any] = {"logprobs": logprobs, "finish_reason": finish_name(delta.finish_reason)}
        if self._body.return_token_ids:
            end["token_ids"] = list(delta.token_ids)
        return end | ({"stop_reason": delta.stop_reason} if delta.finish_reason else {})

    def _usage(self, delta: OutputDelta) -> dict[str, int]:
        return usage(len(self._checked.prompt_token_ids), delta.num_output_tokens)
