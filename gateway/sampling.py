"""Checks the public sampling parameters and resolves them into what the coordinator takes.

Both doors fill a SamplingRequest; the bounds are those written in proto/generation.proto. Every refusal is an
InvalidArgumentError that names the field.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidArgumentError
from ..proto import sampling_pb2
from .text import TextModel

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_BAD_WORDS = 128
MAX_BAD_WORD_BYTES = 256
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_PROMPT_LOGPROBS = 2**18  # entries of one answer, each an object that the event loop makes
_MAX_INT32 = 2**31 - 1
_GREEDY_BELOW = 1e-5  # logits divided by less leave float32's range; the limit is greedy


@dataclass(frozen=True, slots=True)
class SamplingRequest:
    """What a client asked for. Names and defaults as in octavo.v1.SamplingParams; None where it has no default."""

    n: int = 1
    best_of: int | None = None
    num_beams: int = 0
    length_penalty: float = 1.0
    early_stopping: int = 0  # octavo.v1.EarlyStopping
    temperature: float | None = None  # of beam search 0, else 1
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    bad_words: Sequence[str] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    @property
    def is_beam_search(self) -> bool:
        return self.num_beams >= 2

    @property
    def is_greedy(self) -> bool:
        return self.temperature is not None and self.temperature < _GREEDY_BELOW

    @property
    def num_drawn(self) -> int:
        """Samples drawn, where it is no beam search."""
        return self.n if self.best_of is None else self.best_of

    @property
    def num_logprobs(self) -> int | None:
        """What the engine is asked for: best_of ranks by the log probabilities of the sampled tokens."""
        ranks = not self.is_beam_search and self.num_drawn > self.n
        return 0 if self.logprobs is None and ranks else self.logprobs


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the model allows. `text` is None when only token ids are served."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    text: TextModel | None


def check_prompt(token_ids: Sequence[int], limits: ModelLimits) -> NDArray[np.int32]:
    """The prompt as an array, little-endian as it goes to the engine: prompts are long, and Python looks at no token.

    Raises InvalidArgumentError naming `prompt` for no tokens, an id out of range, or no room for an output token.
    """
    if not len(token_ids):
        raise InvalidArgumentError("prompt must have at least one token", "prompt")
    if len(token_ids) >= limits.max_model_len:
        message = f"prompt has {len(token_ids)} tokens; with one to generate, the model takes at most"
        raise InvalidArgumentError(
            f"{message} {limits.max_model_len - 1} (max_model_len {limits.max_model_len})", "prompt"
        )
    try:
        packed = np.asarray(token_ids, "<i4")  # a protobuf field by its buffer
    except OverflowError:  # over 32 bits, as no vocabulary is
        check_token_ids("prompt", token_ids, limits.vocab_size)
        raise
    if packed.min() < 0 or packed.max() >= limits.vocab_size:
        check_token_ids("prompt", packed.tolist(), limits.vocab_size)
    return packed


def resolve_sampling(
    request: SamplingRequest, num_prompt_tokens: int, limits: ModelLimits, draw_seed: Callable[[], int]
) -> sampling_pb2.SamplingParams:
    """The checked parameters with every default filled in and every string tokenized. `draw_seed` gives uint64.

    How many outputs there are is checked in samples.py.
    """
    _check_numbers(request)
    _check_prompt_logprobs(request, num_prompt_tokens)
    _check_strings(request, limits)
    _check_ids(request, limits)
    max_tokens = _max_tokens(request, num_prompt_tokens, limits.max_model_len)
    resolved = sampling_pb2.SamplingParams(
        temperature=_temperature(request),
        top_k=max(request.top_k, 0),
        top_p=request.top_p,
        min_p=request.min_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        seed=draw_seed() if request.seed is None else request.seed & (2**64 - 1),
        logit_bias_token_ids=np.array(list(request.logit_bias), "<i4").tobytes(),
        logit_bias_values=np.array(list(request.logit_bias.values()), "<f4").tobytes(),
        bad_words=[np.array(ids, "<i4").tobytes() for ids in _tokenize_bad_words(request.bad_words, limits)],
        stop_token_ids=np.array(sorted(_stop_token_ids(request, limits)), "<i4").tobytes(),
        masked_token_ids=np.array(sorted(_masked_token_ids(request, limits)), "<i4").tobytes(),
        max_tokens=max_tokens,
        min_tokens=request.min_tokens,
    )
    if request.num_logprobs is not None:
        resolved.num_logprobs = request.num_logprobs
    if request.prompt_logprobs is not None:
        resolved.num_prompt_logprobs = request.prompt_logprobs
    return resolved


def _temperature(request: SamplingRequest) -> float:
    if request.is_beam_search or request.is_greedy:
        return 0.0
    return 1.0 if request.temperature is None else request.temperature


def _check_numbers(request: SamplingRequest) -> None:
    if request.temperature is not None:
        in_range("temperature", request.temperature, 0, 100)
    in_range("top_p", request.top_p, 0, 1, above_low=True)
    in_range("top_k", request.top_k, -1, _MAX_INT32)
    in_range("min_p", request.min_p, 0, 1)
    in_range("presence_penalty", request.presence_penalty, -2, 2)
    in_range("frequency_penalty", request.frequency_penalty, -2, 2)
    in_range("repetition_penalty", request.repetition_penalty, 0, 2, above_low=True)
    in_range("min_tokens", request.min_tokens, 0, _MAX_INT32)
    if request.max_tokens is not None:
        in_range("max_tokens", request.max_tokens, 1, _MAX_INT32)
    if request.seed is not None:
        in_range("seed", request.seed, -(2**63), 2**63 - 1)
    if request.logprobs is not None:
        in_range("logprobs", request.logprobs, 0, MAX_LOGPROBS)
    if request.prompt_logprobs is not None:
        in_range("prompt_logprobs", request.prompt_logprobs, 0, MAX_LOGPROBS)


def _check_prompt_logprobs(request: SamplingRequest, num_prompt_tokens: int) -> None:
    """Many likeliest tokens of a long prompt would hold the event loop, and with it every other stream, for seconds."""
    if request.prompt_logprobs is None:
        return
    num_entries = num_prompt_tokens * (1 + request.prompt_logprobs)
    if num_entries > MAX_PROMPT_LOGPROBS:
        message = f"prompt_logprobs: {num_prompt_tokens} prompt tokens with {request.prompt_logprobs} others each make"
        message = f"{message} {num_entries} entries; an answer takes at most {MAX_PROMPT_LOGPROBS}"
        raise InvalidArgumentError(message, "prompt_logprobs")


def in_range(name: str, value: float, low: float, high: float, above_low: bool = False) -> None:
    """Raises InvalidArgumentError outside [low, high], or (low, high].

    Also refuses NaN, for which every comparison is false; and what float32 would round to a forbidden 0.
    """
    inside = low <= value <= high
    if not inside or (above_low and np.float32(value) <= low):
        opening = "(" if above_low else "["
        raise InvalidArgumentError(f"{name} must be in {opening}{low}, {high}], got {value}", name)


def _check_strings(request: SamplingRequest, limits: ModelLimits) -> None:
    _check_string_list("stop", request.stop, MAX_STOP_STRINGS, MAX_STOP_STRING_BYTES)
    _check_string_list("bad_words", request.bad_words, MAX_BAD_WORDS, MAX_BAD_WORD_BYTES)
    for name, strings in (("stop", request.stop), ("bad_words", request.bad_words)):
        if strings and limits.text is None:
            raise InvalidArgumentError(f"{name}: this server has no tokenizer and takes no strings", name)


def _check_string_list(name: str, strings: Sequence[str], max_strings: int, max_bytes: int) -> None:
    if len(strings) > max_strings:
        raise InvalidArgumentError(f"{name} takes at most {max_strings} strings, got {len(strings)}", name)
    for string in strings:
        if not string or len(string.encode()) > max_bytes:
            raise InvalidArgumentError(f"{name}: each string must have 1 to {max_bytes} bytes", name)


def _check_ids(request: SamplingRequest, limits: ModelLimits) -> None:
    if len(request.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        num_ids = len(request.stop_token_ids)
        raise InvalidArgumentError(
            f"stop_token_ids takes at most {MAX_STOP_TOKEN_IDS}, got {num_ids}", "stop_token_ids"
        )
    if len(request.logit_bias) > MAX_LOGIT_BIAS:
        num_ids = len(request.logit_bias)
        raise InvalidArgumentError(f"logit_bias takes at most {MAX_LOGIT_BIAS} entries, got {num_ids}", "logit_bias")
    check_token_ids("stop_token_ids", request.stop_token_ids, limits.vocab_size)
    check_token_ids("logit_bias", request.logit_bias, limits.vocab_size)
    for token_id, value in request.logit_bias.items():
        if not -100 <= value <= 100:
            raise InvalidArgumentError(f"logit_bias of {token_id} must be in [-100, 100], got {value}", "logit_bias")


def check_token_ids(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    """Raises InvalidArgumentError with field `name` for the first id that is not in the vocabulary."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidArgumentError(f"{name}: token id {token_id} is not in [0, {vocab_size})", name)


def _max_tokens(request: SamplingRequest, num_prompt_tokens: int, max_model_len: int) -> int:
    """The asked or the remaining number, at least 1 (see check_prompt)."""
    room = max_model_len - num_prompt_tokens
    max_tokens = room if request.max_tokens is None else request.max_tokens
    if max_tokens > room:
        message = f"prompt ({num_prompt_tokens} tokens) and max_tokens ({max_tokens}) make"
        message = f"{message} {num_prompt_tokens + max_tokens}; the model takes at most {max_model_len}"
        raise InvalidArgumentError(message, "max_tokens")
    if request.min_tokens > max_tokens:
        message = f"min_tokens ({request.min_tokens}) is over max_tokens ({max_tokens})"
        raise InvalidArgumentError(message, "min_tokens")
    return max_tokens


def _stop_token_ids(request: SamplingRequest, limits: ModelLimits) -> set[int]:
    eos_token_ids = frozenset[int]() if request.ignore_eos else limits.eos_token_ids
    return {*request.stop_token_ids, *eos_token_ids}


def _masked_token_ids(request: SamplingRequest, limits: ModelLimits) -> set[int]:
    """As in vLLM, min_tokens keeps an end-of-sequence token out even where ignore_eos lets it end nothing."""
    return set(limits.eos_token_ids.difference(request.stop_token_ids)) if request.ignore_eos else set()


def _tokenize_bad_words(words: Sequence[str], limits: ModelLimits) -> list[list[int]]:
    """Each word as it is tokenized at the start of a text and, where that differs, after a space."""
    if (text := limits.text) is None:
        return []
    sequences: list[list[int]] = []
    for word in words:
        bare = text.encode(word.lstrip(), add_special_tokens=False)
        spaced = text.encode(" " + word.lstrip(), add_special_tokens=False)
        if not bare:
            raise InvalidArgumentError(f"bad_words: {word!r} has no tokens", "bad_words")
        check_token_ids("bad_words", bare + spaced, limits.vocab_size)  # a tokenizer may know more than the model
        sequences.append(bare)
        if spaced != bare:
            sequences.append(spaced)
    return sequences
