"""The bodies that the HTTP door accepts: OpenAI's API and vLLM's extensions of it.

Every field is honoured, or taken only at the value at which it does nothing. Fields of OpenAI's API that are not
served are named here, so that their refusal says so; a name that nobody knows is refused by pydantic. Bounds of
sampling parameters are checked in sampling.py, for both doors. What is checked here keeps the work on a hostile body
small: validation stops at the first wrong item of a list, and objects have few fields.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from .generation import MAX_MESSAGES
from .sampling import MAX_BAD_WORDS, MAX_LOGIT_BIAS, MAX_STOP_STRINGS

MAX_PROMPTS = 256
_MAX_FIELDS = 128  # of an object; ChatBody has about 50
_MAX_PARTS = 1024  # of a message's content


def _refuse(value: object) -> None:
    if value is not None:
        raise PydanticCustomError("not_supported", "is not supported by this server")


def _only_no_op(*no_ops: object) -> BeforeValidator:
    def check(value: object) -> object:
        if not any(value == no_op and type(value) is type(no_op) for no_op in no_ops):
            raise PydanticCustomError("not_supported", "is not supported by this server at this value")
        return value

    return BeforeValidator(check)


def _at_most(max_items: int) -> BeforeValidator:
    """Before the items are looked at."""

    def check(value: object) -> object:
        if isinstance(value, (list, dict)) and len(value) > max_items:
            raise PydanticCustomError("too_long", f"takes at most {max_items} entries, got {len(value)}")
        return value

    return BeforeValidator(check)


# The bound is of no use but to make pydantic look at the characters: JSON can write half a surrogate pair.
Text = Annotated[str, StringConstraints(max_length=2**31)]
_first_error_ends = Field(fail_fast=True)
Texts = Annotated[list[Text], _first_error_ends]
Ids = Annotated[list[int], _first_error_ends]

# A field that may only be null, or null and the values at which it does nothing.
NotServed = Annotated[None, BeforeValidator(_refuse)]
OnlyFalse = Annotated[bool | None, _only_no_op(None, False)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: object) -> object:
        if isinstance(value, dict) and len(value) > _MAX_FIELDS:
            raise PydanticCustomError("too_long", f"an object takes at most {_MAX_FIELDS} fields, got {len(value)}")
        return value


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: OnlyFalse = None


class GenerationBody(_Body):
    """What completions and chat share. Defaults are OpenAI's; unset sampling parameters take SamplingRequest's."""

    model: Text = ""
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[Text, float] | None, _at_most(MAX_LOGIT_BIAS)] = None
    seed: int | None = None
    stop: Annotated[Text | Texts | None, _at_most(MAX_STOP_STRINGS)] = None
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
    stop_token_ids: Ids | None = None
    bad_words: Annotated[Texts | None, _at_most(MAX_BAD_WORDS)] = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    request_id: Text = ""
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    best_of: int | None = None
    cache_salt: Annotated[Text | None, StringConstraints(min_length=1)] = None
    # Of beam search; `beam_width` is another name of `num_beams`, see openai_sampling.py.
    num_beams: int | None = None
    beam_width: int | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None


class CompletionBody(GenerationBody):
    prompt: (
        Text
        | Annotated[Texts, _at_most(MAX_PROMPTS)]
        | Ids
        | Annotated[list[Ids], _first_error_ends, _at_most(MAX_PROMPTS)]
    )
    echo: bool | None = False
    logprobs: int | None = None
    suffix: NotServed = None


class TextPart(_Body):
    type: Literal["text"]
    text: Text


class ChatMessage(_Body):
    role: Literal["system", "user", "assistant"]
    content: Text | Annotated[list[TextPart], _first_error_ends, _at_most(_MAX_PARTS)]
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


def plain_messages(messages: list[ChatMessage]) -> list[dict[str, str]]:
    """As a chat template takes them."""
    return [{"role": message.role, "content": message.text()} for message in messages]


class TextResponseFormat(_Body):
    type: Literal["text"]


class ChatBody(GenerationBody):
    messages: Annotated[list[ChatMessage], _first_error_ends, _at_most(MAX_MESSAGES)]
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

    model: Text = ""
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage] | None, _first_error_ends, _at_most(MAX_MESSAGES)] = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool | None = False


class DetokenizeBody(_Body):
    """vLLM's."""

    model: Text = ""
    tokens: Ids
