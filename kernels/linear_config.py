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


def linear_kernel(num_rows: int, weight: torch.Tensor) -> LinearKernel:
    """For x [num_rows, in_size] and a weight [out_size, in_size] of one dtype. Float32 is cuBLAS's.

    Measured on an H200 in whole steps of an 8B model: 0.59 ms gained at 1 row, 0.44 at 8 and 32, 0.38 at 64. From 128
    rows on cuBLAS is faster, and starting early gains nothing.
    """
    if not 0 < num_rows <= MAX_ROWS or not weight.numel() or not takes_weight(weight.shape[1], weight.dtype):
        return LinearKernel.CUBLAS
    return LinearKernel.GEMV if num_rows == 1 else LinearKernel.SMALL_MATMUL
