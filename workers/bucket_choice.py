"""Which sizes of CUDA graphs are worth having: those that no larger one outruns.

What a library does with a matrix product can depend oddly on its size. With cuBLAS 13 on an H100 the gate and up
projection of an 8B model takes 133 us for 384 rows, 159 for 512 and 292 for 448: a step of 448 tokens then is served
5 ms faster with 64 rows of padding. Which sizes are so differs by model, ranks and library, so graphs are timed.
"""

import math
from collections.abc import Callable, Sequence

import torch

from .parallel import TensorParallel

_LEAST_GAIN = 0.03  # share of a size's time: less is noise
_LEAST_TIMED_MS = 5.0
_NUM_TIMINGS = 2


def sizes_worth_having(sizes: Sequence[int], time_ms: Callable[[int, int], float], tp: TensorParallel) -> list[int]:
    """Of `sizes`, those to use, ascending; the largest always. `time_ms(size, num_times)`: the mean of so many runs
    here, one after another.

    All ranks at once, with the same sizes. Runs on one wait for those on the others, so each makes as many; and all get
    the same answer, by the slowest rank of each size.
    """
    sizes = sorted(sizes)
    once_ms = _slowest([time_ms(size, 1) for size in sizes], tp)
    # Short ones again and again: ranks that wait for each other do not begin at the same moment.
    num_times = [math.ceil(_LEAST_TIMED_MS / max(ms, 0.01)) for ms in once_ms]
    often_ms = [
        min(time_ms(size, count) for _ in range(_NUM_TIMINGS)) for size, count in zip(sizes, num_times, strict=True)
    ]
    best_ms = map(min, once_ms, _slowest(often_ms, tp))
    kept: list[int] = []
    least_ms = float("inf")  # of larger sizes
    for size, ms in reversed(list(zip(sizes, best_ms, strict=True))):
        if ms * (1 - _LEAST_GAIN) <= least_ms:
            kept.append(size)
        least_ms = min(least_ms, ms)
    return kept[::-1]


def _slowest(times_ms: Sequence[float], tp: TensorParallel) -> list[float]:
    """Of each time the greatest of all ranks."""
    slowest: list[float] = tp.all_reduce_max(torch.tensor(times_ms, dtype=torch.float64, device=tp.device)).tolist()
    return slowest
