"""What is asked of a system: random prompts of given lengths, and when they arrive. The same for the same seed."""

import math
from dataclasses import dataclass

import numpy as np

from ..errors import InvalidArgumentError


@dataclass(frozen=True, slots=True)
class LengthRange:
    """Lengths in tokens, drawn uniformly, both ends included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str, field: str) -> "LengthRange":
        """ "128", or "16:127" for a range. Raises InvalidArgumentError naming `field`."""
        parts = text.split(":")
        if len(parts) > 2 or not all(part.isdecimal() for part in parts):
            raise InvalidArgumentError(f"{field} takes a number of tokens or a range as 16:127, got {text!r}", field)
        low, high = int(parts[0]), int(parts[-1])
        if not 1 <= low <= high:
            raise InvalidArgumentError(f"{field} must be at least 1 and ascending, got {text!r}", field)
        return cls(low, high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that each generate `output_len` tokens, whatever the model says."""

    num_prompts: int
    input_len: LengthRange
    output_len: int
    seed: int = 0
    shared_len: int = 0  # of a prompt's tokens: with which all begin

    def __post_init__(self) -> None:
        for name in ("num_prompts", "output_len"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name} must be at least 1, got {getattr(self, name)}", name)
        if not 0 <= self.shared_len <= self.input_len.low:
            raise InvalidArgumentError(
                f"shared_len must be in [0, {self.input_len.low}], the least of input_len, got {self.shared_len}",
                "shared_len",
            )

    def prompts(self, vocab_size: int, repeat: int = 0) -> list[list[int]]:
        """Token ids, uniform over the vocabulary: no two prompts share a prefix worth caching, but for `shared_len`.

        Repeats have the same lengths and other tokens, so that none finds the blocks of another.
        """
        rng = np.random.default_rng(self.seed)
        lengths = rng.integers(self.input_len.low, self.input_len.high + 1, self.num_prompts)
        if repeat:
            rng = np.random.default_rng((self.seed, repeat))
        shared = rng.integers(0, vocab_size, self.shared_len).tolist()
        return [shared + rng.integers(0, vocab_size, length - self.shared_len).tolist() for length in lengths]

    @property
    def longest(self) -> int:
        """Most tokens that one request may come to."""
        return self.input_len.high + self.output_len


@dataclass(frozen=True, slots=True)
class NamedWorkload:
    """One of the anchors'."""

    input_len: str  # as LengthRange.parse
    output_len: int
    shared_len: int = 0
    num_prompts: int = 1000


WORKLOADS = {
    "1024/128": NamedWorkload("1024", 128),
    "128/512": NamedWorkload("128", 512),
    "prefix-0": NamedWorkload("1024", 64, num_prompts=500),
    "prefix-50": NamedWorkload("1024", 64, shared_len=512, num_prompts=500),
    "prefix-90": NamedWorkload("1024", 64, shared_len=922, num_prompts=500),
    "5-shot": NamedWorkload("1600", 32, shared_len=1536, num_prompts=500),
}


def poisson_arrivals(num_requests: int, requests_per_s: float, seed: int) -> list[float]:
    """Seconds after the start at which each request is sent; an infinite rate sends all at once."""
    if not requests_per_s > 0:
        raise InvalidArgumentError(f"request_rate must be over 0 (or inf), got {requests_per_s}", "request_rate")
    if math.isinf(requests_per_s):
        return [0.0] * num_requests
    gaps = np.random.default_rng(seed).exponential(1 / requests_per_s, num_requests)
    return [float(time_s) for time_s in np.cumsum(gaps)]
