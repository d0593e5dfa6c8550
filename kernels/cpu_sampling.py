"""Gumbel-max sampling of a CPU in one pass: each row's greatest score and its column.

A score is logit / temperature + noise for rows that draw, the logit itself for greedy ones, whose temperature is 0.
noise = -log(-log(1 - u)), u from Philox 4x32-10 (Salmon et al., SC 2011) as in kernels/sampling.py, and the same words
bit for bit; logarithms to a few units in the last place, and the same in any column and of any slice.
Twins: workers/sampler/draw.py, gumbel.py and philox.py.
"""

import numpy as np
import torch
from numba import njit

from .cpu_launch import LIKE, KernelThreads, address
from .cpu_math import log
from .simd import (
    eight_from,
    f32_of_bits,
    f32_of_u32,
    interleave_high,
    interleave_low,
    iota,
    select_greater,
    select_less,
    splat_f32,
    splat_i32,
    splat_u64,
)
from .simd_memory import load, load_lanes, read_f32, read_i64, store

Tensor = torch.Tensor

_LARGEST = float(np.finfo(np.float32).max)
_DRAW_NS = 1.0  # for each logit, about


@njit(cache=True, nogil=True)
def _philox(position, groups, key0, key1):
    """Four words for each of eight groups, in the low halves: their counters are (position, group, 0, 0)."""
    mask = splat_u64(0xFFFFFFFF)
    c0, c1, c2, c3 = splat_u64(position), groups, splat_u64(0), splat_u64(0)
    for _ in range(10):
        product0, product1 = (c0 & mask) * splat_u64(0xD2511F53), (c2 & mask) * splat_u64(0xCD9E8D57)
        c0, c2 = (product1 >> splat_u64(32)) ^ c1 ^ splat_u64(key0), (product0 >> splat_u64(32)) ^ c3 ^ splat_u64(key1)
        c1, c3 = product1, product0
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


@njit(cache=True, nogil=True)
def _gumbel(words):
    uniform = (f32_of_u32(words) + splat_f32(0.5)) * splat_f32(2.0**-32)
    # The largest words round up to 1.0, whose noise would be infinite.
    largest = splat_f32(1.0 - 2.0**-24)
    uniform = select_less(uniform, largest, uniform, largest)
    # log(1 - u) is that of its rounding and what that lost, to first order.
    rest = splat_f32(1.0) - uniform
    lost = (splat_f32(1.0) - rest) - uniform
    exponential = splat_f32(0.0) - (log(rest) + lost / rest)
    return splat_f32(0.0) - log(exponential)


@njit(cache=True, nogil=True)
def _tempered(logits, inverse_temperature):
    """Infinite ones too: the greatest float for +inf. A NaN stays one."""
    scores, largest = logits * inverse_temperature, splat_f32(_LARGEST)
    return select_greater(scores, largest, largest, scores)


@njit(cache=True, nogil=True)
def _read_logits(logits, row, column, size, like):
    """Those of columns [column, column + 16) that are there; -inf for others."""
    if column >= 0 and column + 16 <= size:
        return load(logits, row + column, like)
    return load_lanes(logits, row + column, -column, size - column, splat_f32(-np.inf), like)


@njit(cache=True, nogil=True)
def _find_best(logits, temperatures, seeds, positions, scores, columns, size, first, like, start, end):
    """Of rows [start, end). `first` is the token of column 0."""
    lead = first % 4
    best_lanes, column_lanes = np.empty(16, dtype=np.float32), np.empty(16, dtype=np.float32)
    for row in range(start, end):
        base, temperature = row * size, read_f32(temperatures, row)
        inverse = splat_f32(np.float32(1.0) / temperature if temperature > 0 else np.float32(1.0))
        position, key0, key1 = read_i64(positions, row), read_i64(seeds, 2 * row), read_i64(seeds, 2 * row + 1)
        best, best_column = splat_f32(-np.inf), splat_i32(0)
        for column in range(-lead, size, 32):
            low = _read_logits(logits, base, column, size, like)
            high = _read_logits(logits, base, column + 16, size, like)
            if temperature > 0:
                groups = eight_from((first + column) // 4)
                words = _philox(position, groups, key0, key1)
                low = _tempered(low, inverse) + _gumbel(interleave_low(*words))
                high = _tempered(high, inverse) + _gumbel(interleave_high(*words))
            here = iota() + splat_i32(column)
            # A NaN is never greater; among equals the first stays.
            best_column = select_greater(low, best, here, best_column)
            best = select_greater(low, best, low, best)
            best_column = select_greater(high, best, here + splat_i32(16), best_column)
            best = select_greater(high, best, high, best)
        store(best_lanes.ctypes.data, 0, best, np.float32(0))
        store(column_lanes.ctypes.data, 0, f32_of_bits(best_column), np.float32(0))
        lane_columns = column_lanes.view(np.int32)
        highest, lowest = best_lanes[0], lane_columns[0]
        for lane in range(1, 16):
            score, column = best_lanes[lane], lane_columns[lane]
            if score > highest or (score == highest and column < lowest):
                highest, lowest = score, column
        scores[row], columns[row] = highest, lowest


def find_best(
    threads: KernelThreads, logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, first: int
) -> tuple[Tensor, Tensor]:
    """Each row's greatest score, [n] float32, and its column, [n] int64: the lowest of equals, 0 where nothing is
    above -inf.

    logits: [n, size] float32 or bfloat16; temperatures: [n] float32, 0 where greedy; seeds: [n, 2] int64, the low and
    the high 32 bits; positions: [n] int64, of the tokens to be sampled; `first`: the token of column 0.
    """
    num_rows, size = logits.shape
    scores, columns = np.empty(num_rows, dtype=np.float32), np.empty(num_rows, dtype=np.int64)
    inputs = (address(tensor) for tensor in (logits, temperatures, seeds, positions))
    args = (*inputs, scores, columns, size, first, LIKE[logits.dtype])
    threads.run(_find_best, args, num_rows, logits.numel() * _DRAW_NS)
    return torch.from_numpy(scores), torch.from_numpy(columns)
