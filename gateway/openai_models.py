"""The bodies that the HTTP door accepts: OpenAI's API and vLLM's extensions of it.

Every field is honoured, or taken only at the value at which it does nothing. Fields of OpenAI's API that are not
served are named here, so that their refusal says so; a name that nobody knows is refused by pydantic. Bounds of
sampling parameters are checked in sampling.py, for both doors.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from .sampling import SamplingRequest


def _refuse(value: object) -> None:
    if value is not None:
        raise PydanticCustomError("not_supported", "is not supported by this server")


def _only_no_op(*no_ops: object) -> BeforeValidator:
    def check(value: object) -> object:
        if not any(value == no_op and type(value) is type(no_op) for no_op in no_ops):
            raise PydanticCustomError("not_supported", "is not supported by this server at this value")
        return value

    return BeforeValidator(check)


# A field that may only be null, or null and the values at which it does nothing.
NotServed = Annotated[None, BeforeValidator(_refuse)]
OnlyOne = Annotated[int | None, _only_no_op(None, 1)]
OnlyFalse = Annotated[bool | None, _only_no_op(None, False)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: OnlyFalse = None


class GenerationBody(_Body):
    """What completions and chat share. Defaults are OpenAI's; unset sampling parameters take SamplingRequest's."""

    model: str = ""
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    n: int | None = None
    # Of no effect on the answer, by OpenAI's definition.
    user: str | None = None
    # vLLM's extensions.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    request_id: str = ""
    # Served at the value that does nothing.
    best_of: OnlyOne = None
    use_beam_search: OnlyFalse = None


class CompletionBody(GenerationBody):
    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = False
    logprobs: int | None = None
    suffix: NotServed = None


class TextPart(_Body):
    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]
    # Clients send back what they were given, with these set to null.
    name: NotServed = None
    refusal: NotServed = None
    audio: NotServed = None
    annotations: Annotated[list[Any] | None, _only_no_op(None, [])] = None
    function_call: NotServed = None
    tool_calls: Annotated[list[Any] | None, _only_no_op(None, [])] = None
    tool_call_id: NotServed = None

    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "".join([part.text for part in self.content])


class TextResponseFormat(_Body):
    type: Literal["text"]


class ChatBody(GenerationBody):
    messages: list[ChatMessage]
    logprobs: bool | None = False
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    # Served at the value that does nothing.
    response_format: TextResponseFormat | None = None
    modalities: Annotated[list[str] | None, _only_no_op(None, ["text"])] = None
    store: OnlyFalse = None
    metadata: Annotated[dict[str, Any] | None, _only_no_op(None, {})] = None
    service_tier: Annotated[str | None, _only_no_op(None, "auto", "default")] = None
    tool_choice: Annotated[str | None, _only_no_op(None, "none")] = None
    tools: Annotated[list[Any] | None, _only_no_op(None, [])] = None
    parallel_tool_calls: Annotated[bool | None, _only_no_op(None, True, False)] = None
    # Not served.
    audio: NotServed = None
    functions: NotServed = None
    function_call: NotServed = None
    moderation: NotServed = None
    prediction: NotServed = None
    prompt_cache_key: NotServed = None
    prompt_cache_retention: NotServed = None
    reasoning_effort: NotServed = None
    safety_identifier: NotServed = None
    verbosity: NotServed = None
    web_search_options: NotServed = None


class TokenizeBody(_Body):
    """vLLM's: a prompt or messages."""

    model: str = ""
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool | None = False


class DetokenizeBody(_Body):
    """vLLM's."""

    model: str = ""
    tokens: Annotated[list[int], Field()]


_DIRECT = (
    *("n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("seed", "stop_token_ids", "max_tokens", "min_tokens", "ignore_eos", "bad_words", "prompt_logprobs"),
    *("include_stop_str_in_output", "skip_special_tokens"),
)


def sampling_request(body: GenerationBody, logprobs: int | None, max_tokens: int | None) -> SamplingRequest:
    """The body's sampling parameters; null means the default. Raises ValueError for a logit_bias key that is no id."""
    values = {name: getattr(body, name) for name in _DIRECT}
    values["stop"] = [body.stop] if isinstance(body.stop, str) else body.stop
    values["logit_bias"] = None
    if body.logit_bias is not None:
        values["logit_bias"] = {int(token_id): bias for token_id, bias in body.logit_bias.items()}
    values |= {"logprobs": logprobs, "max_tokens": max_tokens}
    return SamplingRequest(**{name: value for name, value in values.items() if value is not None})
