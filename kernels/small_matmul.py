"""A few rows times a weight in Triton, for decodes of a small batch: y[m, n] = sum_k x[m, k] * weight[n, k] + bias[n].

Such a product is bound by reading the weight. The operands are swapped, so that 64 output features fill the tensor
cores' long side and the rows lie on the other, and both come through the copy engine (TMA) in a pipeline. Where there
are too few tiles of features to keep every multiprocessor reading, the inner dimension is split over several programs:
each leaves its float32 sums in a workspace, and the last to arrive adds them up in their order (split-K, as in Osama et
al., "Stream-K", PPoPP 2023, section 3). The twins are `linear` and `silu_and_mul` of kernels/reference.py.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .linear_inputs import check_linear, num_pairs
from .pdl import has_pdl

MAX_ROWS = 64
_BLOCK_OUT = 64  # the least that the tensor cores take of their long side
# Programs that split one product at most: about what an H200 runs at a time, four on each of its 132 multiprocessors.
_MAX_SPLIT_PROGRAMS = 512
# Programs of one product that are enough to read at full speed, and from which on smaller tiles do as well.
_ENOUGH_PROGRAMS = 96
_MANY_PROGRAMS = 264
_FEW_ROWS = 32  # whose tiles are small beside the weight's


@dataclass(frozen=True, slots=True)
class MatmulConfig:
    """How one launch cuts the product up."""

    num_splits: int  # of the inner dimension
    block_k: int
    num_stages: int  # tiles on their way


def matmul_config(num_rows: int, out_size: int, silu: bool) -> MatmulConfig:
    """For `num_rows` of x and weights of `out_size` rows, with `silu` of twice as many.

    Measured on an H200 in chains of dependent launches, with the shapes of 8B and 70B Llamas over one to four ranks:
    each is within 3 % of the best that was tried.
    """
    num_tiles = triton.cdiv(out_size, _BLOCK_OUT)
    num_splits = triton.cdiv(_ENOUGH_PROGRAMS, num_tiles)
    while num_splits > 1 and num_tiles * num_splits * (2 if silu else 1) > _MAX_SPLIT_PROGRAMS:
        num_splits -= 1
    if silu:
        return MatmulConfig(num_splits, 128, 3) if num_rows <= _FEW_ROWS else MatmulConfig(num_splits, 64, 5)
    if num_tiles >= _MANY_PROGRAMS:
        return MatmulConfig(num_splits, 128, 4)
    return MatmulConfig(num_splits, 256, 3) if num_rows <= _FEW_ROWS else MatmulConfig(num_splits, 128, 6)


class SplitWorkspace:
    """Where the programs that split a product meet. One serves all launches of a stream: they follow each other.

    It keeps its place, so captured graphs find it, and each launch leaves its counters at 0 again.
    """

    def __init__(self, device: torch.device) -> None:
        self.partials = torch.empty(_MAX_SPLIT_PROGRAMS * _BLOCK_OUT * MAX_ROWS, dtype=torch.float32, device=device)
        self.counters = torch.zeros(_MAX_SPLIT_PROGRAMS, dtype=torch.int32, device=device)


@triton.jit
def _wait_at(column: tl.tensor, pdl: tl.constexpr) -> tl.tensor:
    """`column`, once what earlier kernels wrote can be seen (kernels/pdl.py).

    Inside a pipelined loop: the load of x that needs the column cannot be moved in front of the wait, and the load of
    the weight, which stands in front of it, goes off before. Only a pure operation may be pipelined; the waits behind
    the first return at once.
    """
    if pdl:
        return tl.inline_asm_elementwise(
            "griddepcontrol.wait; mov.b32 $0, $1;", "=r,r", [column], dtype=tl.int32, is_pure=True, pack=1
        )
    return column


@triton.jit
def _part_offsets(block_out: tl.constexpr, block_rows: tl.constexpr) -> tl.tensor:
    return tl.arange(0, block_out)[:, None] * block_rows + tl.arange(0, block_rows)[None, :]


@triton.jit
def _store_part(parts_ptr: tl.tensor, split: tl.tensor, sums: tl.tensor) -> None:
    block_out: tl.constexpr = sums.shape[0]
    block_rows: tl.constexpr = sums.shape[1]
    tl.store(parts_ptr + split * (block_out * block_rows) + _part_offsets(block_out, block_rows), sums)


@triton.jit
def _add_parts(
    parts_ptr: tl.tensor,  # [num_splits, block_out, block_rows] float32
    num_splits: tl.constexpr,
    block_out: tl.constexpr,
    block_rows: tl.constexpr,
) -> tl.tensor:
    """The sum of all parts in the order of the splits: the same however they arrived."""
    sums = tl.zeros((block_out, block_rows), tl.float32)
    for split in tl.static_range(num_splits):
        ptrs = parts_ptr + split * (block_out * block_rows) + _part_offsets(block_out, block_rows)
        sums += tl.load(ptrs, cache_modifier=".cg")  # past this multiprocessor's own cache
    return sums


@triton.jit
def _is_last_to_arrive(counter_ptr: tl.tensor, num_splits: tl.constexpr) -> tl.tensor:
    """Whether the other programs of the tile have stored their parts. The last puts the counter back to 0."""
    tl.debug_barrier()  # all threads of this program have stored what one announces
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == num_splits - 1
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last


@triton.jit
def _add_bias(sums: tl.tensor, bias_ptr: tl.tensor, features: tl.tensor, size: tl.tensor) -> tl.tensor:
    return sums + tl.load(bias_ptr + features, features < size, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _store(
    out_ptr: tl.tensor, values: tl.tensor, features: tl.tensor, num_rows: tl.tensor, out_size: tl.tensor
) -> None:
    rows = tl.arange(0, values.shape[1])
    mask = (rows < num_rows)[None, :] & (features < out_size)[:, None]
    ptrs = out_ptr + rows.to(tl.int64)[None, :] * out_size + features[:, None]
    tl.store(ptrs, values.to(out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["num_rows"])
def _matmul_kernel(
    weight_desc: tl.tensor_descriptor,  # [out_size, in_size], tiles [block_out, block_k]
    x_desc: tl.tensor_descriptor,  # [num_rows, in_size], tiles [block_rows, block_k]
    bias_ptr: tl.tensor,  # [out_size] or None
    out_ptr: tl.tensor,  # [num_rows, out_size]
    partials_ptr: tl.tensor,  # [num_tiles, num_splits, block_out, block_rows] float32
    counters_ptr: tl.tensor,  # [num_tiles] int32, all 0
    num_rows: tl.tensor,
    out_size: tl.tensor,
    in_size: tl.tensor,
    split_size: tl.tensor,  # of the inner dimension, a multiple of block_k
    block_out: tl.constexpr,
    block_rows: tl.constexpr,
    block_k: tl.constexpr,
    num_splits: tl.constexpr,
    pdl: tl.constexpr,
) -> None:
    if pdl:
        tl.extra.cuda.gdc_launch_dependents()  # as early as may be: they wait for this program's end anyway
    split, tile = tl.program_id(0), tl.program_id(1)
    first = tile * block_out
    start = split * split_size
    end = tl.minimum(start + split_size, in_size)
    sums = tl.zeros((block_out, block_rows), tl.float32)
    for k in range(start, end, block_k):
        weight = weight_desc.load([first, k])
        sums = tl.dot(weight, x_desc.load([0, _wait_at(k, pdl)]).T, sums)
    is_last = True
    if num_splits > 1:
        parts = partials_ptr + tile.to(tl.int64) * num_splits * block_out * block_rows
        _store_part(parts, split, sums)
        is_last = _is_last_to_arrive(counters_ptr + tile, num_splits)
        if is_last:
            sums = _add_parts(parts, num_splits, block_out, block_rows)
    if is_last:
        features = first + tl.arange(0, block_out)
        if bias_ptr is not None:
            sums = _add_bias(sums, bias_ptr, features, out_size)
        _store(out_ptr, sums, features, num_rows, out_size)


@triton.jit(do_not_specialize=["num_rows"])
def _matmul_silu_kernel(
    weight_desc: tl.tensor_descriptor,  # [2 * out_size, in_size], the gates first, tiles [block_out, block_k]
    x_desc: tl.tensor_descriptor,  # as above
    bias_ptr: tl.tensor,  # [2 * out_size] or None
    out_ptr: tl.tensor,  # [num_rows, out_size]
    partials_ptr: tl.tensor,  # [num_tiles, 2 * num_splits, block_out, block_rows] float32
    counters_ptr: tl.tensor,
    num_rows: tl.tensor,
    out_size: tl.tensor,
    in_size: tl.tensor,
    split_size: tl.tensor,
    block_out: tl.constexpr,
    block_rows: tl.constexpr,
    block_k: tl.constexpr,
    num_splits: tl.constexpr,
    pdl: tl.constexpr,
) -> None:
    if pdl:
        tl.extra.cuda.gdc_launch_dependents()
    split, tile = tl.program_id(0), tl.program_id(1)
    first = tile * block_out
    start = split * split_size
    end = tl.minimum(start + split_size, in_size)
    gate = tl.zeros((block_out, block_rows), tl.float32)
    up = tl.zeros((block_out, block_rows), tl.float32)
    for k in range(start, end, block_k):
        gate_weight, up_weight = weight_desc.load([first, k]), weight_desc.load([out_size + first, k])
        x = x_desc.load([0, _wait_at(k, pdl)]).T
        gate = tl.dot(gate_weight, x, gate)
        up = tl.dot(up_weight, x, up)
    is_last = True
    if num_splits > 1:
        gate_parts = partials_ptr + tile.to(tl.int64) * (2 * num_splits) * block_out * block_rows
        up_parts = gate_parts + num_splits * block_out * block_rows
        _store_part(gate_parts, split, gate)
        _store_part(up_parts, split, up)
        is_last = _is_last_to_arrive(counters_ptr + tile, num_splits)
        if is_last:
            gate = _add_parts(gate_parts, num_splits, block_out, block_rows)
            up = _add_parts(up_parts, num_splits, block_out, block_rows)
    if is_last:
        features = first + tl.arange(0, block_out)
        if bias_ptr is not None:
            gate = _add_bias(gate, bias_ptr, features, out_size)
            up = _add_bias(up, bias_ptr + out_size, features, out_size)
        # As the product's own kernel would have stored them.
        gate = gate.to(out_ptr.dtype.element_ty).to(tl.float32)
        up = up.to(out_ptr.dtype.element_ty).to(tl.float32)
        _store(out_ptr, gate * tl.sigmoid(gate) * up, features, num_rows, out_size)


def small_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    workspace: SplitWorkspace,
    config: MatmulConfig | None = None,
) -> torch.Tensor:
    """x @ weight.T + bias, [num_rows, out_size]. x: [num_rows, in_size]; weight: [out_size, in_size]; bias: [out_size].

    Up to MAX_ROWS rows. Raises ValueError for tensors or a configuration that the kernel does not take.
    """
    check_linear("small_matmul", x, weight, bias, MAX_ROWS)
    config = config or matmul_config(len(x), len(weight), silu=False)
    out = x.new_empty(len(x), len(weight))
    _launch(_matmul_kernel, x, weight, bias, out, workspace, config)
    return out


def small_matmul_silu_and_mul(
    x: torch.Tensor,
    gate_up_weight: torch.Tensor,
    bias: torch.Tensor | None,
    workspace: SplitWorkspace,
    config: MatmulConfig | None = None,
) -> torch.Tensor:
    """silu(gate) * up of x @ gate_up_weight.T + bias, [num_rows, n]. The weight's first n rows make the gates.

    Up to MAX_ROWS rows. Raises ValueError for tensors or a configuration that the kernel does not take.
    """
    check_linear("small_matmul_silu_and_mul", x, gate_up_weight, bias, MAX_ROWS)
    out_size = num_pairs("small_matmul_silu_and_mul", gate_up_weight)
    config = config or matmul_config(len(x), out_size, silu=True)
    out = x.new_empty(len(x), out_size)
    _launch(_matmul_silu_kernel, x, gate_up_weight, bias, out, workspace, config)
    return out


def _launch(
    kernel: triton.JITFunction,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    workspace: SplitWorkspace,
    config: MatmulConfig,
) -> None:
    (num_rows, in_size), out_size = x.shape, out.shape[1]
    # Below 16 rows Triton leaves the faster of Hopper's two kinds of matrix instruction (wgmma).
    block_rows = max(triton.next_power_of_2(num_rows), 16)
    split_size = triton.cdiv(triton.cdiv(in_size, config.block_k), config.num_splits) * config.block_k
    num_splits = triton.cdiv(in_size, split_size)  # those that have something to do
    num_tiles = triton.cdiv(out_size, _BLOCK_OUT)
    num_parts = num_tiles * num_splits * (len(weight) // out_size)
    if num_splits > 1 and num_parts > _MAX_SPLIT_PROGRAMS:
        raise ValueError(f"small_matmul: {num_parts} parts of sums, and workspace for {_MAX_SPLIT_PROGRAMS}")
    kernel[(num_splits, num_tiles)](
        TensorDescriptor.from_tensor(weight, [_BLOCK_OUT, config.block_k]),
        TensorDescriptor.from_tensor(x, [block_rows, config.block_k]),
        bias,
        out,
        workspace.partials,
        workspace.counters,
        num_rows,
        out_size,
        in_size,
        split_size,
        block_out=_BLOCK_OUT,
        block_rows=block_rows,
        block_k=config.block_k,
        num_splits=num_splits,
        pdl=has_pdl(x.device),
        num_warps=4,
        num_stages=config.num_stages,
        launch_pdl=has_pdl(x.device),
    )
