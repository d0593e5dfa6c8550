"""Paged causal attention of several query tokens for each row: prompt chunks, behind what is cached of the row already.

Query i of a row of n query tokens stands at position p = seq_len - n + i; its output is softmax(q k^T * scale) v over
the keys [0, p], online and tile by tile (FlashAttention-2, arXiv 2307.08691, algorithm 1). A program serves one tile of
queries of one head: first the keys that all of them see, without a mask, then the tiles on the diagonal.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .fp8_cache import (
    SMALLEST_SCALE,
    block_stride,
    fit_queries,
    inverse_power_of_two,
    key_scales,
    power_of_two,
    value_scales,
)
from .launch import Launch
from .paged_cache import cell_offsets, check_cache, check_rows, load_block_ids, load_cells, padded


@dataclass(frozen=True, slots=True)
class ChunkConfig:
    """How the kernel is cut for one shape."""

    queries_per_tile: int
    keys_per_tile: int
    num_warps: int
    num_stages: int


def chunk_config(max_query_len: int, head_dim: int, dtype: torch.dtype) -> ChunkConfig:
    """Tiles for chunks of up to `max_query_len` tokens: Hopper's tensor cores want 64 queries for each 4 warps.

    Measured on an H200 (bf16, 32 / 8 heads of 128, one prompt of 2,048 / 8,192): 96 / 1,217 us so, 103 / 1,279 us with
    tiles of 128 queries and 8 warps, 108 / 1,379 us with 128 queries and 128 keys.
    """
    if dtype == torch.float32:
        # Computed without tensor cores, from registers.
        return ChunkConfig(16, 32, 4, 1)
    if max_query_len <= 16:
        return ChunkConfig(16, 64, 4, 3 if head_dim <= 128 else 2)
    if head_dim > 128:
        return ChunkConfig(64, 64, 4, 2)
    return ChunkConfig(64, 64, 4, 3)


@triton.jit
def attend_keys(
    q: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    unit: tl.tensor,
    k_head_ptr: tl.tensor,
    v_head_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    table_ptr: tl.tensor,
    positions: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    log2_scales: tl.tensor,  # one, or one for each query where `is_fp8`
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    head_dim_padded: tl.constexpr,
    block_size: tl.constexpr,
    scale_stride: tl.constexpr,
    keys_per_tile: tl.constexpr,
    masked: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Takes keys [start, end) into the running maximum, sum and output; `masked` says which of them a query sees."""
    is_fp8: tl.constexpr = scales_ptr is not None
    cell_stride: tl.constexpr = num_kv_heads * head_dim
    # The next tile's block ids travel through the loop: loaded where they are used, the pipeline would wait for every
    # copy in flight.
    block_ids = load_block_ids(table_ptr, start + tl.arange(0, keys_per_tile), end, block_size)
    for tile_start in range(start, end, keys_per_tile):
        keys = tile_start + tl.arange(0, keys_per_tile)
        is_key = keys < end
        offsets = cell_offsets(block_ids, keys, block_size, cell_stride)
        k = load_cells(k_head_ptr, offsets, is_key, head_dim, head_dim_padded, masked)
        v = load_cells(v_head_ptr, offsets, is_key, head_dim, head_dim_padded, masked)
        if is_fp8:
            in_scales = block_ids.to(tl.int64) * scale_stride + (keys & (block_size - 1))
            scales = tl.load(scales_ptr + in_scales, mask=is_key, other=0)
        block_ids = load_block_ids(table_ptr, keys + keys_per_tile, end, block_size)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        if is_fp8:
            scores *= key_scales(scales)[None, :]
        if masked:
            # Covers the keys from `end` on too: every query of the row stands before it.
            scores = tl.where(keys[None, :] <= positions[:, None], scores, -float("inf"))
        # Scaled once more behind the maximum, not before it: scaling then is one instruction with the subtraction.
        new_top = tl.maximum(top, tl.max(scores, 1) * log2_scales)
        rescale = tl.exp2(top - new_top)
        weights = tl.exp2(scores * (log2_scales[:, None] if is_fp8 else log2_scales) - new_top[:, None])
        total = total * rescale + tl.sum(weights, 1)
        if is_fp8:
            new_unit = tl.maximum(unit, power_of_two(tl.max(value_scales(scales), 0)))
            inverse = inverse_power_of_two(new_unit)
            rescale *= unit * inverse
            weights = (weights * (value_scales(scales) * inverse)[None, :]).to(q.dtype)
            # Not in pairs, as decodes read values: with heads of 32 and 64 the second product of a pair made wgmma read
            # beside the shared memory (H100, Triton 3.6).
            acc = tl.dot(weights, v.to(q.dtype), acc * rescale[:, None], input_precision="ieee")
            unit = new_unit
        else:
            acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        top = new_top
    return top, total, acc, unit


# Where a step's chunk rows start in its tensors changes with the number of decodes; the kernel must not. Nor does it
# gain from what is known of a table's width.
@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["slots_ptr", "seq_lens_ptr", "query_starts_ptr"],
)
def _chunk_kernel(
    out_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    scales_ptr: tl.tensor,  # of an FP8 cache; None beside another
    block_tables_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    seq_lens_ptr: tl.tensor,
    query_starts_ptr: tl.tensor,
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
    queries_per_tile: tl.constexpr,
    keys_per_tile: tl.constexpr,
) -> None:
    is_fp8: tl.constexpr = scales_ptr is not None
    head = tl.program_id(0)
    row = tl.program_id(2)
    query_start = tl.load(query_starts_ptr + row)
    query_len = tl.load(query_starts_ptr + row + 1) - query_start
    # A row's last tile has the most keys: it starts first.
    tile = tl.cdiv(query_len, queries_per_tile) - 1 - tl.program_id(1)
    if tile < 0:
        return
    seq_len = tl.load(seq_lens_ptr + row)
    slot = tl.load(slots_ptr + row)

    queries = tile * queries_per_tile + tl.arange(0, queries_per_tile)
    dims = tl.arange(0, head_dim_padded)
    is_real = (queries < query_len)[:, None] & (dims < head_dim)[None, :]
    tokens = (query_start + queries).to(tl.int64)
    in_token = head * head_dim + dims
    q = tl.load(q_ptr + tokens[:, None] * q_stride + in_token[None, :], mask=is_real, other=0.0)

    first_position = seq_len - query_len + tile * queries_per_tile
    positions = first_position + tl.arange(0, queries_per_tile)
    seen_by_all = (first_position + 1) // keys_per_tile * keys_per_tile
    end = tl.minimum(first_position + queries_per_tile, seq_len)

    table_ptr = block_tables_ptr + slot * table_stride
    k_head_ptr = k_cache_ptr + head // group * head_dim
    v_head_ptr = v_cache_ptr + head // group * head_dim
    top = tl.full([queries_per_tile], -float("inf"), dtype=tl.float32)
    total = tl.zeros([queries_per_tile], dtype=tl.float32)
    acc = tl.zeros([queries_per_tile, head_dim_padded], dtype=tl.float32)
    unit = total  # of acc, in FP8: follows the largest scale of the values in it
    if is_fp8:
        scales_ptr += head // group * block_size
        unit = tl.full([], SMALLEST_SCALE, dtype=tl.float32)
        q, q_scales = fit_queries(q)
        log2_scale *= q_scales
    # Every query sees a key of the first tile that either loop takes, so no maximum is ever that of nothing.
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
        0,
        seen_by_all,
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
    attention = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + tokens[:, None] * out_stride + in_token[None, :], attention, mask=is_real)


def paged_chunk_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    query_starts: torch.Tensor,
    max_query_len: int,
    scale: float,
    out: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of each row's last query_starts[row + 1] - query_starts[row] tokens over its cached keys.

    q: [num_tokens, num_heads, head_dim], tokens any stride apart; caches: [num_blocks, block_size, num_kv_heads,
    head_dim], with this step's keys in them; block_tables: [num_slots, max_blocks] int32; slots: [num_rows] int64, each
    row's row of block_tables; seq_lens: [num_rows] int32, those query tokens included; query_starts: [num_rows + 1]
    int32, places in q; no row has more than max_query_len query tokens, a padding row has none; scale: above 0;
    scales: an FP8 cache's (kernels/fp8_cache.py).
    Returns `out`, or new memory of q's shape; tokens of no row are left as they are. Raises ValueError for shapes that
    the kernel does not take.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    rows = block_tables, slots, seq_lens, query_starts, max_query_len
    launch = chunk_attention_launch(q, k_cache, v_cache, *rows, scale, out, scales)
    if len(slots) and max_query_len > 0:
        with torch.cuda.device_of(q):
            launch.run()
    return out


def chunk_attention_launch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    query_starts: torch.Tensor,
    max_query_len: int,
    scale: float,
    out: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> Launch:
    """What paged_chunk_attention launches: to be run only if there are rows and query tokens."""
    check_cache(q, k_cache, v_cache, out, scales)
    check_rows(block_tables, slots, seq_lens)
    if query_starts.dtype != torch.int32 or query_starts.shape != (len(slots) + 1,) or not query_starts.is_contiguous():
        raise ValueError(f"query_starts {tuple(query_starts.shape)} of {query_starts.dtype} for {len(slots)} rows")
    _, num_heads, head_dim = q.shape
    _, block_size, num_kv_heads, _ = k_cache.shape
    config = chunk_config(max_query_len, head_dim, q.dtype)
    arguments = {
        "out_ptr": out,
        "q_ptr": q,
        "k_cache_ptr": k_cache,
        "v_cache_ptr": v_cache,
        "scales_ptr": scales,
        "block_tables_ptr": block_tables,
        "slots_ptr": slots,
        "seq_lens_ptr": seq_lens,
        "query_starts_ptr": query_starts,
        "log2_scale": scale * math.log2(math.e),
        "out_stride": out.stride(0),
        "q_stride": q.stride(0),
        "table_stride": block_tables.stride(0),
        "num_kv_heads": num_kv_heads,
        "group": num_heads // num_kv_heads,
        "head_dim": head_dim,
        "head_dim_padded": padded(head_dim),
        "block_size": block_size,
        "scale_stride": block_stride(scales),
        "queries_per_tile": config.queries_per_tile,
        "keys_per_tile": config.keys_per_tile,
    }
    grid = num_heads, -(-max_query_len // config.queries_per_tile), len(slots)
    return Launch(_chunk_kernel, grid, arguments, {"num_warps": config.num_warps, "num_stages": config.num_stages})
