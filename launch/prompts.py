"""The forms a prompt may have, and the GenerateRequest of each."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict, cast

from ..errors import InvalidArgumentError
from ..proto import generation_pb2
from .beam_search import BeamSearchParams
from .sampling_params import SamplingParams


class ChatMessage(TypedDict):
    """One turn of a conversation."""

    role: str  # "system", "user" or "assistant"
    content: str


class TokensPrompt(TypedDict):
    """A prompt that is tokenized already."""

    prompt_token_ids: Sequence[int]
    prompt: NotRequired[str]  # what the ids stand for; only handed back
    cache_salt: NotRequired[str]  # see RequestOptions


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str
    cache_salt: NotRequired[str]  # see RequestOptions


AnyParams = SamplingParams | BeamSearchParams
Prompt = str | TokensPrompt | TextPrompt | Sequence[int] | Sequence[ChatMessage]


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What a request says beside prompt and sampling."""

    model: str = ""  # empty: the only model served
    request_id: str = ""  # empty: made up by the server
    priority: int = 0  # lower is served first
    only_end: bool = False  # one response at the end instead of deltas
    return_prompt_token_ids: bool = True
    cache_salt: str = ""  # cached prompts are shared only among requests of the same salt; at most 64 bytes


def build_request(prompt: Prompt, params: AnyParams, options: RequestOptions) -> generation_pb2.GenerateRequest:
    """Raises InvalidArgumentError naming `prompt` for something that is none."""
    final, delta = generation_pb2.OUTPUT_MODE_FINAL, generation_pb2.OUTPUT_MODE_DELTA
    request = generation_pb2.GenerateRequest(
        model=options.model,
        sampling_params=params.to_proto(),
        request_id=options.request_id,
        priority=options.priority,
        output_mode=final if options.only_end else delta,
        return_prompt_token_ids=options.return_prompt_token_ids,
        cache_salt=_cache_salt(prompt, options),
    )
    try:
        _set_prompt(request, prompt)
    except (TypeError, ValueError, KeyError) as error:
        raise InvalidArgumentError(
            "prompt must be text, token ids, {'prompt_token_ids': [...]}, {'prompt': text} or chat messages", "prompt"
        ) from error
    return request


def _cache_salt(prompt: Prompt, options: RequestOptions) -> str:
    own = prompt.get("cache_salt", "") if isinstance(prompt, Mapping) else ""
    if not isinstance(own, str) or (own and options.cache_salt not in ("", own)):
        raise InvalidArgumentError("cache_salt must be text, and one: the prompt's or the options'", "cache_salt")
    return own or options.cache_salt


def _set_prompt(request: generation_pb2.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.text = prompt
    elif isinstance(prompt, Mapping):
        _set_mapping(request, prompt)
    elif _is_chat(prompt):
        request.chat.messages.extend(map(chat_message, cast("Sequence[ChatMessage]", prompt)))
    else:
        request.token_ids.ids.extend(cast("Sequence[int]", prompt))
        request.token_ids.SetInParent()  # an empty list is still this prompt, for the server to refuse


def _set_mapping(request: generation_pb2.GenerateRequest, prompt: Mapping[str, object]) -> None:
    if unknown := prompt.keys() - {"prompt", "prompt_token_ids", "cache_salt"}:
        raise KeyError(unknown)
    if "prompt_token_ids" in prompt:
        request.token_ids.ids.extend(cast("Iterable[int]", prompt["prompt_token_ids"]))
        request.token_ids.SetInParent()
    else:
        request.text = cast(str, prompt["prompt"])


def _is_chat(prompt: Sequence[object]) -> bool:
    return bool(prompt) and isinstance(prompt[0], Mapping)


def chat_message(message: ChatMessage) -> generation_pb2.ChatMessage:
    """Raises InvalidArgumentError naming `messages` for a message with other keys than role and content."""
    if not isinstance(message, Mapping) or message.keys() != {"role", "content"}:
        raise InvalidArgumentError("messages: each must be {'role': ..., 'content': ...}", "messages")
    return generation_pb2.ChatMessage(role=message["role"], content=message["content"])


def require_messages(messages: Sequence[ChatMessage]) -> None:
    """Raises InvalidArgumentError for an empty conversation, which is not even recognizable as one."""
    if not messages:
        raise InvalidArgumentError("messages must have at least one message", "messages")


def prompt_text(prompt: Prompt) -> str | None:
    """The prompt's own text, if it has one."""
    if isinstance(prompt, str):
        return prompt
    return prompt.get("prompt") if isinstance(prompt, Mapping) else None
