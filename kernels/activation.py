"""SwiGLU's activation in Triton: silu(gate) * up with silu(x) = x / (1 + exp(-x)) (Shazeer, "GLU Variants", 2020).

Half precisions are computed in float32 and rounded once. The twin is `silu_and_mul` of kernels/reference.py.
"""

import torch
import triton
import triton.language as tl

from .pdl import starts_early, wait_for_earlier_kernels

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = 1024  # elements of one program: at 4 warps one load of 16 bytes a thread for each half, in half precision
_MAX_WIDTH = _BLOCK * 65535  # CUDA's limit of a grid's second axis


@triton.jit
def _silu_and_mul_kernel(
    gate_up_ptr: tl.tensor,  # [num_rows, 2 * width]
    out_ptr: tl.tensor,  # [num_rows, width]
    width: tl.constexpr,
    block: tl.constexpr,
    pdl: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    mask = columns < width
    gate_ptrs = gate_up_ptr + row * (2 * width) + columns
    wait_for_earlier_kernels(pdl)
    gate = tl.load(gate_ptrs, mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + width, mask, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * width + columns, out.to(out_ptr.dtype.element_ty), mask)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up. [..., 2 * width] contiguous, the gates first, to [..., width].

    Raises ValueError for a tensor that the kernel does not take.
    """
    width, odd = divmod(gate_up.shape[-1], 2)
    if gate_up.dtype not in _DTYPES:
        raise ValueError(f"silu_and_mul: one of {_DTYPES} is needed, not {gate_up.dtype}")
    if odd or not 0 < width <= _MAX_WIDTH or not gate_up.is_contiguous():
        raise ValueError(
            "silu_and_mul: a contiguous tensor of gates and as many ups is needed, "
            f"not {list(gate_up.shape)} with strides {gate_up.stride()}"
        )
    out = torch.empty((*gate_up.shape[:-1], width), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        grid = (out.numel() // width, triton.cdiv(width, _BLOCK))
        pdl = starts_early(gate_up.device, grid[0])
        _silu_and_mul_kernel[grid](gate_up, out, width=width, block=_BLOCK, pdl=pdl, num_warps=4, launch_pdl=pdl)
    return out
