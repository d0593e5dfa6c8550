"""Which sizes of CUDA graphs are worth having: those that no larger one outruns.

What a library does with a matrix product can depend oddly on its size. With cuBLAS 13 on an H100 the gate and up
projection of an 8B model takes 133 us for 384 rows, 159 for 512 and 292 for 448: a step of 448 tokens then is served
5 ms faster with 64 rows of padding. Which sizes are so differs by model, ranks and library, so graphs are timed.
"""

from collections.abc import Mapping

import torch

from .parallel import TensorParallel

_LEAST_GAIN = 0.03  # share of a size's time: less is noise


def sizes_worth_having(times_ms: Mapping[int, float], tp: TensorParallel) -> list[int]:
    """Of sizes with the time that each takes here, those to use, ascending; the largest always.

    All ranks at once, with the same sizes: they get the same answer, by the slowest rank of each size.
    """
    sizes = sorted(times_ms)
    measured = torch.tensor([times_ms[size] for size in sizes], device=tp.device)
    slowest = tp.all_reduce_max(measured).tolist()
    kept: list[int] = []
    least_ms = float("inf")  # of larger sizes
    for size, time_ms in zip(reversed(sizes), reversed(slowest), strict=True):
        if time_ms * (1 - _LEAST_GAIN) <= least_ms:
            kept.append(size)
        least_ms = min(least_ms, time_ms)
    return kept[::-1]
