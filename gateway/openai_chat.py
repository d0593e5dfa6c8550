"""POST /v1/chat/completions: one conversation in, n choices out, whole or streamed."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import Response

from ..errors import InvalidArgumentError
from .generation import CheckedRequest, GenerationService
from .openai_format import chat_logprobs, choice_end, finish_name, prompt_logprobs, usage_object
from .openai_models import ChatBody, plain_messages
from .openai_sampling import check_stream_options, names_of_beams, renamed, request_options, sampling_request
from .output import OutputDelta, RequestDelta
from .sse import EventStream, JsonAnswer


async def answer_chat(service: GenerationService, body: ChatBody) -> Response:
    """Checks everything, then answers. Raises OctavoError naming what is wrong."""
    model = service.check_model(body.model)
    check_stream_options(body)
    sampling = sampling_request(body, _num_logprobs(body), _max_tokens(body))
    messages = plain_messages(body.messages)
    token_ids = await service.encode_chat(messages, add_special_tokens=bool(body.add_special_tokens))
    with renamed(_names(body)):
        checked = service.check(token_ids, sampling, request_options(body, body.request_id))
    chat = _Chat(service, body, model, checked)
    return EventStream(chat.events()) if body.stream else JsonAnswer(chat.complete)


def _names(body: ChatBody) -> dict[str, str]:
    """What this door calls the fields that it has under another name."""
    names = {"prompt": "messages", **names_of_beams(body)}
    if body.top_logprobs is not None:
        names["logprobs"] = "top_logprobs"
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
        whole = await self._service.complete(self._checked)
        response = {**self._common, "object": "chat.completion", "choices": list(map(self._choice, whole.outputs))}
        return {**response, **self._usage(whole), **self._about_prompt(whole)}

    async def events(self) -> AsyncGenerator[dict[str, Any]]:
        """The role of each choice once its tokens come, then text, then, when asked for, usage."""
        async with aclosing(self._service.stream(self._checked)) as deltas:
            started: set[int] = set()
            async for delta in deltas:
                for output in delta.outputs:
                    if output.index not in started:
                        about_prompt = {} if started else self._about_prompt(delta)
                        yield {**self._chunk([self._first_choice(output.index)]), **about_prompt}
                        started.add(output.index)
                    if output.text or output.logprobs or output.finish_reason or self._body.return_token_ids:
                        yield self._chunk([self._delta_choice(output)])
        if self._include_usage:
            yield {**self._chunk([]), **self._usage(delta)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._common, "object": "chat.completion.chunk", "choices": choices}
        if self._include_usage:
            chunk["usage"] = None
        return chunk

    def _about_prompt(self, delta: RequestDelta) -> dict[str, Any]:
        about: dict[str, Any] = {}
        if self._body.prompt_logprobs is not None:
            about["prompt_logprobs"] = prompt_logprobs(delta.prompt_logprobs, self._service.limits.text)
        if self._body.return_token_ids:
            about["prompt_token_ids"] = self._checked.prompt_token_ids.tolist()
        return about

    @staticmethod
    def _first_choice(index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _delta_choice(self, output: OutputDelta) -> dict[str, Any]:
        delta = {"content": output.text} if output.text else {}
        return {"index": output.index, "delta": delta, **self._beside_text(output)}

    def _choice(self, output: OutputDelta) -> dict[str, Any]:
        message = {"role": "assistant", "content": output.text, "refusal": None}
        return {"index": output.index, "message": message, **self._beside_text(output)}

    def _beside_text(self, output: OutputDelta) -> dict[str, Any]:
        logprobs = None
        if self._body.logprobs:
            logprobs = chat_logprobs(output.logprobs, self._body.top_logprobs or 0, self._service.limits.text)
        beside: dict[str, Any] = {"logprobs": logprobs, "finish_reason": finish_name(output.finish_reason)}
        if self._body.return_token_ids:
            beside["token_ids"] = list(output.token_ids)
        return beside | choice_end(output)

    @staticmethod
    def _usage(delta: RequestDelta) -> dict[str, Any]:
        assert delta.usage is not None, "the last delta has it"
        return {"usage": usage_object(delta.usage)}
