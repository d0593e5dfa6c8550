"""One row times a weight in Triton, for decodes of one sequence: y[n] = sum_k x[k] * weight[n, k] + bias[n].

Such a product only reads the weight, so the tensor cores have nothing to add: each program takes a few output features
over all of K. What no kernel writes (the weight) is loaded into registers before the program waits for the kernel in
front of it (kernels/pdl.py), so that the memory is busy while that one ends. SwiGLU's activation behind a projection,
and the residual add and RMSNorm in front of one, would cost a launch each and are fused.

The twins are `linear`, `silu_and_mul` and `add_rms_norm` of kernels/reference.py. Sums are float32, and what the twins
round between two operations is rounded here too.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .linear_inputs import check_linear, num_pairs
from .pdl import has_pdl

# Elements of the weight that a thread holds at most: 64 registers, so that five programs of four warps share a
# multiprocessor and have 160 KB on their way. Beside a normed row there is room for half as many.
_THREAD_ELEMENTS = 128
_FEW_THREAD_ELEMENTS = 64
_MIN_BLOCK_K = 256  # one load of 16 bytes for each thread of a warp
_MAX_BLOCK_K = 32768  # two rows fill 16 warps
# The widest row that is normed: each program reads all of it. Wider ones are normed sooner by a kernel of their own
# (measured on an H200: a QKV product of 8,192 inputs 13.4 us fused, 12.3 in two).
MAX_NORM_SIZE = 4096


@dataclass(frozen=True, slots=True)
class GemvConfig:
    """How one launch cuts the weight up. All are powers of two."""

    block_rows: int  # rows of the weight in a program, at least 2
    block_k: int  # elements of a row that are loaded together, at least 256
    num_warps: int


def gemv_config(in_size: int, normed: bool = False) -> GemvConfig:
    """A whole row at once, as far as registers reach. `normed`: for `add_norm_gemv`."""
    block_k = min(max(triton.next_power_of_2(in_size), _MIN_BLOCK_K), _MAX_BLOCK_K)
    block_rows = 4 if block_k <= 4096 else 2
    # Two rows of 8,192 are faster on eight warps (measured), as if there were twice as many elements.
    few = normed or block_k == 8192
    warp_elements = 32 * (_FEW_THREAD_ELEMENTS if few else _THREAD_ELEMENTS)
    return GemvConfig(block_rows, block_k, max(block_rows * block_k // warp_elements, 1))


@triton.jit
def _weight_rows(out_size: tl.constexpr, block_rows: tl.constexpr, silu: tl.constexpr) -> tl.tensor:
    """[block_rows, 1] int64: this program's rows, with `silu` gates and then their ups. Past the end: the last."""
    index = tl.arange(0, block_rows).to(tl.int64)
    if silu:
        half: tl.constexpr = block_rows // 2
        outputs = tl.program_id(0).to(tl.int64) * half + index % half
        return (tl.minimum(outputs, out_size - 1) + index // half * out_size)[:, None]
    return tl.minimum(tl.program_id(0).to(tl.int64) * block_rows + index, out_size - 1)[:, None]


@triton.jit
def _load(ptr: tl.tensor, columns: tl.tensor, in_size: tl.constexpr, ragged: tl.constexpr) -> tl.tensor:
    if ragged:
        return tl.load(ptr + columns, columns < in_size, other=0.0)
    return tl.load(ptr + columns)


@triton.jit
def _products(weight: tl.tensor, x: tl.tensor) -> tl.tensor:
    """[block_rows, block_k / 8] sums of eight products each: those that one thread loads together."""
    products = weight.to(tl.float32) * x.to(tl.float32)
    return tl.sum(tl.reshape(products, (weight.shape[0], weight.shape[1] // 8, 8)), axis=2)


@triton.jit
def _store_outputs(
    out_ptr: tl.tensor,
    sums: tl.tensor,  # [block_rows] float32
    rows: tl.tensor,  # [block_rows, 1]
    bias_ptr: tl.tensor,
    out_size: tl.constexpr,
    silu: tl.constexpr,
) -> None:
    values = sums[:, None]
    if bias_ptr is not None:
        values += tl.load(bias_ptr + rows).to(tl.float32)
    num_outputs: tl.constexpr = sums.shape[0] // 2 if silu else sums.shape[0]
    outputs = tl.program_id(0) * num_outputs + tl.arange(0, num_outputs)
    if silu:
        # As the product's own kernel would have stored them.
        rounded = values.to(out_ptr.dtype.element_ty).to(tl.float32)
        gate, up = tl.split(tl.trans(tl.reshape(rounded, (2, num_outputs))))
        values = gate * tl.sigmoid(gate) * up
    values = tl.reshape(values, (num_outputs,)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + outputs, values, outputs < out_size)


@triton.jit
def _gemv_kernel(
    x_ptr: tl.tensor,  # [in_size]
    weight_ptr: tl.tensor,  # [out_size, in_size]; with silu [2 * out_size, in_size], the gates first
    bias_ptr: tl.tensor,  # [out_size] or [2 * out_size], or None
    out_ptr: tl.tensor,  # [out_size]
    in_size: tl.constexpr,
    out_size: tl.constexpr,
    block_rows: tl.constexpr,
    block_k: tl.constexpr,
    silu: tl.constexpr,
    pdl: tl.constexpr,
) -> None:
    if pdl:
        # First of all: below the loads, the compiler would let them arrive before.
        tl.extra.cuda.gdc_launch_dependents()
    ragged: tl.constexpr = in_size % block_k != 0
    rows = _weight_rows(out_size, block_rows, silu)
    row_ptrs = weight_ptr + rows * in_size
    columns = tl.arange(0, block_k)[None, :]  # two dimensions, so that x lies in registers as the weight does
    weight = _load(row_ptrs, columns, in_size, ragged)
    if pdl:
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros((block_rows, block_k // 8), tl.float32)
    last: tl.constexpr = (triton.cdiv(in_size, block_k) - 1) * block_k
    for start in range(0, last, block_k):
        # Asked for before the tile in front of it is used.
        upcoming = _load(row_ptrs, start + block_k + columns, in_size, ragged)
        sums += _products(weight, _load(x_ptr, start + columns, in_size, False))
        weight = upcoming
    sums += _products(weight, _load(x_ptr, last + columns, in_size, ragged))
    _store_outputs(out_ptr, tl.sum(sums, axis=1), rows, bias_ptr, out_size, silu)


@triton.jit
def _add_norm_gemv_kernel(
    x_ptr: tl.tensor,  # [in_size]
    residual_ptr: tl.tensor,  # [in_size]
    norm_weight_ptr: tl.tensor,  # [in_size]
    weight_ptr: tl.tensor,  # as above
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,  # [out_size]
    sum_ptr: tl.tensor,  # [in_size]
    eps: tl.tensor,
    in_size: tl.constexpr,
    out_size: tl.constexpr,
    block_rows: tl.constexpr,
    block_k: tl.constexpr,  # the power of two that holds a row
    silu: tl.constexpr,
    pdl: tl.constexpr,
) -> None:
    if pdl:
        tl.extra.cuda.gdc_launch_dependents()
    ragged: tl.constexpr = in_size != block_k
    rows = _weight_rows(out_size, block_rows, silu)
    columns = tl.arange(0, block_k)[None, :]
    weight = _load(weight_ptr + rows * in_size, columns, in_size, ragged)
    norm_weight = _load(norm_weight_ptr, columns, in_size, ragged).to(tl.float32)
    if pdl:
        tl.extra.cuda.gdc_wait()
    x = _load(x_ptr, columns, in_size, ragged).to(tl.float32)
    x += _load(residual_ptr, columns, in_size, ragged).to(tl.float32)
    rounded = x.to(sum_ptr.dtype.element_ty)
    if tl.program_id(0) == 0:
        tl.store(sum_ptr + columns, rounded, columns < in_size)
    x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / in_size + eps)
    normed = (x * scale * norm_weight).to(x_ptr.dtype.element_ty)
    _store_outputs(out_ptr, tl.sum(_products(weight, normed), axis=1), rows, bias_ptr, out_size, silu)


def gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    config: GemvConfig | None = None,
) -> torch.Tensor:
    """x @ weight.T + bias, [1, out_size]. x: [1, in_size]; weight: [out_size, in_size]; bias: [out_size] or None.

    Raises ValueError for tensors that the kernel does not take.
    """
    check_linear("gemv", x, weight, bias, max_rows=1)
    out = x.new_empty(1, len(weight))
    _launch(_gemv_kernel, (x, weight, bias, out), weight, False, config or gemv_config(x.shape[1]))
    return out


def gemv_silu_and_mul(
    x: torch.Tensor, gate_up_weight: torch.Tensor, bias: torch.Tensor | None, config: GemvConfig | None = None
) -> torch.Tensor:
    """silu(gate) * up of x @ gate_up_weight.T + bias, [1, n]. The weight's first n rows make the gates, n more the ups.

    Raises ValueError for tensors that the kernel does not take.
    """
    check_linear("gemv_silu_and_mul", x, gate_up_weight, bias, max_rows=1)
    out = x.new_empty(1, num_pairs("gemv_silu_and_mul", gate_up_weight))
    config = config or gemv_config(x.shape[1])
    _launch(_gemv_kernel, (x, gate_up_weight, bias, out), gate_up_weight, True, config)
    return out


def add_norm_gemv(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    config: GemvConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gemv`, or with `silu` `gemv_silu_and_mul`, of the RMSNorm of x + residual; and that sum, [1, in_size].

    x, residual: [1, in_size]; norm_weight: [in_size]. Raises ValueError for tensors that the kernel does not take.
    """
    check_linear("add_norm_gemv", x, weight, bias, max_rows=1)
    in_size = x.shape[1]
    if residual.shape != x.shape or norm_weight.shape != (in_size,) or in_size > MAX_NORM_SIZE:
        raise ValueError(
            f"add_norm_gemv: x, residual and norm weight of one size up to {MAX_NORM_SIZE} are needed, "
            f"not {list(x.shape)}, {list(residual.shape)}, {list(norm_weight.shape)}"
        )
    if any(tensor.dtype != x.dtype or not tensor.is_contiguous() for tensor in (residual, norm_weight)):
        raise ValueError("add_norm_gemv: the residual and the norm's weight must be contiguous and of x's dtype")
    config = config or gemv_config(in_size, normed=True)
    assert config.block_k >= in_size, f"add_norm_gemv: {config} does not hold a row of {in_size}"
    out = x.new_empty(1, num_pairs("add_norm_gemv", weight) if silu else len(weight))
    total = torch.empty_like(x)
    args = (x, residual, norm_weight, weight, bias, out, total, eps)
    _launch(_add_norm_gemv_kernel, args, weight, silu, config)
    return out, total


def _launch(
    kernel: triton.JITFunction, args: tuple[object, ...], weight: torch.Tensor, silu: bool, config: GemvConfig
) -> None:
    num_rows, in_size = weight.shape
    kernel[(triton.cdiv(num_rows, config.block_rows),)](
        *args,
        in_size=in_size,
        out_size=num_rows // 2 if silu else num_rows,
        block_rows=config.block_rows,
        block_k=config.block_k,
        silu=silu,
        pdl=has_pdl(weight.device),
        num_warps=config.num_warps,
        launch_pdl=has_pdl(weight.device),
    )
