"""Which kernel a linear layer takes on a Hopper GPU: a rule made from measurements on an H200.

cuBLAS reaches the memory's rate too, but waits for the kernel in front and pays its own ramp each time; in a decode
step of dependent launches (kernels/pdl.py) that is a few microseconds a product.
"""

import enum

import torch

from .linear_inputs import takes_weight
from .small_matmul import MAX_ROWS


class LinearKernel(enum.Enum):
    CUBLAS = "cublas"  # torch.nn.functional.linear
    GEMV = "gemv"  # kernels/gemv.py
    SMALL_MATMUL = "small_matmul"  # kernels/small_matmul.py


# From this many rows on only large weights keep cuBLAS from being as fast.
_SOME_ROWS = 33
_LARGE_WEIGHT = 32 * 1024 * 1024  # elements


def linear_kernel(num_rows: int, weight: torch.Tensor) -> LinearKernel:
    """For x [num_rows, in_size] and a weight [out_size, in_size] of one dtype. Float32 is cuBLAS's."""
    if not 0 < num_rows <= MAX_ROWS or not weight.numel() or not takes_weight(weight.shape[1], weight.dtype):
        return LinearKernel.CUBLAS
    if num_rows == 1:
        return LinearKernel.GEMV
    is_close = num_rows >= _SOME_ROWS and weight.numel() < _LARGE_WEIGHT
    return LinearKernel.CUBLAS if is_close else LinearKernel.SMALL_MATMUL
