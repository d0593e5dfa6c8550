"""Paged attention of one query token for each row, split over the keys, in one launch.

softmax(q k^T * scale) v over a row's cached keys, online (FlashAttention, arXiv 2205.14135) and split over programs
that merge by log-sum-exp (kernels/decode_splits.py). A program serves one KV head of one row with all of its query
heads, so a key is read once.

The same launch rotates queries and new keys and caches new keys and values, with the rounding of `rope_and_cache`. The
split that has a row's last position writes its cell before it reads its keys; no other program of the launch reads that
cell.

The grid depends on shapes alone, so a CUDA graph can replay it; which keys a program takes it reads on the device.

Rows may share prefixes, to which kernels/prefix_attention.py attends in front of this launch. A row's keys then are
those behind its prefix, and the parts of that are merged like splits of its own, in front of those.
"""

import math

import torch
import triton
import triton.language as tl

from .decode_splits import DecodeWorkspace, decode_config, decode_workspace, meet_splits, num_sms
from .fp8_cache import (
    SMALLEST_SCALE,
    block_stride,
    fit_queries,
    inverse_power_of_two,
    key_scales,
    largest,
    power_of_two,
    quantise,
    scale_word,
    scales_of,
    split_pairs,
    value_scales,
)
from .launch import Launch
from .paged_cache import check_cache, check_rows, padded
from .pdl import let_next_kernel_start, starts_early, wait_for_earlier_kernels
from .rope_cache import check_qkv
from .shared_prefixes import PrefixJobs

__all__ = ["DecodeWorkspace", "decode_workspace", "paged_decode_attention"]


@triton.jit
def _load_block_ids(
    table_ptr: tl.tensor,
    tile_start: tl.tensor,
    end: tl.tensor,
    keys_per_tile: tl.constexpr,
    block_size: tl.constexpr,
) -> tl.tensor:
    """The block of each key of a tile, or the one block of all; 0 from `end` on, where the table may have no entry."""
    keys = tile_start
    if block_size < keys_per_tile:
        keys += tl.arange(0, keys_per_tile)
    return tl.load(table_ptr + keys // block_size, mask=keys < end, other=0)


@triton.jit
def _block_offsets(
    block_ids: tl.tensor,
    tile_start: tl.tensor,
    keys_per_tile: tl.constexpr,
    block_size: tl.constexpr,
    cell_stride: tl.constexpr,
) -> tl.tensor:
    """int64, elements from the cache's start: to each key's block, [keys_per_tile, 1], or to the tile in its block."""
    offsets = block_ids.to(tl.int64) * (block_size * cell_stride)
    if block_size < keys_per_tile:
        offsets = offsets[:, None]
    if block_size > keys_per_tile:
        offsets += (tile_start & (block_size - 1)) * cell_stride
    return offsets


@triton.jit
def _partner_dims(dims: tl.tensor, head_dim: tl.constexpr) -> tl.tensor:
    """The dimension that each is rotated with: half a head away."""
    half: tl.constexpr = head_dim // 2
    # Halves are swapped whole, in runs of the largest power of two in `half`: told, the compiler loads them as vectors.
    run: tl.constexpr = half & -half
    partners = tl.where(dims < half, dims + half, dims - half)
    return tl.max_contiguous(tl.multiple_of(partners, run), run)


@triton.jit
def _rotate(heads: tl.tensor, partners: tl.tensor, cos: tl.tensor, sin: tl.tensor) -> tl.tensor:
    """[heads, dims]: computed in float32 and rounded once, in the order of `rope_and_cache`."""
    cos, sin = cos.to(tl.float32)[None, :], sin.to(tl.float32)[None, :]
    return tl.fma(partners.to(tl.float32), sin, heads.to(tl.float32) * cos).to(heads.dtype)


# Where a step's rows lie in its tensors changes with their number; the kernel must not.
@triton.jit(
    do_not_specialize=["num_splits", "parts_per_row", "min_keys_per_split"],
    do_not_specialize_on_alignment=[
        "kv_indices_ptr",
        "slots_ptr",
        "seq_lens_ptr",
        "prefix_keys_ptr",
        "prefix_parts_ptr",
    ],
)
def _decode_kernel(
    out_ptr: tl.tensor,  # [num_rows, num_heads, head_dim]
    qkv_ptr: tl.tensor,  # [num_rows, num_heads + 2 * num_kv_heads, head_dim]
    cos_ptr: tl.tensor,  # [num_rows, 1, head_dim]
    sin_ptr: tl.tensor,  # the same, the first half negated
    kv_indices_ptr: tl.tensor,  # [num_rows] int64: the last position's cell; negative: none
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    scales_ptr: tl.tensor,  # of an FP8 cache; None beside another
    block_tables_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    seq_lens_ptr: tl.tensor,
    prefix_keys_ptr: tl.tensor,  # [num_rows] int32: keys that were attended to already; None: of no row
    prefix_parts_ptr: tl.tensor,  # [num_rows] int32: partial results of these
    partials_ptr: tl.tensor,  # [num_rows, num_kv_heads, parts_per_row, group, head_dim]
    log_sums_ptr: tl.tensor,  # [num_rows, num_kv_heads, parts_per_row, group]
    arrivals_ptr: tl.tensor,
    log2_scale: tl.tensor,  # scale * log2(e): scores are exponents of 2
    out_stride: tl.tensor,
    qkv_stride: tl.tensor,
    table_stride: tl.tensor,
    num_splits: tl.tensor,
    parts_per_row: tl.tensor,
    min_keys_per_split: tl.tensor,
    is_split: tl.constexpr,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,  # query heads of a KV head
    tile_rows: tl.constexpr,  # a power of two: holds the group and the new key and value
    head_dim: tl.constexpr,
    head_dim_padded: tl.constexpr,
    block_size: tl.constexpr,
    scale_stride: tl.constexpr,
    keys_per_tile: tl.constexpr,
    heads_per_tile: tl.constexpr,  # of a merge
    splits_per_tile: tl.constexpr,
    pdl: tl.constexpr,
) -> None:
    is_fp8: tl.constexpr = scales_ptr is not None
    row_head = tl.program_id(0)
    split = tl.program_id(1)
    row = (row_head // num_kv_heads).to(tl.int64)
    kv_head = row_head % num_kv_heads
    wait_for_earlier_kernels(pdl, False)
    seq_len = tl.load(seq_lens_ptr + row)
    slot = tl.load(slots_ptr + row)

    # What needs no other load is asked for at once, before the block ids hold the program up.
    heads = tl.arange(0, tile_rows)
    dims = tl.arange(0, head_dim_padded)
    is_dim = dims < head_dim
    in_row = (kv_head * group + heads)[:, None] * head_dim + dims[None, :]
    is_real = (heads < group)[:, None] & is_dim[None, :]
    # A dot's tile has rows to spare: the new key and the new value lie below the queries and are rotated (the key) and
    # stored with them. What they score as queries is dropped.
    num_heads: tl.constexpr = num_kv_heads * group
    below = num_heads + (heads - group) * num_kv_heads + kv_head
    sources = tl.where(heads < group, kv_head * group + heads, below)
    is_given = (heads < group + 2)[:, None] & is_dim[None, :]
    source_ptrs = qkv_ptr + row * qkv_stride + sources[:, None] * head_dim
    given = tl.load(source_ptrs + dims[None, :], mask=is_given, other=0.0)
    partners = tl.load(source_ptrs + _partner_dims(dims, head_dim)[None, :], mask=is_given, other=0.0)
    cos = tl.load(cos_ptr + row * head_dim + dims, mask=is_dim, other=0.0)
    sin = tl.load(sin_ptr + row * head_dim + dims, mask=is_dim, other=0.0)
    cell = tl.load(kv_indices_ptr + row)

    first_key = 0
    num_prefix_parts = 0
    if prefix_keys_ptr is not None:
        first_key = tl.load(prefix_keys_ptr + row)
        num_prefix_parts = tl.load(prefix_parts_ptr + row)
    # Whole tiles for each split but the last. A padding row is one split of no keys, whose attention is 0.
    start = first_key
    end = seq_len
    if is_split:
        share = tl.maximum(tl.cdiv(seq_len - first_key, num_splits), min_keys_per_split)
        keys_per_split = tl.cdiv(share, keys_per_tile) * keys_per_tile
        start += split * keys_per_split
        end = tl.minimum(start + keys_per_split, seq_len)

    table_ptr = block_tables_ptr + slot * table_stride
    k_head_ptr = k_cache_ptr + kv_head * head_dim
    v_head_ptr = v_cache_ptr + kv_head * head_dim
    # The next tile's block ids travel through the loop: loaded where they are used, the pipeline would wait for every
    # copy in flight.
    block_ids = _load_block_ids(table_ptr, start, end, keys_per_tile, block_size)
    if (start >= seq_len) & (split > 0):
        return
    q = tl.where((heads == group + 1)[:, None], given, _rotate(given, partners, cos, sin))
    if (cell >= 0) & (end == seq_len):
        in_cell = cell * (num_kv_heads * head_dim) + tl.broadcast_to(dims[None, :], [tile_rows, head_dim_padded])
        cached = q
        if is_fp8:
            new_scales = scales_of(largest(q))
            cached = quantise(q, new_scales)
            key_scale = tl.sum(tl.where(heads == group, new_scales, 0.0), 0)
            value_scale = tl.sum(tl.where(heads == group + 1, new_scales, 0.0), 0)
            in_scales = cell // block_size * scale_stride + kv_head * block_size + cell % block_size
            tl.store(scales_ptr + in_scales, scale_word(key_scale, value_scale))
        tl.store(k_head_ptr + in_cell, cached, mask=(heads == group)[:, None] & is_dim[None, :])
        tl.store(v_head_ptr + in_cell, cached, mask=(heads == group + 1)[:, None] & is_dim[None, :])
    # The threads that read the cell below need not be those that wrote it.
    tl.debug_barrier()

    top = tl.full([tile_rows], -float("inf"), dtype=tl.float32)
    total = tl.zeros([tile_rows], dtype=tl.float32)
    # Where a key lies in its block, or in the part of it that is a tile, is the same in every tile.
    in_block = tl.arange(0, keys_per_tile) & (block_size - 1)
    # Of an FP8 cache values are read two dimensions a word, as the hardware can transpose them, and multiplied apart.
    dims_per_word: tl.constexpr = 2 if is_fp8 else 1
    word_stride: tl.constexpr = num_kv_heads * head_dim // dims_per_word
    value_words = tl.arange(0, head_dim_padded // dims_per_word)
    is_value_word = value_words < head_dim // dims_per_word
    acc = tl.zeros([tile_rows, head_dim_padded // dims_per_word], dtype=tl.float32)
    if is_fp8:
        v_head_ptr = v_head_ptr.to(tl.pointer_type(tl.uint16))
        scale_ptrs = scales_ptr + kv_head * block_size + in_block
        queries, log2_scales = fit_queries(q)
        log2_scales *= log2_scale
        acc_odd = tl.zeros_like(acc)
        unit = tl.full([], SMALLEST_SCALE, dtype=tl.float32)  # of both sums: follows the largest scale of their values
    k_ptrs = k_head_ptr + (in_block[:, None] * (num_kv_heads * head_dim) + dims[None, :])
    v_ptrs = v_head_ptr + (in_block[:, None] * word_stride + value_words[None, :])
    for tile_start in range(start, end, keys_per_tile):
        keys = tile_start + tl.arange(0, keys_per_tile)
        is_key = keys < end
        offsets = _block_offsets(block_ids, tile_start, keys_per_tile, block_size, word_stride)
        # Keys from `end` on score nothing, whatever they are; their values must be numbers.
        if head_dim < head_dim_padded:
            k = tl.load(k_ptrs + offsets * dims_per_word, mask=is_dim[None, :], other=0.0)
        else:
            k = tl.load(k_ptrs + offsets * dims_per_word)
        v = tl.load(v_ptrs + offsets, mask=is_key[:, None] & is_value_word[None, :], other=0)
        if is_fp8:
            in_scales = block_ids.to(tl.int64) * scale_stride
            if block_size > keys_per_tile:
                in_scales += tile_start & (block_size - 1)
            scales = tl.load(scale_ptrs + in_scales, mask=is_key, other=0)
        block_ids = _load_block_ids(table_ptr, tile_start + keys_per_tile, end, keys_per_tile, block_size)
        if is_fp8:
            scores = tl.dot(queries, tl.trans(k.to(queries.dtype)), input_precision="ieee") * log2_scales[:, None]
            scores *= key_scales(scales)[None, :]
        else:
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * log2_scale
        scores = tl.where(is_key[None, :], scores, -float("inf"))
        # Every tile has a key before `end`, so the maximum is finite.
        new_top = tl.maximum(top, tl.max(scores, 1))
        rescale = tl.exp2(top - new_top)
        weights = tl.exp2(scores - new_top[:, None])
        total = total * rescale + tl.sum(weights, 1)
        if is_fp8:
            new_unit = tl.maximum(unit, power_of_two(tl.max(value_scales(scales), 0)))
            inverse = inverse_power_of_two(new_unit)
            rescale *= unit * inverse
            weights = (weights * (value_scales(scales) * inverse)[None, :]).to(queries.dtype)
            even, odd = split_pairs(v, queries.dtype)
            acc = tl.dot(weights, even, acc * rescale[:, None], input_precision="ieee")
            acc_odd = tl.dot(weights, odd, acc_odd * rescale[:, None], input_precision="ieee")
            unit = new_unit
        else:
            acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        top = new_top
    if is_fp8:
        acc = tl.interleave(acc, acc_odd) * unit

    # Not before: its programs would take the room of those that still read.
    let_next_kernel_start(pdl)
    out_row_ptr = out_ptr + row * out_stride
    attention = acc / tl.where(total > 0, total, 1.0)[:, None]
    if (start == 0) & (end == seq_len):
        tl.store(out_row_ptr + in_row, attention.to(out_ptr.dtype.element_ty), mask=is_real)
    elif is_split:
        first_partial = row_head.to(tl.int64) * parts_per_row * group
        meet_splits(
            attention,
            top + tl.log2(total),
            num_prefix_parts,
            split,
            tl.cdiv(seq_len - first_key, keys_per_split),
            partials_ptr + first_partial * head_dim,
            log_sums_ptr + first_partial,
            arrivals_ptr + row_head,
            out_row_ptr + kv_head * group * head_dim,
            group,
            head_dim,
            heads_per_tile,
            splits_per_tile,
        )


def paged_decode_attention(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_indices: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    num_heads: int,
    scale: float,
    workspace: DecodeWorkspace,
    out: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of each row's one new query over its cached keys, of which its own is the last: `rope_and_cache` and
    what reads its results, in one launch.

    qkv: [num_rows, num_heads + 2 * num_kv_heads, head_dim], contiguous; cos, sin, kv_indices: as `rope_and_cache` takes
    them, a row's kv_index being the cell of its position seq_len - 1 by the block tables, or negative for a padding
    row; caches: [num_blocks, block_size, num_kv_heads, head_dim]; block_tables: [num_slots, max_blocks] int32; slots:
    [num_rows] int64, each row's row of block_tables; seq_lens: [num_rows] int32, 0 for a padding row, whose output is
    0; scales: an FP8 cache's (kernels/fp8_cache.py). Returns `out`, or new memory: [num_rows, num_heads, head_dim],
    tokens any stride apart.
    Raises ValueError for shapes that the kernel does not take.
    """
    if out is None:
        out = qkv.new_empty(len(qkv), num_heads, qkv.shape[-1])
    rows = block_tables, slots, seq_lens
    launch = decode_attention_launch(
        qkv, cos, sin, kv_indices, k_cache, v_cache, *rows, num_heads, scale, workspace, out, scales
    )
    if len(qkv):
        with torch.cuda.device_of(qkv):
            launch.run()
    return out


def decode_attention_launch(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_indices: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    num_heads: int,
    scale: float,
    workspace: DecodeWorkspace,
    out: torch.Tensor,
    scales: torch.Tensor | None = None,
    prefixes: PrefixJobs | None = None,
) -> Launch:
    """What paged_decode_attention launches: to be run only if there are rows, and with `prefixes` behind the launch of
    kernels/prefix_attention.py."""
    check_qkv(qkv, cos, sin, kv_indices, k_cache, v_cache, scales, num_heads)
    q = qkv[:, :num_heads]
    check_cache(q, k_cache, v_cache, out, scales)
    check_rows(block_tables, slots, seq_lens)
    num_rows, num_heads, head_dim = q.shape
    _, block_size, num_kv_heads, _ = k_cache.shape
    if len(slots) != num_rows:
        raise ValueError(f"{len(slots)} slots for {num_rows} rows")
    max_keys = block_tables.shape[1] * block_size
    shape = num_rows, num_heads, num_kv_heads, head_dim
    config = decode_config(*shape, q.dtype, max_keys, num_sms(q.device), is_fp8=scales is not None)
    parts_per_row = config.num_splits + (0 if prefixes is None else prefixes.max_parts)
    workspace.check(num_rows, num_heads, num_kv_heads, head_dim, parts_per_row)
    if prefixes is not None and len(prefixes.num_keys) != num_rows:
        raise ValueError(f"a plan for the prefixes of {len(prefixes.num_keys)} rows, where {num_rows} decode")
    group = num_heads // num_kv_heads
    # One row's programs would wait in the way of the product in front (8B on an H200: a step of 4.20 ms, 3.99 without).
    # Behind prefixes one variant does: the kernel in front is launched in the usual way.
    pdl = prefixes is None and num_rows > 1 and starts_early(q.device, num_rows)
    arguments = {
        "out_ptr": out,
        "qkv_ptr": qkv,
        "cos_ptr": cos,
        "sin_ptr": sin,
        "kv_indices_ptr": kv_indices,
        "k_cache_ptr": k_cache,
        "v_cache_ptr": v_cache,
        "scales_ptr": scales,
        "block_tables_ptr": block_tables,
        "slots_ptr": slots,
        "seq_lens_ptr": seq_lens,
        "prefix_keys_ptr": None if prefixes is None else prefixes.num_keys,
        "prefix_parts_ptr": None if prefixes is None else prefixes.num_parts,
        "partials_ptr": workspace.partials,
        "log_sums_ptr": workspace.log_sums,
        "arrivals_ptr": workspace.arrivals,
        "log2_scale": scale * math.log2(math.e),
        "out_stride": out.stride(0),
        "qkv_stride": qkv.stride(0),
        "table_stride": block_tables.stride(0),
        "num_splits": config.num_splits,
        "parts_per_row": parts_per_row,
        "min_keys_per_split": config.min_keys_per_split,
        "is_split": prefixes is not None or config.num_splits > 1,
        "num_kv_heads": num_kv_heads,
        "group": group,
        "tile_rows": padded(group + 2),
        "head_dim": head_dim,
        "head_dim_padded": padded(head_dim),
        "block_size": block_size,
        "scale_stride": block_stride(scales),
        "keys_per_tile": config.keys_per_tile,
        "heads_per_tile": triton.next_power_of_2(group),
        "splits_per_tile": config.splits_per_tile,
        "pdl": pdl,
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "launch_pdl": pdl}
    return Launch(_decode_kernel, (num_rows * num_kv_heads, config.num_splits, 1), arguments, options)
