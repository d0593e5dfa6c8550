"""How to sample: vLLM's SamplingParams, with its names and defaults."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidArgumentError
from ..proto import generation_pb2

# Bounds as in proto/generation.proto, which the server holds to; an open lower end excludes the bound itself.
_INT32 = 2**31 - 1
_RANGES: dict[str, tuple[float, float]] = {
    "n": (1, 128),
    "best_of": (1, 128),
    "beam_width": (2, 64),
    "length_penalty": (-10, 10),
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (-1, _INT32),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0, 2),
    "seed": (-(2**63), 2**63 - 1),
    "max_tokens": (1, _INT32),
    "min_tokens": (0, _INT32),
    "logprobs": (0, 20),
    "prompt_logprobs": (0, 20),
}
_OPEN = frozenset({"top_p", "repetition_penalty"})
_INTEGERS = frozenset(
    {"n", "best_of", "beam_width", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs"}
)
_GREEDY_BELOW = 1e-5  # as in gateway/sampling.py


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Construction checks every field. Raises InvalidArgumentError naming the first that is out of range.

    As in vLLM, more than one sample needs a temperature. For beam search see BeamSearchParams.
    """

    n: int = 1
    best_of: int | None = None  # samples drawn, of which the n of highest mean log probability are returned; None: n
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: up to the context length
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self._check_lists()
        for name, value in self._scalars().items():
            if name in _RANGES and value is not None:
                check_range(name, value)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise refusal("min_tokens", f"({self.min_tokens}) is over max_tokens ({self.max_tokens})")
        self._check_samples()

    def _check_samples(self) -> None:
        if self.best_of is not None and self.best_of < self.n:
            raise refusal("best_of", f"must be at least n, got {self.best_of} with n {self.n}")
        if self.temperature < _GREEDY_BELOW and max(self.n, self.best_of or 1) > 1:
            name = "n" if self.n > 1 else "best_of"
            raise refusal(name, "must be 1 at temperature 0, where all samples are the same; set a temperature")

    def _check_lists(self) -> None:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        check_items("stop", stop, str, "strings")
        check_items("stop_token_ids", self.stop_token_ids, int, "integers")
        check_items("bad_words", self.bad_words, str, "strings")
        check_items("logit_bias", self.logit_bias, int, "integers (its keys)")
        values = list(self.logit_bias.values()) if isinstance(self.logit_bias, Mapping) else self.logit_bias
        check_items("logit_bias", values, (int, float), "numbers (its values)")

    def _scalars(self) -> dict[str, Any]:
        return {
            "n": self.n,
            "best_of": self.best_of,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "min_tokens": self.min_tokens,
            "logprobs": self.logprobs,
            "prompt_logprobs": self.prompt_logprobs,
            "ignore_eos": self.ignore_eos,
            "include_stop_str_in_output": self.include_stop_str_in_output,
            "skip_special_tokens": self.skip_special_tokens,
        }

    def to_proto(self) -> generation_pb2.SamplingParams:
        """Raises InvalidArgumentError for a value that protobuf does not take."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        try:
            return generation_pb2.SamplingParams(
                stop=stop,
                stop_token_ids=self.stop_token_ids,
                bad_words=self.bad_words,
                logit_bias=self.logit_bias,
                **self._scalars(),
            )
        except (TypeError, ValueError) as error:
            raise InvalidArgumentError(f"sampling parameters: {error}") from error


def check_items(name: str, items: Iterable[object] | None, kind: type | tuple[type, ...], kinds: str) -> None:
    if items is None:
        return
    if isinstance(items, str | bytes) or not isinstance(items, Iterable):
        raise refusal(name, f"must hold {kinds}, got {items!r}")
    wrong = [item for item in items if not isinstance(item, kind) or isinstance(item, bool)]
    if wrong:
        raise refusal(name, f"must hold {kinds}, got {wrong[0]!r}")


def check_range(name: str, value: object) -> None:
    low, high = _RANGES[name]
    numeric = isinstance(value, int) if name in _INTEGERS else isinstance(value, int | float)
    if not numeric or isinstance(value, bool):
        kind = "an integer" if name in _INTEGERS else "a number"
        raise refusal(name, f"must be {kind}, got {value!r}")
    assert isinstance(value, int | float)
    above = value > low if name in _OPEN else value >= low
    if not (math.isfinite(value) and above and value <= high):
        opening = "(" if name in _OPEN else "["
        raise refusal(name, f"must be in {opening}{low}, {high}], got {value}")


def refusal(name: str, reason: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{name} {reason}", name)
