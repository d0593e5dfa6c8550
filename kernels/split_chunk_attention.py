"""Paged causal attention of few query tokens behind long contexts: programs share a tile's keys, and a merge follows.

As kernels/chunk_attention.py, with two differences. A tile holds all query heads of a KV head, so that 16 tokens of a
group of 4 are 64 rows, and a key is read once for all of them. And a program takes a part s of the tile's keys, with
attention a_s and log-sum-exp L_s; a second kernel computes sum_s 2^(L_s) a_s / sum_s 2^(L_s) (Flash-Decoding). It is
one of its own because a tile's partial results are some hundred KiB: too much for the last program that arrives.

Which program takes what is in the plan of the step (kernels/chunk_splits.py).
"""

import math

import torch
import triton
import triton.language as tl

from .chunk_attention import attend_keys
from .chunk_splits import JOB_SIZE, MERGE_SIZE, ChunkSplits, ChunkWorkspace
from .decode_splits import merge_splits
from .fp8_cache import SMALLEST_SCALE, block_stride, fit_queries
from .launch import Launch
from .paged_cache import check_cache, padded
from .pdl import has_pdl, let_next_kernel_start, wait_for_earlier_kernels

# Splits that a program of the merge reads at once, and the float32 registers of a thread that they may take.
_MERGED_SPLITS = 16
_MERGE_REGISTERS = 128
_MERGE_WARPS = 4


# How many rows and jobs a step has changes where its tables lie; the kernel must not change.
@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["slots_ptr", "jobs_ptr"])
def _split_chunk_kernel(
    out_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    scales_ptr: tl.tensor,  # of an FP8 cache; None beside another
    block_tables_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    jobs_ptr: tl.tensor,
    partials_ptr: tl.tensor,  # [num_partials, num_kv_heads, tile_rows, head_dim]
    log_sums_ptr: tl.tensor,  # [num_partials, num_kv_heads, tile_rows]
    log2_scale: tl.tensor,  # scale * log2(e): exponents are of 2
    out_stride: tl.tensor,
    q_stride: tl.tensor,
    table_stride: tl.tensor,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,  # query heads of a KV head
    head_dim: tl.constexpr,
    head_dim_padded: tl.constexpr,
    block_size: tl.constexpr,
    scale_stride: tl.constexpr,
    job_size: tl.constexpr,
    tile_rows: tl.constexpr,
    keys_per_tile: tl.constexpr,
    pdl: tl.constexpr,
) -> None:
    is_fp8: tl.constexpr = scales_ptr is not None
    kv_head = tl.program_id(0)
    job_ptr = jobs_ptr + tl.program_id(1) * job_size
    wait_for_earlier_kernels(pdl, False)
    row = tl.load(job_ptr)
    first_token = tl.load(job_ptr + 1)
    num_queries = tl.load(job_ptr + 2)
    first_position = tl.load(job_ptr + 3)
    start = tl.load(job_ptr + 4)
    end = tl.load(job_ptr + 5)
    partial = tl.load(job_ptr + 6)
    slot = tl.load(slots_ptr + row)

    in_tile = tl.arange(0, tile_rows)
    queries = in_tile // group
    dims = tl.arange(0, head_dim_padded)
    is_row = queries < num_queries
    is_real = is_row[:, None] & (dims < head_dim)[None, :]
    tokens = (first_token + queries).to(tl.int64)
    in_token = (kv_head * group + in_tile % group)[:, None] * head_dim + dims[None, :]
    q = tl.load(q_ptr + tokens[:, None] * q_stride + in_token, mask=is_real, other=0.0)
    positions = first_position + queries
    seen_by_all = (first_position + 1) // keys_per_tile * keys_per_tile

    table_ptr = block_tables_ptr + slot * table_stride
    k_head_ptr = k_cache_ptr + kv_head * head_dim
    v_head_ptr = v_cache_ptr + kv_head * head_dim
    top = tl.full([tile_rows], -float("inf"), dtype=tl.float32)
    total = tl.zeros([tile_rows], dtype=tl.float32)
    acc = tl.zeros([tile_rows, head_dim_padded], dtype=tl.float32)
    unit = total  # of acc, in FP8: follows the largest scale of the values in it
    if is_fp8:
        scales_ptr += kv_head * block_size
        unit = tl.full([], SMALLEST_SCALE, dtype=tl.float32)
        q, q_scales = fit_queries(q)
        log2_scale *= q_scales
    # Every query sees the first key that either loop takes, so no maximum is ever that of nothing.
    top, total, acc, unit = attend_keys(
        q,
        top,
        total,
        acc,
        unit,
        k_head_ptr,
        v_head_ptr,
        scales_ptr,
        table_ptr,
        positions,
        start,
        tl.minimum(end, seen_by_all),
        log2_scale,
        num_kv_heads,
        head_dim,
        head_dim_padded,
        block_size,
        scale_stride,
        keys_per_tile,
        False,
    )
    top, total, acc, unit = attend_keys(
        q,
        top,
        total,
        acc,
        unit,
        k_head_ptr,
        v_head_ptr,
        scales_ptr,
        table_ptr,
        positions,
        seen_by_all,
        end,
        log2_scale,
        num_kv_heads,
        head_dim,
        head_dim_padded,
        block_size,
        scale_stride,
        keys_per_tile,
        True,
    )
    if is_fp8:
        acc *= unit
    let_next_kernel_start(pdl)
    attention = acc / total[:, None]
    if partial < 0:
        out_ptrs = out_ptr + tokens[:, None] * out_stride + in_token
        tl.store(out_ptrs, attention.to(out_ptr.dtype.element_ty), mask=is_real)
    else:
        place = (partial * num_kv_heads + kv_head) * tile_rows + in_tile
        partial_ptrs = partials_ptr + place.to(tl.int64)[:, None] * head_dim + dims[None, :]
        tl.store(partial_ptrs, attention, mask=is_real)
        tl.store(log_sums_ptr + place, top + tl.log2(total), mask=is_row)


@triton.jit(do_not_specialize_on_alignment=["merges_ptr"])
def _merge_kernel(
    out_ptr: tl.tensor,
    partials_ptr: tl.tensor,
    log_sums_ptr: tl.tensor,
    merges_ptr: tl.tensor,
    out_stride: tl.tensor,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    head_dim_padded: tl.constexpr,
    merge_size: tl.constexpr,
    tile_rows: tl.constexpr,
    heads_per_tile: tl.constexpr,
    splits_per_tile: tl.constexpr,
    pdl: tl.constexpr,
) -> None:
    """One query of one KV head."""
    kv_head = tl.program_id(0)
    query = tl.program_id(1)
    merge_ptr = merges_ptr + tl.program_id(2) * merge_size
    wait_for_earlier_kernels(pdl, False)
    first_token = tl.load(merge_ptr)
    num_queries = tl.load(merge_ptr + 1)
    partial = tl.load(merge_ptr + 2)
    num_parts = tl.load(merge_ptr + 3)
    if query >= num_queries:
        return
    place = ((partial * num_kv_heads + kv_head) * tile_rows + query * group).to(tl.int64)
    merge_splits(
        partials_ptr + place * head_dim,
        log_sums_ptr + place,
        out_ptr + (first_token + query).to(tl.int64) * out_stride + kv_head * group * head_dim,
        num_parts,
        num_kv_heads * tile_rows,
        group,
        head_dim,
        head_dim_padded,
        heads_per_tile,
        splits_per_tile,
    )


def split_chunk_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    slots: torch.Tensor,
    splits: ChunkSplits,
    workspace: ChunkWorkspace,
    scale: float,
    out: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the query tokens that `splits` names over their rows' cached keys.

    q: [num_tokens, num_heads, head_dim], tokens any stride apart; caches: [num_blocks, block_size, num_kv_heads,
    head_dim], with this step's keys in them; block_tables: [num_slots, max_blocks] int32; slots: [num_rows] int64, each
    row's row of block_tables; splits: of those rows, on the device; scale: above 0; scales: an FP8 cache's
    (kernels/fp8_cache.py).
    Returns `out`, or new memory of q's shape; other tokens are left as they are. Raises ValueError for shapes that the
    kernels do not take.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    rows = block_tables, slots
    launches = split_chunk_launches(q, k_cache, v_cache, *rows, splits, workspace, scale, out, scales)
    with torch.cuda.device_of(q):
        for launch in launches:
            launch.run()
    return out


def split_chunk_launches(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    slots: torch.Tensor,
    splits: ChunkSplits,
    workspace: ChunkWorkspace,
    scale: float,
    out: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> tuple[Launch, ...]:
    """What split_chunk_attention launches, in this order."""
    check_cache(q, k_cache, v_cache, out, scales)
    _check_plan(block_tables, slots, splits)
    _, num_heads, head_dim = q.shape
    _, block_size, num_kv_heads, _ = k_cache.shape
    group, tile, pdl = num_heads // num_kv_heads, splits.tile, has_pdl(q.device)
    if tile.queries * group > tile.rows:
        raise ValueError(f"tiles of {tile.rows} rows for {tile.queries} queries of {group} heads")
    workspace.check(splits.num_partials * num_kv_heads * tile.rows, head_dim)
    shared = {
        "out_ptr": out,
        "partials_ptr": workspace.partials,
        "log_sums_ptr": workspace.log_sums,
        "out_stride": out.stride(0),
        "num_kv_heads": num_kv_heads,
        "group": group,
        "head_dim": head_dim,
        "head_dim_padded": padded(head_dim),
        "tile_rows": tile.rows,
        "pdl": pdl,
    }
    attend = {
        "q_ptr": q,
        "k_cache_ptr": k_cache,
        "v_cache_ptr": v_cache,
        "scales_ptr": scales,
        "block_tables_ptr": block_tables,
        "slots_ptr": slots,
        "jobs_ptr": splits.jobs,
        "log2_scale": scale * math.log2(math.e),
        "q_stride": q.stride(0),
        "table_stride": block_tables.stride(0),
        "block_size": block_size,
        "scale_stride": block_stride(scales),
        "job_size": JOB_SIZE,
        "keys_per_tile": tile.keys,
    }
    heads = triton.next_power_of_2(group)
    at_once = _MERGE_WARPS * 32 * _MERGE_REGISTERS // (heads * padded(head_dim))
    merge = {
        "merges_ptr": splits.merges,
        "merge_size": MERGE_SIZE,
        "heads_per_tile": heads,
        "splits_per_tile": max(1, min(_MERGED_SPLITS, at_once)),
    }
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "launch_pdl": pdl}
    launches = (
        Launch(_split_chunk_kernel, (num_kv_heads, len(splits.jobs), 1), shared | attend, options),
        Launch(
            _merge_kernel,
            (num_kv_heads, tile.queries, len(splits.merges)),
            shared | merge,
            {"num_warps": _MERGE_WARPS, "launch_pdl": pdl},
        ),
    )
    return tuple(launch for launch, count in zip(launches, (splits.jobs, splits.merges), strict=True) if len(count))


def _check_plan(block_tables: torch.Tensor, slots: torch.Tensor, splits: ChunkSplits) -> None:
    if block_tables.dtype != torch.int32 or block_tables.dim() != 2 or block_tables.stride(1) != 1:
        raise ValueError(f"block_tables {tuple(block_tables.shape)} of {block_tables.dtype}")
    if slots.dtype != torch.int64 or slots.dim() != 1 or not slots.is_contiguous():
        raise ValueError(f"slots {tuple(slots.shape)} of {slots.dtype}")
    for name, table, size in (("jobs", splits.jobs, JOB_SIZE), ("merges", splits.merges, MERGE_SIZE)):
        if table.dtype != torch.int32 or table.shape[1:] != (size,) or not table.is_contiguous():
            raise ValueError(f"{name} {tuple(table.shape)} of {table.dtype} are not what chunk_splits makes")
        if table.device != block_tables.device:
            raise ValueError(f"{name} on {table.device}, block_tables on {block_tables.device}")
