"""OpenAI's response objects, as plain dicts for orjson. Pure."""

from collections.abc import Sequence
from typing import Any

from .logprobs import Logprob, PositionLogprobs
from .output import STOP, UNFINISHED, OutputDelta, Usage
from .text import TextModel

_MIN_LOGPROB = -9999.0  # OpenAI's stand-in for minus infinity, which JSON cannot write
_REPLACEMENT = "�"


def finish_name(finish_reason: int) -> str | None:
    """OpenAI's word for a finish reason; None while unfinished."""
    if finish_reason == UNFINISHED:
        return None
    return "stop" if finish_reason == STOP else "length"


def usage_object(usage: Usage) -> dict[str, Any]:
    """OpenAI's `usage`."""
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_completion_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
    }


def choice_end(delta: OutputDelta) -> dict[str, Any]:
    """vLLM's and our own fields of a choice that has ended."""
    score = {} if delta.beam_score is None else {"beam_score": delta.beam_score}
    return {"stop_reason": delta.stop_reason, **score} if delta.finish_reason else {}


def _token_text(token_id: int, text: TextModel | None) -> str:
    """The token's text; bytes that are no text as OpenAI writes them; its id when there is no tokenizer."""
    if text is None:
        return f"token_id:{token_id}"
    own = text.token_text(token_id)
    if _REPLACEMENT not in own:
        return own
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text.token_bytes(token_id))


def chat_logprobs(rows: Sequence[PositionLogprobs], num_top: int, text: TextModel | None) -> dict[str, Any]:
    """The `logprobs` object of a chat choice."""
    content = []
    for row in rows:
        top = [_chat_entry(entry, text) for entry in row.top[:num_top]]
        content.append({**_chat_entry(row.token, text), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _chat_entry(entry: Logprob, text: TextModel | None) -> dict[str, Any]:
    token_bytes = list(text.token_bytes(entry.token_id)) if text is not None else None
    return {"token": _token_text(entry.token_id, text), "logprob": _finite(entry.logprob), "bytes": token_bytes}


def _finite(logprob: float) -> float:
    return max(logprob, _MIN_LOGPROB)


class CompletionLogprobs:
    """Builds the `logprobs` object of completions; keeps the offset where the next token's text begins."""

    def __init__(self, text: TextModel | None, skip_special_tokens: bool) -> None:
        self._text = text
        self._detokenizer = text.new_detokenizer(skip_special_tokens) if text is not None else None
        self._offset = 0

    def build(self, rows: Sequence[PositionLogprobs | int]) -> dict[str, Any]:
        """A row that is only a token id is the first of a prompt, which has no probability."""
        result: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for row in rows:
            token_id = row if isinstance(row, int) else row.token.token_id
            result["tokens"].append(_token_text(token_id, self._text))
            result["token_logprobs"].append(None if isinstance(row, int) else _finite(row.token.logprob))
            result["top_logprobs"].append(None if isinstance(row, int) else self._top(row))
            result["text_offset"].append(self._offset)
            self._offset += len(self._detokenizer.push([token_id])) if self._detokenizer is not None else 0
        return result

    def _top(self, row: PositionLogprobs) -> dict[str, float]:
        """By text, likeliest first, and the token itself."""
        return {_token_text(entry.token_id, self._text): _finite(entry.logprob) for entry in (*row.top, row.token)}


def prompt_logprobs(rows: Sequence[PositionLogprobs], text: TextModel | None) -> list[Any]:
    """vLLM's `prompt_logprobs`: for each prompt token a map from token id; none for the first."""
    return [None, *(_prompt_row(row, text) for row in rows)]


def _prompt_row(row: PositionLogprobs, text: TextModel | None) -> dict[str, Any]:
    return {
        str(entry.token_id): {
            "logprob": _finite(entry.logprob),
            "rank": entry.rank,
            "decoded_token": _token_text(entry.token_id, text),
        }
        for entry in (row.token, *row.top)
    }
