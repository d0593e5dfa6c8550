"""How decode attention is cut over a GPU: the split of each row's keys, and how splits meet again.

A split leaves its attention a_s and the log-sum-exp L_s of its scores in a workspace; the last to arrive computes
sum_s 2^(L_s) a_s / sum_s 2^(L_s) (Flash-Decoding). Nobody waits for anybody, so the programs need not run at once.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .paged_cache import padded
from .shared_prefixes import max_prefix_parts

H200_NUM_SMS = 132
# Programs wanted on each multiprocessor: four keep enough copies in flight. With few rows most programs find no keys,
# and starting them costs more than they bring (measured on an H200, one row of 8 KV heads, 1,024 keys: 7.7 us with
# four, 7.1 with two).
_PROGRAMS_PER_SM = 4
_PROGRAMS_PER_SM_FOR_FEW = 2
_FEW_ROW_HEADS = 8
_MAX_SPLITS = 64
_NEW_ROWS = 2  # the new key and value lie below a group's queries
# A split below this costs more to merge than its keys cost to read.
_MIN_KEYS_PER_SPLIT = 64
# A program alone reads slowly: no row's tail may be longer than this, however many rows there are.
_MAX_KEYS_PER_SPLIT = 16384

# Float32 registers of each thread that a tile of partial results fills in a merge: all are loads in flight. At 128 the
# compiler spills 4 words (heads of 128 in bfloat16), at 64 none, for twice the waits.
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
    is_fp8: bool = False,
) -> DecodeConfig:
    """Fills the GPU with one wave of programs. `max_keys`: what a row of the block table can hold; `dtype`: of the
    queries, and of the cache unless `is_fp8`."""
    row_heads = max(num_rows * num_kv_heads, 1)
    programs_per_sm = _PROGRAMS_PER_SM_FOR_FEW if row_heads <= _FEW_ROW_HEADS else _PROGRAMS_PER_SM
    wanted = max(programs_per_sm * num_sms // row_heads, -(-max_keys // _MAX_KEYS_PER_SPLIT))
    num_splits = min(wanted, -(-max_keys // _MIN_KEYS_PER_SPLIT), _MAX_SPLITS)
    # Measured (H200, bfloat16, 4 heads of 128, 1 to 256 rows): one warp, 32 keys a tile, four tiles on their way. More
    # rows of accumulators need more warps.
    group = num_heads // num_kv_heads
    num_warps = min(8, max(1, padded(group + _NEW_ROWS) * padded(head_dim) // (16 * 128)))
    # In FP8 as many bytes on their way are more tiles. Measured (H100, 256 rows of 8,192 keys): 1,557 us with six of
    # them, 1,768 with four; one row of them takes 17.2 us with four and 19.0 with six.
    num_stages = 6 if is_fp8 and row_heads > _FEW_ROW_HEADS else 4
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


def num_sms(device: torch.device) -> int:
    """Multiprocessors that a grid on `device` should fill."""
    if device.type != "cuda":
        return H200_NUM_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """What splits hand to each other. One serves every call of at most its rows, one call after the other."""

    partials: torch.Tensor  # [num_partials * head_dim] float32: each split's attention, query head by query head
    log_sums: torch.Tensor  # [num_partials] float32: log2 of the split's sum of exponentials
    arrivals: torch.Tensor  # [num_rows * num_kv_heads] int32: splits done; 0 between calls

    def check(self, num_rows: int, num_heads: int, num_kv_heads: int, head_dim: int, parts_per_row: int) -> None:
        """Raises ValueError if a call of this shape needs more."""
        num_partials = num_rows * num_heads * parts_per_row
        if self.log_sums.numel() < num_partials or self.partials.numel() < num_partials * head_dim:
            raise ValueError(f"a workspace of {self.log_sums.numel()} partial results: {num_partials} needed")
        if self.arrivals.numel() < num_rows * num_kv_heads:
            raise ValueError(f"a workspace of {self.arrivals.numel()} counters: {num_rows * num_kv_heads} needed")


def decode_workspace(
    num_rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    max_keys: int,
    device: torch.device,
) -> DecodeWorkspace:
    """Memory for calls of up to `num_rows` rows whose block tables hold up to `max_keys` keys each, shared or not."""
    sms = num_sms(device)
    heads = num_heads, num_kv_heads

    def parts_per_row(rows: int) -> int:
        config = decode_config(rows, *heads, head_dim, dtype, max_keys, sms)
        return config.num_splits + max_prefix_parts(rows, *heads, sms)

    # Fewer rows are split into more parts.
    num_partials = max(rows * num_heads * parts_per_row(rows) for rows in range(1, num_rows + 1))
    return DecodeWorkspace(
        partials=torch.empty(num_partials * head_dim, dtype=torch.float32, device=device),
        log_sums=torch.empty(num_partials, dtype=torch.float32, device=device),
        arrivals=torch.zeros(num_rows * num_kv_heads, dtype=torch.int32, device=device),
    )


@triton.jit
def meet_splits(
    attention: tl.tensor,  # [group_padded, head_dim_padded] float32: this split's
    log_sums: tl.tensor,  # [group_padded] float32
    num_done: tl.tensor,  # parts of this row that are in the workspace already, in front of its splits'
    split: tl.tensor,
    num_active: tl.tensor,  # splits of this row; with what is done two or more
    partials_ptr: tl.tensor,  # of this row and KV head: [parts_per_row, group, head_dim]
    log_sums_ptr: tl.tensor,  # the same: [parts_per_row, group]
    arrivals_ptr: tl.tensor,  # the same: one
    out_ptr: tl.tensor,  # the same: [group, head_dim]
    group: tl.constexpr,
    head_dim: tl.constexpr,
    heads_per_tile: tl.constexpr,
    splits_per_tile: tl.constexpr,
) -> None:
    """Leaves a split's part in the workspace; the last of the row and KV head to arrive merges all into `out`."""
    heads = tl.arange(0, attention.shape[0])
    dims = tl.arange(0, attention.shape[1])
    partial = (num_done + split) * group + heads
    is_real = (heads < group)[:, None] & (dims < head_dim)[None, :]
    tl.store(partials_ptr + partial[:, None] * head_dim + dims[None, :], attention, mask=is_real)
    tl.store(log_sums_ptr + partial, log_sums, mask=heads < group)
    # All threads have stored before one of them announces it.
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu")
    if arrived == num_active - 1:
        tl.store(arrivals_ptr, 0)
        merge_splits(
            partials_ptr,
            log_sums_ptr,
            out_ptr,
            num_done + num_active,
            group,
            group,
            head_dim,
            attention.shape[1],
            heads_per_tile,
            splits_per_tile,
        )


@triton.jit
def merge_splits(
    partials_ptr: tl.tensor,
    log_sums_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_active: tl.tensor,
    split_stride: tl.constexpr,  # heads from one split's to the next one's
    group: tl.constexpr,
    head_dim: tl.constexpr,
    head_dim_padded: tl.constexpr,
    heads_per_tile: tl.constexpr,
    splits_per_tile: tl.constexpr,
) -> None:
    """The heads of the group at once: one wait for a whole tile."""
    heads = tl.arange(0, heads_per_tile)
    dims = tl.arange(0, head_dim_padded)
    is_head = heads < group
    top = tl.full([heads_per_tile], -float("inf"), dtype=tl.float32)
    total = tl.zeros([heads_per_tile], dtype=tl.float32)
    acc = tl.zeros([heads_per_tile, head_dim_padded], dtype=tl.float32)
    for first in range(0, num_active, splits_per_tile):
        splits = first + tl.arange(0, splits_per_tile)
        index = splits[:, None] * split_stride + heads[None, :]
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
