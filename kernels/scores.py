"""What sampling and truncation have in common: scores (logits over a temperature) and their order as integers."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

GROUP = 128  # columns that share a maximum


@dataclass(frozen=True, slots=True)
class Kept:
    """What may be drawn: scores not below their row's threshold."""

    thresholds: torch.Tensor  # [num_rows] float32; -inf where the row cuts nothing off
    maxima: torch.Tensor  # [num_rows, ceil(size / GROUP)] float32: the greatest scores of groups of columns


@triton.jit
def temper(logits: tl.tensor, inverse_temperature: tl.tensor) -> tl.tensor:
    """Logits over the temperature, in float32: NaN as -inf, and above the largest float all are equal.

    The noise is too small to tell the latter apart, and infinity would spoil sums.
    """
    scores = logits.to(tl.float32) * inverse_temperature
    scores = tl.where(scores == float("inf"), 3.4028234663852886e38, scores)
    return tl.where(scores == scores, scores, -float("inf"))


@triton.jit
def ordered(scores: tl.tensor) -> tl.tensor:
    """float32 to int32 in the same order."""
    # Adding 0 makes -0.0 the 0.0 that it equals; negative floats descend with their bits.
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
