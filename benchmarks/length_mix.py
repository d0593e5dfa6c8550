"""Lengths of prompts and outputs as in the PagedAttention paper's data sets (arXiv 2309.06180, figure 11).

The data sets are not here: what is kept of them are their means, and that lengths spread about as a log-normal does.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

_SIGMA = 1.0  # of the logarithm: a tenth of the lengths is over 2.2 times the mean


@dataclass(frozen=True, slots=True)
class LengthMix:
    """Means are those of the paper, in tokens."""

    name: str
    mean_input: float
    mean_output: float

    def sample(self, num_requests: int, max_model_len: int, seed: int) -> list[tuple[int, int]]:
        """Tokens in and out of each request: together at most `max_model_len`, the same for the same seed.

        Of each distribution the quantiles in the middle of `num_requests` equal parts, brought to its mean, in a random
        order: few requests have its shape, too. Clipping comes last and makes the mean of many long ones a little less.
        """
        rng = np.random.default_rng(seed)
        inputs, outputs = (
            rng.permutation(_quantiles(mean, num_requests)).tolist() for mean in (self.mean_input, self.mean_output)
        )
        clipped = [(min(length, max_model_len // 2), output) for length, output in zip(inputs, outputs, strict=True)]
        return [(length, min(output, max_model_len - length)) for length, output in clipped]


def _quantiles(mean: float, count: int) -> list[int]:
    normal = NormalDist(0.0, _SIGMA)
    lengths = [math.exp(normal.inv_cdf((index + 0.5) / count)) for index in range(count)]
    scale = mean * count / sum(lengths)
    return [max(1, round(scale * length)) for length in lengths]


SHAREGPT = LengthMix("ShareGPT", 161, 338)
ALPACA = LengthMix("Alpaca", 19, 58)
