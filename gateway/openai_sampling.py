"""A body's sampling parameters as both doors have them, and what its own names for them are."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ..errors import InvalidArgumentError
from ..proto import generation_pb2
from .generation import RequestOptions
from .openai_models import GenerationBody
from .samples import StreamField
from .sampling import SamplingRequest

_DIRECT = (
    *("n", "best_of", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "seed", "stop_token_ids", "max_tokens", "min_tokens", "ignore_eos", "bad_words"),
    *("prompt_logprobs", "include_stop_str_in_output", "skip_special_tokens", "length_penalty"),
)
_TOKEN_ID = re.compile("0|[1-9][0-9]{0,9}", re.ASCII)
_EARLY_STOPPING: dict[bool | str | None, int] = {
    None: generation_pb2.EARLY_STOPPING_UNSPECIFIED,
    False: generation_pb2.EARLY_STOPPING_HEURISTIC,
    True: generation_pb2.EARLY_STOPPING_FIRST,
    "never": generation_pb2.EARLY_STOPPING_NEVER,
}
_STREAMS_BY = StreamField("stream", "leave stream out, or false")


def sampling_request(body: GenerationBody, logprobs: int | None, max_tokens: int | None) -> SamplingRequest:
    """The body's sampling parameters; null means the default. Raises InvalidArgumentError naming what is wrong."""
    values = {name: getattr(body, name) for name in _DIRECT}
    values["stop"] = [body.stop] if isinstance(body.stop, str) else body.stop
    values["logit_bias"] = _by_token_id(body.logit_bias) if body.logit_bias is not None else None
    values["early_stopping"] = _EARLY_STOPPING[body.early_stopping]
    values |= {"logprobs": logprobs, "max_tokens": max_tokens, "num_beams": _num_beams(body)}
    return SamplingRequest(**{name: value for name, value in values.items() if value is not None})


def _by_token_id(logit_bias: dict[str, float]) -> dict[int, float]:
    for key in logit_bias:
        if not _TOKEN_ID.fullmatch(key):
            raise InvalidArgumentError("logit_bias: every key must be a token id", "logit_bias")
    return {int(key): bias for key, bias in logit_bias.items()}


def _num_beams(body: GenerationBody) -> int | None:
    """num_beams or beam_width; for use_beam_search without them best_of or n, as in vLLM."""
    if body.num_beams is not None and body.beam_width not in (None, body.num_beams):
        raise InvalidArgumentError("num_beams and beam_width differ; send one", "beam_width")
    named = body.num_beams if body.num_beams is not None else body.beam_width
    if not body.use_beam_search:
        if body.use_beam_search is False and named not in (None, 0, 1):
            raise InvalidArgumentError(f"use_beam_search is false and num_beams {named}; send one", "use_beam_search")
        return named
    num_beams = named or body.best_of or body.n or 1
    if num_beams == 1:
        message = "use_beam_search needs num_beams, best_of or n of at least 2"
        raise InvalidArgumentError(message, "use_beam_search")
    return num_beams


def request_options(body: GenerationBody, request_id: str) -> RequestOptions:
    return RequestOptions(request_id, body.priority, body.cache_salt or "", _STREAMS_BY if body.stream else None)


def names_of_beams(body: GenerationBody) -> dict[str, str]:
    """For `renamed`: what num_beams goes by in this body."""
    if body.num_beams is not None:
        return {}
    if body.beam_width is not None:
        return {"num_beams": "beam_width"}
    return {"num_beams": "best_of" if body.best_of is not None else "n"} if body.use_beam_search else {}


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Errors of the block name a field as this endpoint calls it."""
    try:
        yield
    except InvalidArgumentError as error:
        public = names.get(error.field or "")
        if public is None or error.field is None:
            raise
        raise InvalidArgumentError(str(error).replace(error.field, public, 1), public) from error


def check_stream_options(body: GenerationBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise InvalidArgumentError("stream_options needs stream to be true", "stream_options")
