"""Rows of tables, copied: embeddings of a part of the vocabulary, and the rotary tables' rows of positions, in Triton.

The twins are `embed` and `rope_rows` of kernels/reference.py.
"""

import torch
import triton
import triton.language as tl

from .pdl import starts_early, wait_for_earlier_kernels

_ID_DTYPES = (torch.int32, torch.int64)
_BLOCK = 1024  # numbers of an embedding that a program copies
_BLOCK_WARPS = 4
_MAX_HEAD_DIM = 256


@triton.jit
def _embed_kernel(
    token_ids_ptr: tl.tensor,  # [num_tokens] int32 or int64
    table_ptr: tl.tensor,  # [num_rows, width]
    out_ptr: tl.tensor,  # [num_tokens, width]
    start: tl.tensor,
    num_rows: tl.tensor,
    width: tl.constexpr,
    block: tl.constexpr,
    pdl: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    mask = columns < width
    wait_for_earlier_kernels(pdl)
    row = tl.load(token_ids_ptr + token).to(tl.int64) - start
    is_here = (row >= 0) & (row < num_rows)
    values = tl.load(table_ptr + row * width + columns, mask & is_here, other=0.0)
    tl.store(out_ptr + token * width + columns, values, mask)


@triton.jit
def _rope_rows_kernel(
    positions_ptr: tl.tensor,  # [num_tokens] int64
    cos_table_ptr: tl.tensor,  # [max_positions, width]
    sin_table_ptr: tl.tensor,  # the same
    cos_ptr: tl.tensor,  # [num_tokens, width]
    sin_ptr: tl.tensor,  # the same
    width: tl.constexpr,
    block: tl.constexpr,
    pdl: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    mask = columns < width
    wait_for_earlier_kernels(pdl)
    cells = tl.load(positions_ptr + token) * width + columns
    cos = tl.load(cos_table_ptr + cells, mask)
    sin = tl.load(sin_table_ptr + cells, mask)
    tl.store(cos_ptr + token * width + columns, cos, mask)
    tl.store(sin_ptr + token * width + columns, sin, mask)


def embed(token_ids: torch.Tensor, table: torch.Tensor, start: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Rows of tokens [start, start + len(table)); zeros for others.

    token_ids: [num_tokens] int32 or int64; table: [num_rows, width]; out: [num_tokens, width] or None. All contiguous.
    Returns `out`, or what was made in its place. Raises ValueError for tensors that the kernel does not take.
    """
    _check_ids("embed", token_ids)
    if table.dim() != 2 or not table.is_contiguous():
        raise ValueError(f"embed: a contiguous table [num_rows, width] is needed, not {list(table.shape)}")
    shape = len(token_ids), table.shape[1]
    if out is None:
        out = torch.empty(shape, dtype=table.dtype, device=table.device)
    elif out.shape != shape or out.dtype != table.dtype or not out.is_contiguous():
        raise ValueError(f"embed: out must be {list(shape)}, {table.dtype} and contiguous, not {list(out.shape)}")
    if out.numel():
        block = min(triton.next_power_of_2(shape[1]), _BLOCK)
        pdl = starts_early(table.device, shape[0])
        _embed_kernel[(shape[0], triton.cdiv(shape[1], block))](
            token_ids,
            table,
            out,
            start,
            len(table),
            width=shape[1],
            block=block,
            pdl=pdl,
            num_warps=_BLOCK_WARPS,
            launch_pdl=pdl,
        )
    return out


def rope_rows(
    positions: torch.Tensor, cos_table: torch.Tensor, sin_table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tables' rows of the positions. positions: [num_tokens] int32 or int64; tables: [max_positions, head_dim].

    Returns two tensors [num_tokens, 1, head_dim]. Raises ValueError for tensors that the kernel does not take.
    """
    _check_ids("rope_rows", positions)
    for table in (cos_table, sin_table):
        if table.shape != cos_table.shape or table.dtype != cos_table.dtype or not table.is_contiguous():
            raise ValueError(
                f"rope_rows: two like contiguous tables are needed, not {list(cos_table.shape)}, {cos_table.dtype} "
                f"and {list(sin_table.shape)}, {sin_table.dtype}"
            )
    if cos_table.dim() != 2 or not 0 < cos_table.shape[1] <= _MAX_HEAD_DIM:
        raise ValueError(f"rope_rows: a head_dim of 1 to {_MAX_HEAD_DIM} is supported, not {list(cos_table.shape)}")
    num_tokens, head_dim = len(positions), cos_table.shape[1]
    cos, sin = (
        torch.empty((num_tokens, 1, head_dim), dtype=cos_table.dtype, device=cos_table.device) for _ in range(2)
    )
    if num_tokens:
        pdl = starts_early(cos_table.device, num_tokens)
        _rope_rows_kernel[(num_tokens,)](
            positions,
            cos_table,
            sin_table,
            cos,
            sin,
            width=head_dim,
            block=triton.next_power_of_2(head_dim),
            pdl=pdl,
            num_warps=1,
            launch_pdl=pdl,
        )
    return cos, sin


def _check_ids(name: str, ids: torch.Tensor) -> None:
    if ids.dtype not in _ID_DTYPES or ids.dim() != 1 or not ids.is_contiguous():
        raise ValueError(
            f"{name}: contiguous [num_tokens] of one of {_ID_DTYPES} is needed, "
            f"not {list(ids.shape)}, {ids.dtype}, strides {ids.stride()}"
        )
