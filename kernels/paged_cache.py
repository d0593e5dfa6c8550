"""What every Triton kernel over the paged KV cache shares: finding a key's cell, loading a tile, checking arguments.

A cell is one token's place in a layer's cache [num_blocks, block_size, num_kv_heads, head_dim]: block_id * block_size +
offset. A cache holds over 2**31 elements, so everything behind a block id is counted in int64.
"""

import torch
import triton
import triton.language as tl

from .fp8_cache import check_dtype

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256
# Tensor cores multiply tiles of at least 16 in each dimension.
MIN_DOT = 16


def padded(size: int) -> int:
    """The power of two, 16 or more, that a tile needs to hold `size`."""
    return max(MIN_DOT, 1 << (size - 1).bit_length())


@triton.jit
def load_block_ids(table_ptr: tl.tensor, keys: tl.tensor, end: tl.tensor, block_size: tl.constexpr) -> tl.tensor:
    """The block of each key; 0 for keys from `end` on, whose table entries may not exist."""
    return tl.load(table_ptr + keys // block_size, mask=keys < end, other=0)


@triton.jit
def cell_offsets(
    block_ids: tl.tensor, keys: tl.tensor, block_size: tl.constexpr, cell_stride: tl.constexpr
) -> tl.tensor:
    """Elements from the cache's start to each key's cell, the same for keys and values: int64."""
    # block_size is a power of two: the mask is the remainder.
    return (block_ids.to(tl.int64) * block_size + (keys & (block_size - 1))) * cell_stride


@triton.jit
def load_cells(
    head_ptr: tl.tensor,  # the KV head's first element in the cache
    offsets: tl.tensor,
    is_key: tl.tensor,
    head_dim: tl.constexpr,
    head_dim_padded: tl.constexpr,
    masked: tl.constexpr,
) -> tl.tensor:
    """[keys, head_dim_padded] of one KV head. What is no key is not read if `masked`: it is 0."""
    dims = tl.arange(0, head_dim_padded)
    pointers = head_ptr + offsets[:, None] + dims[None, :]
    if head_dim < head_dim_padded:
        return tl.load(pointers, mask=is_key[:, None] & (dims < head_dim)[None, :], other=0.0)
    if masked:
        return tl.load(pointers, mask=is_key[:, None], other=0.0)
    return tl.load(pointers)


def check_cache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> None:
    """Raises ValueError for queries or caches that the kernels do not take."""
    num_heads, head_dim = q.shape[1:]
    _, block_size, num_kv_heads, cache_head_dim = k_cache.shape
    if q.dtype not in DTYPES or q.dtype != out.dtype:
        raise ValueError(f"dtypes {q.dtype} and {out.dtype} of queries and output: one of {DTYPES} for both")
    check_dtype(q.dtype, k_cache, v_cache, scales)
    if head_dim != cache_head_dim or head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim {head_dim} of the queries, {cache_head_dim} of the cache: at most {MAX_HEAD_DIM}")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are no multiple of {num_kv_heads} KV heads")
    if not 8 <= block_size <= 128 or block_size & (block_size - 1):
        raise ValueError(f"block_size {block_size} is no power of two from 8 to 128")
    if k_cache.shape != v_cache.shape or not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError(f"caches {tuple(k_cache.shape)}, {tuple(v_cache.shape)}: not contiguous and of one shape")
    for name, x in (("q", q), ("out", out)):
        if x.shape != q.shape or x.stride()[1:] != (head_dim, 1):
            raise ValueError(f"{name} {tuple(x.shape)} with strides {x.stride()}: the heads of a token lie apart")


def check_rows(block_tables: torch.Tensor, slots: torch.Tensor, seq_lens: torch.Tensor) -> None:
    """Raises ValueError for descriptions of rows that the kernels do not take."""
    if block_tables.dtype != torch.int32 or seq_lens.dtype != torch.int32 or slots.dtype != torch.int64:
        raise ValueError(f"block_tables {block_tables.dtype}, seq_lens {seq_lens.dtype}, slots {slots.dtype}")
    if slots.shape != seq_lens.shape or slots.dim() != 1 or block_tables.dim() != 2:
        raise ValueError(f"slots {tuple(slots.shape)}, seq_lens {tuple(seq_lens.shape)}: one of each for each row")
    if block_tables.stride(1) != 1 or not (slots.is_contiguous() and seq_lens.is_contiguous()):
        raise ValueError("block table rows, slots and seq_lens must be contiguous")
