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


def linear_kernel(num_rows: int, out_size: int, in_size: int, dtype: torch.dtype) -> LinearKernel:
    """For x [num_rows, in_size] and a weight [out_size, in_size], both of `dtype`. Float32 is cuBLAS's."""
    if not takes_weight(in_size, dtype) or not 0 < num_rows <= MAX_ROWS or not out_size:
        return LinearKernel.CUBLAS
    return LinearKernel.GEMV if num_rows == 1 else LinearKernel.SMALL_MATMUL
