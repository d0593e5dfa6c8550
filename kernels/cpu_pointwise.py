"""What a CPU computes between the products of a layer, each in one pass: norms, the activation.

Twins: reference.rms_norm, reference.add_rms_norm, reference.silu_and_mul.
"""

import math

import torch
from numba import njit

from .cpu_launch import LIKE, KernelThreads, address
from .cpu_math import exp
from .simd import fma, splat_f32, sum_of
from .simd_memory import load, load_lanes, store, store_lanes

Tensor = torch.Tensor

_NORM_NS, _SILU_NS = 0.2, 0.5  # for each element, about


@njit(cache=True, nogil=True)
def load_up_to(place, index, end, like):
    """Sixteen elements from `index` on; zeros for those from `end` on."""
    if index + 16 <= end:
        return load(place, index, like)
    return load_lanes(place, index, 0, end - index, splat_f32(0.0), like)


@njit(cache=True, nogil=True)
def store_up_to(place, index, end, value, like):
    if index + 16 <= end:
        store(place, index, value, like)
    else:
        store_lanes(place, index, value, end - index, like)


@njit(cache=True, nogil=True)
def _add_rms_norm(x, residual, weight, total, normed, size, eps, like, start, end):
    """Rows [start, end). A `residual` of 0: there is none, and no total is written."""
    for row in range(start, end):
        first, last = row * size, (row + 1) * size
        squares = splat_f32(0.0)
        for i in range(first, last, 16):
            value = load_up_to(x, i, last, like)
            if residual != 0:
                store_up_to(total, i, last, value + load_up_to(residual, i, last, like), like)
                value = load_up_to(total, i, last, like)  # rounded to what the next layers see
            squares = fma(value, value, squares)
        scale = splat_f32(1.0 / math.sqrt(sum_of(squares) / size + eps))
        source = x if residual == 0 else total
        for i in range(first, last, 16):
            value = load_up_to(source, i, last, like) * scale
            store_up_to(normed, i, last, value * load_up_to(weight, i - first, size, like), like)


@njit(cache=True, nogil=True)
def _silu_and_mul(gate_up, out, size, like, start, end):
    for row in range(start, end):
        gates, ups, outs = 2 * row * size, (2 * row + 1) * size, row * size
        for i in range(0, size, 16):
            gate = load_up_to(gate_up, gates + i, ups, like)
            up = load_up_to(gate_up, ups + i, ups + size, like)
            value = gate / (splat_f32(1.0) + exp(splat_f32(0.0) - gate)) * up
            store_up_to(out, outs + i, outs + size, value, like)


def rms_norm(threads: KernelThreads, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the reference, for contiguous float32 or bfloat16."""
    num_rows, size = x.shape
    normed = torch.empty_like(x)
    args = (address(x), 0, address(weight), 0, normed.data_ptr(), size, eps, LIKE[x.dtype])
    threads.run(_add_rms_norm, args, num_rows, x.numel() * _NORM_NS)
    return normed


def add_rms_norm(
    threads: KernelThreads, x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As the reference, for contiguous float32 or bfloat16."""
    num_rows, size = x.shape
    normed, total = torch.empty_like(x), torch.empty_like(x)
    sources = address(x), address(residual), address(weight)
    args = (*sources, total.data_ptr(), normed.data_ptr(), size, eps, LIKE[x.dtype])
    threads.run(_add_rms_norm, args, num_rows, x.numel() * _NORM_NS)
    return normed, total


def silu_and_mul(threads: KernelThreads, gate_up: Tensor) -> Tensor:
    """As the reference, for contiguous float32 or bfloat16; between the two steps nothing is rounded."""
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((num_rows, size))
    args = (address(gate_up), out.data_ptr(), size, LIKE[gate_up.dtype])
    threads.run(_silu_and_mul, args, num_rows, out.numel() * _SILU_NS)
    return out
