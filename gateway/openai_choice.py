"""The choices of POST /v1/completions, whole or in pieces, as plain dicts."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .generation import CheckedRequest
from .logprobs import PositionLogprobs
from .openai_format import CompletionLogprobs, choice_end, finish_name, prompt_logprobs
from .openai_models import CompletionBody
from .output import LENGTH, OutputDelta, RequestDelta, Usage
from .text import TextModel


class PromptChoices:
    """The n choices of one prompt of a call. What is about the prompt comes with the first piece of the first, the
    prompt that is echoed with the first piece of each."""

    def __init__(
        self,
        text: TextModel | None,
        body: CompletionBody,
        prompt_index: int,
        prompt: str | list[int],
        request: CheckedRequest,
    ) -> None:
        self._text = text
        self._body = body
        self._prompt = prompt
        self._prompt_token_ids = request.prompt_token_ids
        self._skip_special_tokens = request.output_options.skip_special_tokens
        self._first_index = prompt_index * request.samples.n
        self._logprobs: dict[int, CompletionLogprobs] = {}  # of the samples that have begun
        self._drops_output = bool(body.echo) and body.max_tokens == 0

    def usage(self, usage: Usage) -> Usage:
        return replace(usage, num_completion_tokens=0) if self._drops_output else usage

    def choice(self, output: OutputDelta, delta: RequestDelta) -> dict[str, Any]:
        """The choice, or piece of one, that `output`, a part of `delta`, makes."""
        is_first = output.index not in self._logprobs
        if is_first:
            self._logprobs[output.index] = CompletionLogprobs(self._text, self._skip_special_tokens)
        echoed = delta if self._body.echo and is_first else None
        if self._drops_output:
            output = _dropped(output)
        choice = {
            "index": self._first_index + output.index,
            "text": (self._prompt_text() if echoed else "") + output.text,
            "logprobs": self._logprobs_of(output, echoed),
            "finish_reason": finish_name(output.finish_reason),
            **choice_end(output),
        }
        if self._body.return_token_ids:
            choice["token_ids"] = list(output.token_ids)
        return choice | (self._about_prompt(delta) if is_first and output.index == 0 else {})

    def _about_prompt(self, delta: RequestDelta) -> dict[str, Any]:
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

    def _logprobs_of(self, output: OutputDelta, echoed: RequestDelta | None) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        rows: Sequence[PositionLogprobs | int] = output.logprobs
        if echoed is not None:
            rows = [int(self._prompt_token_ids[0]), *echoed.prompt_logprobs, *rows]
        return self._logprobs[output.index].build(rows)


def _dropped(output: OutputDelta) -> OutputDelta:
    """For an echo alone: nothing, which ends by length, whatever the token that is left out."""
    finish_reason = LENGTH if output.finish_reason else output.finish_reason
    return OutputDelta(output.index, "", (), (), finish_reason)
