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

    def __post_init__(self) -> None:
        for name in ("num_prompts", "output_len"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name} must be at least 1, got {getattr(self, name)}", name)

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Token ids, uniform over the vocabulary: no two prompts share a prefix worth caching."""
        rng = np.random.default_rng(self.seed)
        lengths = rng.integers(self.input_len.low, self.input_len.high + 1, self.num_prompts)
        return [rng.integers(0, vocab_size, length).tolist() for length in lengths]

    @property
    def longest(self) -> int:
        """Most tokens that one request may come to."""
        return self.input_len.high + self.output_len


def poisson_arrivals(num_requests: int, requests_per_s: float, seed: int) -> list[float]:
    """Seconds after the start at which each request is sent; an infinite rate sends all at once."""
    if not requests_per_s > 0:
        raise InvalidArgumentError(f"request_rate must be over 0 (or inf), got {requests_per_s}", "request_rate")
    if math.isinf(requests_per_s):
        return [0.0] * num_requests
    gaps = np.random.default_rng(seed).exponential(1 / requests_per_s, num_requests)
    return [float(time_s) for time_s in np.cumsum(gaps)]
