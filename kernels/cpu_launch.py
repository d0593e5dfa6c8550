"""How kernels that numba compiles are called: on which tensors, and by how many threads."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch

# By dtype, what tells a kernel how to read memory (simd.py). Other dtypes are left to the reference.
LIKE: dict[torch.dtype, Any] = {torch.float32: np.float32(0), torch.bfloat16: np.uint16(0)}

# Less work than this, in units of about a nanosecond, is done before another thread has begun.
_LEAST_WORK_PER_THREAD = 32768


def address(tensor: torch.Tensor) -> int:
    """Of a tensor whose elements a kernel reads one behind the other."""
    assert tensor.is_contiguous(), f"a kernel takes no strides, as of shape {tuple(tensor.shape)}"
    return tensor.data_ptr()


class KernelThreads:
    """Splits a kernel's rows over as many threads as torch may use on the calling one, itself among them."""

    def __init__(self, least_work: float = _LEAST_WORK_PER_THREAD) -> None:
        """`least_work`: what a thread gets at least, in the units of `run`."""
        self._least_work = least_work
        self._pool: ThreadPoolExecutor | None = None
        self._pool_size = 0

    def run(self, kernel: Callable[..., None], args: tuple[Any, ...], num_rows: int, work: float) -> None:
        """kernel(*args, start, end) over [0, num_rows), rows that take about equally long, `work` in all."""
        num_parts = min(num_rows, self._num_parts(work))
        if num_parts <= 1:
            kernel(*args, 0, num_rows)
        else:
            self._run_parts(kernel, args, [num_rows * part // num_parts for part in range(num_parts + 1)])

    def _num_parts(self, work: float) -> int:
        """How many threads are worth their start for `work`."""
        if work < 2 * self._least_work:
            return 1
        return min(torch.get_num_threads(), int(work / self._least_work))

    def _run_parts(self, kernel: Callable[..., None], args: tuple[Any, ...], bounds: Sequence[int]) -> None:
        """kernel(*args, start, end) of each two bounds that follow each other, side by side."""
        own, *others = pairwise(bounds)
        pool = self._pool_of(len(others)) if others else None
        waiting = [pool.submit(kernel, *args, *part) for part in others] if pool else []
        kernel(*args, *own)
        for future in waiting:
            future.result()

    def _pool_of(self, size: int) -> ThreadPoolExecutor:
        if self._pool is None or size > self._pool_size:
            if self._pool is not None:
                self._pool.shutdown()
            self._pool, self._pool_size = ThreadPoolExecutor(size, "kernels"), size
        return self._pool
