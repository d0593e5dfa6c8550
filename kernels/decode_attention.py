"""Paged attention of one query token for each row, split over the keys, in one launch.

softmax(q k^T * scale) v over a row's cached keys, online (FlashAttention, arXiv 2205.14135) and split over programs
that merge by log-sum-exp (Flash-Decoding). A program serves one KV head of one row with all of its query heads, so a
key is read once; the last program of a row and KV head to arrive merges the splits.

The grid depends on shapes alone, so a CUDA graph can replay it; which keys a program takes it reads on the device.
"""

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .paged_cache import cell_offsets, check_cache, check_rows, load_block_ids, load_cells, padded

H200_NUM_SMS = 132
# Programs wanted on each multiprocessor. Six fit (36 KiB of shared memory each, for heads of 128 in bfloat16); four
# keep enough copies in flight, and fewer splits cost less to merge. To be tuned by measurement.
_PROGRAMS_PER_SM = 4
_MAX_SPLITS = 64
# A split below this costs more to merge than its keys cost to read.
_MIN_KEYS_PER_SPLIT = 64
# A program alone reads slowly: no row's tail may be longer than this, however many rows there are.
_MAX_KEYS_PER_SPLIT = 16384

# Float32 registers of each thread that a tile of partial results fills in a merge: all are loads in flight. At 128 the
# compiler spills 4 words (heads of 128 in bfloat16), at 64 none, for twice the waits. To be tuned by measurement.
_MERGE_REGISTERS = 128


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How the kernel is cut for one shape. num_splits is the grid's; rows too short for it use fewer."""

    num_splits: int
    min_keys_per_split: int
    keys_per_tile: int
    splits_per_tile: int  # of a merge
    num_warps: int
    num_stages: int


@functools.cache
def decode_config(
    num_rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    max_keys: int,
    num_sms: int = H200_NUM_SMS,
) -> DecodeConfig:
    """Fills the GPU with one wave of programs. `max_keys`: what a row of the block table can hold."""
    wanted = max(_PROGRAMS_PER_SM * num_sms // max(num_rows * num_kv_heads, 1), -(-max_keys // _MAX_KEYS_PER_SPLIT))
    num_splits = min(wanted, -(-max_keys // _MIN_KEYS_PER_SPLIT), _MAX_SPLITS)
    # Measured (H200, bfloat16, 4 heads of 128): one warp and 32 keys a tile. More rows of accumulators need more warps.
    group = num_heads // num_kv_heads
    num_warps = min(8, max(1, padded(group) * padded(head_dim) // (16 * 128)))
    num_stages = 3
    if dtype == torch.float32:
        # Computed without tensor cores, from registers.
        num_warps, num_stages = max(4, num_warps), 2
    merged = triton.next_power_of_2(group) * padded(head_dim)
    return DecodeConfig(
        num_splits=max(num_splits, 1),
        min_keys_per_split=_MIN_KEYS_PER_SPLIT,
        keys_per_tile=32,
        splits_per_tile=max(1, num_warps * 32 * _MERGE_REGISTERS // merged),
        num_warps=num_warps,
        num_stages=num_stages,
    )


@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """What splits hand to each other. One serves every call of at most its rows, one call after the other."""

    partials: torch.Tensor  # [num_partials * head_dim] float32: each split's attention, query head by query head
    log_sums: torch.Tensor  # [num_partials] float32: log2 of the split's sum of exponentials
    arrivals: torch.Tensor  # [num_rows * num_kv_heads] int32: splits done; 0 between calls


def decode_workspace(
    num_rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    max_keys: int,
    device: torch.device,
) -> DecodeWorkspace:
    """Memory for calls of up to `num_rows` rows whose block tables hold up to `max_keys` keys each."""
    # Fewer rows are split into more parts.
    num_sms = _num_sms(device)
    num_partials = max(
        rows * num_heads * decode_config(rows, num_heads, num_kv_heads, head_dim, dtype, max_keys, num_sms).num_splits
        for rows in range(1, num_rows + 1)
    )
    return DecodeWorkspace(
        partials=torch.empty(num_partials * head_dim, dtype=torch.float32, device=device),
        log_sums=torch.empty(num_partials, dtype=torch.float32, device=device),
        arrivals=torch.zeros(num_rows * num_kv_heads, dtype=torch.int32, device=device),
    )


def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return H200_NUM_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _merge_splits(
    partials_ptr: tl.tensor,
    log_sums_ptr: tl.tensor,
    out_ptr: tl.tensor,
    first_partial: tl.tensor,
    num_active: tl.tensor,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    head_dim_padded: tl.constexpr,
    heads_per_tile: tl.constexpr,
    splits_per_tile: tl.constexpr,
) -> None:
    """out = sum_s 2^(L_s) partial_s / sum_s 2^(L_s), the heads of the group at once: one wait for a whole tile."""
    heads = tl.arange(0, heads_per_tile)
    dims = tl.arange(0, head_dim_padded)
    is_head = heads < group
    top = tl.full([heads_per_tile], -float("inf"), dtype=tl.float32)
    total = tl.zeros([heads_per_tile], dtype=tl.float32)
    acc = tl.zeros([heads_per_tile, head_dim_padded], dtype=tl.float32)
    for first in range(0, num_active, splits_per_tile):
        splits = first + tl.arange(0, splits_per_tile)
        index = first_partial + splits[:, None] * group + heads[None, :]
        is_active = (splits < num_active)[:, None] & is_head[None, :]
        # .cg: other multiprocessors wrote these; this one's L1 may hold what was there before.
        log_sums = tl.load(log_sums_ptr + index, mask=is_active, other=-float("inf"), cache_modifier=".cg")
        partials = tl.load(
            partials_ptr + index[:, :, None] * head_dim + dims[None, None, :],
            mask=is_active[:, :, None] & (dims < head_dim)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        # Padding heads have no maximum: 0 instead, so that they stay 0 rather than become NaN.
        new_top = tl.where(is_head, tl.maximum(top, tl.max(log_sums, 0)), 0.0)
        weights = tl.exp2(log_sums - new_top[None, :])
        rescale = tl.exp2(top - new_top)
        acc = acc * rescale[:, None] + tl.sum(partials * weights[:, :, None], 0)
        total = total * rescale + tl.sum(weights, 0)
        top = new_top
    merged = acc / tl.where(is_head, total, 1.0)[:, None]
    is_real = is_head[:, None] & (dims < head_dim)[None, :]
    pointers = out_ptr + heads[:, None] * head_dim + dims[None, :]
    tl.store(pointers, merged.to(out_ptr.dtype.element_ty), mask=is_real)


@triton.jit(do_not_specialize=["num_splits", "min_keys_per_split"])
def _decode_kernel(
    out_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    block_tables_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    seq_lens_ptr: tl.tensor,
    partials_ptr: tl.tensor,
    log_sums_ptr: tl.tensor,
    arrivals_ptr: tl.tensor,
    log2_scale: tl.tensor,  # scale * log2(e): scores are exponents of 2
    out_stride: tl.tensor,
    q_stride: tl.tensor,
    table_stride: tl.tensor,
    num_splits: tl.tensor,
    min_keys_per_split: tl.tensor,
    is_split: tl.constexpr,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,  # query heads of a KV head
    group_padded: tl.constexpr,
    head_dim: tl.constexpr,
    head_dim_padded: tl.constexpr,
    block_size: tl.constexpr,
    keys_per_tile: tl.constexpr,
    heads_per_tile: tl.constexpr,  # of a merge
    splits_per_tile: tl.constexpr,
) -> None:
    row_head = tl.program_id(0)
    split = tl.program_id(1)
    row = (row_head // num_kv_heads).to(tl.int64)
    kv_head = row_head % num_kv_heads
    seq_len = tl.load(seq_lens_ptr + row)
    slot = tl.load(slots_ptr + row)

    # Whole tiles for each split but the last. A padding row is one split of no keys, whose attention is 0.
    start = 0
    end = seq_len
    num_active = 1
    if is_split:
        share = tl.maximum(tl.cdiv(seq_len, num_splits), min_keys_per_split)
        keys_per_split = tl.cdiv(share, keys_per_tile) * keys_per_tile
        num_active = tl.maximum(tl.cdiv(seq_len, keys_per_split), 1)
        if split >= num_active:
            return
        start = split * keys_per_split
        end = tl.minimum(start + keys_per_split, seq_len)

    heads = tl.arange(0, group_padded)
    dims = tl.arange(0, head_dim_padded)
    is_real = (heads < group)[:, None] & (dims < head_dim)[None, :]
    in_row = (kv_head * group + heads)[:, None] * head_dim + dims[None, :]
    q = tl.load(q_ptr + row * q_stride + in_row, mask=is_real, other=0.0)

    table_ptr = block_tables_ptr + slot * table_stride
    k_head_ptr = k_cache_ptr + kv_head * head_dim
    v_head_ptr = v_cache_ptr + kv_head * head_dim
    top = tl.full([group_padded], -float("inf"), dtype=tl.float32)
    total = tl.zeros([group_padded], dtype=tl.float32)
    acc = tl.zeros([group_padded, head_dim_padded], dtype=tl.float32)
    # The next tile's block ids travel through the loop: loaded where they are used, the pipeline would wait for every
    # copy in flight.
    block_ids = load_block_ids(table_ptr, start + tl.arange(0, keys_per_tile), end, block_size)
    for tile_start in range(start, end, keys_per_tile):
        keys = tile_start + tl.arange(0, keys_per_tile)
        is_key = keys < end
        offsets = cell_offsets(block_ids, keys, block_size, num_kv_heads * head_dim)
        k = load_cells(k_head_ptr, offsets, is_key, head_dim, head_dim_padded, True)
        v = load_cells(v_head_ptr, offsets, is_key, head_dim, head_dim_padded, True)
        block_ids = load_block_ids(table_ptr, keys + keys_per_tile, end, block_size)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * log2_scale
        scores = tl.where(is_key[None, :], scores, -float("inf"))
        # Every tile has a key before `end`, so the maximum is finite.
        new_top = tl.maximum(top, tl.max(scores, 1))
        rescale = tl.exp2(top - new_top)
        weights = tl.exp2(scores - new_top[:, None])
        total = total * rescale + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        top = new_top

    out_row_ptr = out_ptr + row * out_stride
    attention = acc / tl.where(total > 0, total, 1.0)[:, None]
    if num_active == 1:
        tl.store(out_row_ptr + in_row, attention.to(out_ptr.dtype.element_ty), mask=is_real)
    if is_split:  # noqa: SIM102 (known when compiled, unlike the next)
        if num_active > 1:
            first_partial = row_head.to(tl.int64) * num_splits * group
            partial = first_partial + split * group + heads
            tl.store(partials_ptr + partial[:, None] * head_dim + dims[None, :], attention, mask=is_real)
            tl.store(log_sums_ptr + partial, top + tl.log2(total), mask=heads < group)
            # All threads have stored before one of them announces it.
            tl.debug_barrier()
            arrived = tl.atomic_add(arrivals_ptr + row_head, 1, sem="acq_rel", scope="gpu")
            if arrived == num_active - 1:
                tl.store(arrivals_ptr + row_head, 0)
                _merge_splits(
                    partials_ptr,
                    log_sums_ptr,
                    out_row_ptr + kv_head * group * head_dim,
                    first_partial,
                    num_active,
                    group,
                    head_dim,
                    head_dim_padded,
                    heads_per_tile,
                    splits_per_tile,
                )


def paged_decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    workspace: DecodeWorkspace,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of each row's one query over its cached keys, of which its own is the last.

    q: [num_rows, num_heads, head_dim], tokens any stride apart; caches: [num_blocks, block_size, num_kv_heads,
    head_dim]; block_tables: [num_slots, max_blocks] int32; slots: [num_rows] int64, each row's row of block_tables;
    seq_lens: [num_rows] int32, 0 for a padding row, whose output is 0. Returns `out`, or new memory of q's shape.
    Raises ValueError for shapes that the kernel does not take.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    check_cache(q, k_cache, v_cache, out)
    check_rows(block_tables, slots, seq_lens)
    num_rows, num_heads, head_dim = q.shape
    _, block_size, num_kv_heads, _ = k_cache.shape
    if len(slots) != num_rows:
        raise ValueError(f"{len(slots)} slots for {num_rows} rows")
    if num_rows == 0:
        return out
    max_keys = block_tables.shape[1] * block_size
    config = decode_config(num_rows, num_heads, num_kv_heads, head_dim, q.dtype, max_keys, _num_sms(q.device))
    _check_workspace(workspace, num_rows, num_heads, num_kv_heads, head_dim, config)
    with torch.cuda.device_of(q):
        _decode_kernel[(num_rows * num_kv_heads, config.num_splits)](
            out,
            q,
            k_cache,
            v_cache,
            block_tables,
            slots,
            seq_lens,
            workspace.partials,
            workspace.log_sums,
            workspace.arrivals,
            scale * math.log2(math.e),
            out.stride(0),
            q.stride(0),
            block_tables.stride(0),
            config.num_splits,
            config.min_keys_per_split,
            is_split=config.num_splits > 1,
            num_kv_heads=num_kv_heads,
            group=num_heads // num_kv_heads,
            group_padded=padded(num_heads // num_kv_heads),
            head_dim=head_dim,
            head_dim_padded=padded(head_dim),
            block_size=block_size,
            keys_per_tile=config.keys_per_tile,
            heads_per_tile=triton.next_power_of_2(num_heads // num_kv_heads),
            splits_per_tile=config.splits_per_tile,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out


def _check_workspace(
    workspace: DecodeWorkspace, num_rows: int, num_heads: int, num_kv_heads: int, head_dim: int, config: DecodeConfig
) -> None:
    num_partials = num_rows * num_heads * config.num_splits
    if workspace.log_sums.numel() < num_partials or workspace.partials.numel() < num_partials * head_dim:
        raise ValueError(f"a workspace of {workspace.log_sums.numel()} partial results: {num_partials} needed")
    if workspace.arrivals.numel() < num_rows * num_kv_heads:
        raise ValueError(f"a workspace of {workspace.arrivals.numel()} counters: {num_rows * num_kv_heads} needed")
