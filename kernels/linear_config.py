"""Which kernel a linear layer takes on a Hopper GPU: a rule made from measurements on an H200.

cuBLAS reaches the memory's rate too, but waits for the kernel in front and pays its own ramp each time; in a decode
step of dependent launches (kernels/pdl.py) that is a few microseconds a product.
"""

import enum

import torch

from .linear_inputs import takes_weight
from .pdl import has_pdl
from .small_matmul import MAX_ROWS


class LinearKernel(enum.Enum):
    CUBLAS = "cublas"  # torch.nn.functional.linear
    CUBLAS_LT = "cublas_lt"  # the same, by cuBLAS's other library, which chooses kernels otherwise
    GEMV = "gemv"  # kernels/gemv.py
    SMALL_MATMUL = "small_matmul"  # kernels/small_matmul.py


# From this many rows on, products of smaller weights are cuBLAS's.
_SOME_ROWS = 33
_LARGE_WEIGHT = 32 * 1024 * 1024  # elements
_LT_ROWS = 1024  # up to here cuBLASLt's choices are better


def linear_kernel(num_rows: int, weight: torch.Tensor) -> LinearKernel:
    """For x [num_rows, in_size] and a weight [out_size, in_size] of one dtype. Float32 is cuBLAS's.

    Measured on H200s in whole steps of an 8B model, against cuBLAS alone: on one, 0.59 ms gained at 1 row, 0.44 at 8
    and 32, 0.3 at 64; on four, 0.55 at 1 row, and 0.12 lost at 64 by the weights that this leaves to cuBLAS. From 128
    rows on cuBLAS is faster, and starting early gains nothing.

    CuBLASLt against cuBLAS, all layers' products of an 8B model on an H100, in ms: 5.67 of 5.85 for 96 rows, 5.65 of
    5.91 for 128, 7.88 of 8.62 for 384, as good for other sizes up to 2,048, and 82.7 of 81.3 for 4,096; with half the
    weights 3.03 of 3.23 for 96 rows, 4.17 of 4.56 for 384, 40.0 of 38.1 for 4,096.
    """
    if weight.is_cuda and not has_pdl(weight.device):
        return LinearKernel.CUBLAS  # measured from Hopper on alone
    if weight.dtype == torch.float32 or not 0 < num_rows <= _LT_ROWS or not weight.numel():
        return LinearKernel.CUBLAS
    if num_rows > MAX_ROWS or not takes_weight(weight.shape[1], weight.dtype):
        return LinearKernel.CUBLAS_LT
    if num_rows == 1:
        return LinearKernel.GEMV
    is_library_faster = num_rows >= _SOME_ROWS and weight.numel() < _LARGE_WEIGHT
    return LinearKernel.CUBLAS_LT if is_library_faster else LinearKernel.SMALL_MATMUL
