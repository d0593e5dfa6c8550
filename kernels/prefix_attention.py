"""Attention of many decodes to a prefix that they share, read once for a tile of them (cascade attention).

A decode attends to its prefix and to the rest of its keys apart: with the attention a_s and the log-sum-exp L_s of each
part s, the whole is sum_s 2^(L_s) a_s / sum_s 2^(L_s). Here are the parts of prefixes (Hydragen, arXiv 2402.05099): a
program takes the query heads of one KV head of a tile of sequences, so that their scores are one matrix product, and
some of the keys. What it finds lies where the splits of kernels/decode_attention.py leave theirs, in front of those;
the last of these to arrive merges all.

Which program takes what is in the plan of the step (kernels/shared_prefixes.py).
"""

import triton
import triton.language as tl

from .chunk_attention import attend_keys
from .fp8_cache import SMALLEST_SCALE, fit_queries
from .launch import Launch
from .shared_prefixes import JOB_SIZE, PrefixJobs


@triton.jit(
    do_not_specialize=["table_stride", "parts_per_row"],
    do_not_specialize_on_alignment=["cos_ptr", "sin_ptr", "jobs_ptr", "rows_ptr"],
)
def _prefix_kernel(
    qkv_ptr: tl.tensor,  # [num_rows, num_heads + 2 * num_kv_heads, head_dim]
    cos_ptr: tl.tensor,  # [num_rows, 1, head_dim]
    sin_ptr: tl.tensor,  # the same, the first half negated
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    scales_ptr: tl.tensor,  # of an FP8 cache; None beside another
    block_tables_ptr: tl.tensor,
    jobs_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    partials_ptr: tl.tensor,  # [num_rows, num_kv_heads, parts_per_row, group, head_dim]
    log_sums_ptr: tl.tensor,  # [num_rows, num_kv_heads, parts_per_row, group]
    log2_scale: tl.tensor,  # scale * log2(e): exponents are of 2
    qkv_stride: tl.tensor,
    table_stride: tl.tensor,
    parts_per_row: tl.tensor,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,  # query heads of a KV head
    head_dim: tl.constexpr,
    head_dim_padded: tl.constexpr,
    block_size: tl.constexpr,
    scale_stride: tl.constexpr,
    job_size: tl.constexpr,
    tile_rows: tl.constexpr,
    keys_per_tile: tl.constexpr,
) -> None:
    is_fp8: tl.constexpr = scales_ptr is not None
    kv_head = tl.program_id(0)
    job_ptr = jobs_ptr + tl.program_id(1) * job_size
    first_row = tl.load(job_ptr)
    num_rows = tl.load(job_ptr + 1)
    slot = tl.load(job_ptr + 2)
    start = tl.load(job_ptr + 3)
    end = tl.load(job_ptr + 4)
    part = tl.load(job_ptr + 5)

    in_tile = tl.arange(0, tile_rows)
    sequences, heads = in_tile // group, in_tile % group
    dims = tl.arange(0, head_dim_padded)
    is_row = sequences < num_rows
    is_real = is_row[:, None] & (dims < head_dim)[None, :]
    rows = tl.load(rows_ptr + first_row + sequences, mask=is_row, other=0).to(tl.int64)
    half: tl.constexpr = head_dim // 2
    partner_dims = tl.where(dims < half, dims + half, dims - half)
    head_ptrs = qkv_ptr + (rows * qkv_stride + (kv_head * group + heads) * head_dim)[:, None]
    q = tl.load(head_ptrs + dims[None, :], mask=is_real, other=0.0)
    partners = tl.load(head_ptrs + partner_dims[None, :], mask=is_real, other=0.0)
    in_rope = rows[:, None] * head_dim + dims[None, :]
    cos = tl.load(cos_ptr + in_rope, mask=is_real, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + in_rope, mask=is_real, other=0.0).to(tl.float32)
    # Computed in float32 and rounded once, in the order of `rope_and_cache`.
    q = tl.fma(partners.to(tl.float32), sin, q.to(tl.float32) * cos).to(q.dtype)

    top = tl.full([tile_rows], -float("inf"), dtype=tl.float32)
    total = tl.zeros([tile_rows], dtype=tl.float32)
    acc = tl.zeros([tile_rows, head_dim_padded], dtype=tl.float32)
    unit = total  # of acc, in FP8: follows the largest scale of the values in it
    if is_fp8:
        scales_ptr += kv_head * block_size
        unit = tl.full([], SMALLEST_SCALE, dtype=tl.float32)
        q, q_scales = fit_queries(q)
        log2_scale *= q_scales
    # Whole tiles of keys, all of which every row sees.
    top, total, acc, unit = attend_keys(
        q,
        top,
        total,
        acc,
        unit,
        k_cache_ptr + kv_head * head_dim,
        v_cache_ptr + kv_head * head_dim,
        scales_ptr,
        block_tables_ptr + slot * table_stride,
        in_tile,
        start,
        end,
        log2_scale,
        num_kv_heads,
        head_dim,
        head_dim_padded,
        block_size,
        scale_stride,
        keys_per_tile,
        False,
    )
    if is_fp8:
        acc *= unit
    place = ((rows * num_kv_heads + kv_head) * parts_per_row + part) * group + heads
    tl.store(partials_ptr + place[:, None] * head_dim + dims[None, :], acc / total[:, None], mask=is_real)
    tl.store(log_sums_ptr + place, top + tl.log2(total), mask=is_row)


# What both launches take.
_DECODE_ARGUMENTS = (
    "qkv_ptr",
    "cos_ptr",
    "sin_ptr",
    "k_cache_ptr",
    "v_cache_ptr",
    "scales_ptr",
    "block_tables_ptr",
    "partials_ptr",
    "log_sums_ptr",
    "log2_scale",
    "qkv_stride",
    "table_stride",
    "parts_per_row",
    "num_kv_heads",
    "group",
    "head_dim",
    "head_dim_padded",
    "block_size",
    "scale_stride",
)


def prefix_attention_launch(decodes: Launch, jobs: PrefixJobs) -> Launch:
    """What goes in front of `decodes`, the launch of kernels/decode_attention.py that was planned with `jobs`."""
    tile = jobs.tile
    arguments = {name: decodes.arguments[name] for name in _DECODE_ARGUMENTS} | {
        "jobs_ptr": jobs.jobs,
        "rows_ptr": jobs.rows,
        "job_size": JOB_SIZE,
        "tile_rows": tile.rows,
        "keys_per_tile": tile.keys,
    }
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return Launch(_prefix_kernel, (arguments["num_kv_heads"], len(jobs.jobs), 1), arguments, options)
