"""RMSNorm, and the residual add fused with it, in Triton: one row a program.

y = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019). Half
precisions are computed in float32 and rounded once. With a residual, x is the sum rounded to the stream's dtype: what
the next layer adds to is what was normed. It may be a sum of three: the residual and two ranks' shares. The twins are
`rms_norm` and `add_rms_norm` of kernels/reference.py.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .pdl import starts_early, wait_for_earlier_kernels

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A row is held in registers: beyond this many elements they spill.
_MAX_WIDTH = 16384
# Elements of one warp: 16 a thread, two loads of 16 bytes in half precision.
_WARP_WIDTH = 512


@triton.jit
def _rms_norm_kernel(
    x_ptr: tl.tensor,  # [num_rows, width]
    weight_ptr: tl.tensor,  # [width]
    out_ptr: tl.tensor,  # [num_rows, width]
    eps: tl.tensor,
    width: tl.constexpr,
    block: tl.constexpr,  # the power of two that holds a row
    pdl: tl.constexpr,
) -> None:
    columns = tl.arange(0, block)
    mask = columns < width
    start = tl.program_id(0).to(tl.int64) * width
    weight = tl.load(weight_ptr + columns, mask, other=0.0).to(tl.float32)
    wait_for_earlier_kernels(pdl)
    x = tl.load(x_ptr + start + columns, mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    tl.store(out_ptr + start + columns, (x * scale * weight).to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _add_rms_norm_kernel(
    x_ptr: tl.tensor,  # [num_rows, width]
    other_ptr: tl.tensor,  # [num_rows, width], if there is one
    residual_ptr: tl.tensor,  # [num_rows, width]
    weight_ptr: tl.tensor,  # [width]
    out_ptr: tl.tensor,  # [num_rows, width]
    sum_ptr: tl.tensor,  # [num_rows, width]
    eps: tl.tensor,
    width: tl.constexpr,
    block: tl.constexpr,
    has_other: tl.constexpr,
    pdl: tl.constexpr,
) -> None:
    columns = tl.arange(0, block)
    mask = columns < width
    start = tl.program_id(0).to(tl.int64) * width
    weight = tl.load(weight_ptr + columns, mask, other=0.0).to(tl.float32)
    wait_for_earlier_kernels(pdl)
    x = tl.load(x_ptr + start + columns, mask, other=0.0).to(tl.float32)
    if has_other:
        x += tl.load(other_ptr + start + columns, mask, other=0.0).to(tl.float32)
    x += tl.load(residual_ptr + start + columns, mask, other=0.0).to(tl.float32)
    rounded = x.to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + start + columns, rounded, mask)
    x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    tl.store(out_ptr + start + columns, (x * scale * weight).to(out_ptr.dtype.element_ty), mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. x: [..., width] contiguous; weight: [width].

    Raises ValueError for tensors that the kernel does not take.
    """
    _check(x, weight)
    out = torch.empty_like(x)
    if x.numel():
        grid = (x.numel() // len(weight),)
        _rms_norm_kernel[grid](x, weight, out, eps, **_launch_options(weight, grid[0]))
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, other: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x + residual, and that sum; of x + other + residual if there is another. x, residual, other:
    [..., width] contiguous; weight: [width].

    Raises ValueError for tensors that the kernel does not take.
    """
    _check(x, weight)
    check_residual("add_rms_norm", x, residual)
    check_residual("add_rms_norm", x, other, "second part")
    out, total = torch.empty_like(x), torch.empty_like(x)
    if x.numel():
        grid = (x.numel() // len(weight),)
        parts = x, x if other is None else other, residual
        options = _launch_options(weight, grid[0])
        _add_rms_norm_kernel[grid](*parts, weight, out, total, eps, has_other=other is not None, **options)
    return out, total


def check_residual(name: str, x: torch.Tensor, residual: torch.Tensor | None, role: str = "residual") -> None:
    """Raises ValueError, in the name of an operation, unless there is no residual (or what else has the `role` of being
    added to x) or it is like x and contiguous."""
    if residual is None:
        return
    if residual.shape != x.shape or residual.dtype != x.dtype or not residual.is_contiguous():
        raise ValueError(
            f"{name}: a {role} like x ({list(x.shape)}, {x.dtype}, contiguous) is needed, "
            f"not {list(residual.shape)}, {residual.dtype}, strides {residual.stride()}"
        )


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.dtype not in _DTYPES or weight.dtype != x.dtype:
        raise ValueError(f"rms_norm: x and weight of one of {_DTYPES} are needed, not {x.dtype} and {weight.dtype}")
    if weight.dim() != 1 or x.shape[-1:] != weight.shape:
        raise ValueError(f"rms_norm: the weight {list(weight.shape)} does not fit x {list(x.shape)}")
    if not 0 < len(weight) <= _MAX_WIDTH:
        raise ValueError(f"rms_norm: a width of 1 to {_MAX_WIDTH} is supported, not {len(weight)}")
    if not (x.is_contiguous() and weight.is_contiguous()):
        raise ValueError(
            f"rms_norm: x and weight must be contiguous; their strides are {x.stride()}, {weight.stride()}"
        )


def _launch_options(weight: torch.Tensor, num_rows: int) -> dict[str, Any]:
    block = triton.next_power_of_2(len(weight))
    pdl = starts_early(weight.device, num_rows)
    return {
        "width": len(weight),
        "block": block,
        "pdl": pdl,
        "num_warps": min(max(block // _WARP_WIDTH, 1), 16),
        "launch_pdl": pdl,
    }
