"""Rotary embedding of queries and keys and the write into the paged KV cache, in one Triton kernel.

A head x at a position with angles a becomes x * cos(a) + roll(x, head_dim / 2) * sin(a), the first half of sin negated
(RoFormer, 3.2.2; the halves paired as in Llama's checkpoints). Half precisions are computed in float32 and rounded
once. The twin is `apply_rope`, then `write_kv`, of kernels/reference.py.
"""

import torch
import triton
import triton.language as tl

from .fp8_cache import block_stride, check_dtype, largest, quantise, scales_of
from .launch import Launch
from .pdl import starts_early, wait_for_earlier_kernels

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Heads of one program. Few for few tokens: one token of an 8B model's 48 heads then is six programs. More for many:
# measured on an H200, 8,192 tokens of 48 heads take 60 us with 8 heads, 54 with 16.
_HEAD_BLOCK = 8
_WIDE_HEAD_BLOCK = 16
_MANY_TOKENS = 256
_MAX_HEAD_DIM = 256
_MAX_HEADS = _HEAD_BLOCK * 65535  # CUDA's limit of a grid's second axis


# Where a step's chunks start in its tensors changes with the number of decodes; the kernel must not.
@triton.jit(do_not_specialize_on_alignment=["kv_indices_ptr"])
def _rope_and_cache_kernel(
    qkv_ptr: tl.tensor,  # [num_tokens, num_heads + 2 * num_kv_heads, 2 * half]
    cos_ptr: tl.tensor,  # [num_tokens, 1, 2 * half]
    sin_ptr: tl.tensor,  # the same
    q_ptr: tl.tensor,  # [num_tokens, num_heads, 2 * half]
    k_cache_ptr: tl.tensor,  # [num_slots, num_kv_heads, 2 * half]
    v_cache_ptr: tl.tensor,  # the same
    scales_ptr: tl.tensor,  # of an FP8 cache; None beside another
    kv_indices_ptr: tl.tensor,  # [num_tokens] int64; negative: nothing is written
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    half: tl.constexpr,  # head_dim / 2
    head_block: tl.constexpr,
    half_block: tl.constexpr,  # the power of two that holds half
    block_size: tl.constexpr,  # of an FP8 cache
    scale_stride: tl.constexpr,  # the same: words from a block's to the next one's
    pdl: tl.constexpr,
) -> None:
    dim: tl.constexpr = 2 * half
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * head_block + tl.arange(0, head_block))[:, None]
    column = tl.arange(0, half_block)[None, :]
    fits = column < half
    is_key = (head >= num_heads) & (head < num_heads + num_kv_heads)
    is_value = (head >= num_heads + num_kv_heads) & (head < num_heads + 2 * num_kv_heads)
    wait_for_earlier_kernels(pdl)
    slot = tl.load(kv_indices_ptr + token)

    low_ptrs = qkv_ptr + token * ((num_heads + 2 * num_kv_heads) * dim) + head * dim + column
    mask = fits & (head < num_heads + 2 * num_kv_heads)
    low = tl.load(low_ptrs, mask, other=0.0)
    high = tl.load(low_ptrs + half, mask, other=0.0)
    angles = token * dim + column
    low_cos = tl.load(cos_ptr + angles, fits, other=0.0).to(tl.float32)
    high_cos = tl.load(cos_ptr + angles + half, fits, other=0.0).to(tl.float32)
    low_sin = tl.load(sin_ptr + angles, fits, other=0.0).to(tl.float32)
    high_sin = tl.load(sin_ptr + angles + half, fits, other=0.0).to(tl.float32)

    x, y = low.to(tl.float32), high.to(tl.float32)
    # The order of torch's addcmul on a GPU: the second product is fused with the sum.
    rotated_low = tl.fma(y, low_sin, x * low_cos).to(low.dtype)
    rotated_high = tl.fma(x, high_sin, y * high_cos).to(high.dtype)

    q_ptrs = q_ptr + token * (num_heads * dim) + head * dim + column
    tl.store(q_ptrs, rotated_low, fits & (head < num_heads))
    tl.store(q_ptrs + half, rotated_high, fits & (head < num_heads))
    if scales_ptr is not None:
        # A head's two halves lie in two tensors.
        is_rotated = head < num_heads + num_kv_heads
        low = tl.where(is_rotated, rotated_low, low)
        high = tl.where(is_rotated, rotated_high, high)
        scales = scales_of(tl.maximum(largest(low), largest(high)))
        low = quantise(low, scales)
        high = quantise(high, scales)
        rotated_low, rotated_high = low, high
        kv_head = tl.where(is_key, head - num_heads, head - num_heads - num_kv_heads)
        word = slot // block_size * scale_stride + kv_head * block_size + slot % block_size
        # Keys and values are other programs' too: each stores its half of the word.
        half_ptrs = scales_ptr.to(tl.pointer_type(tl.bfloat16)) + word * 2 + is_value.to(tl.int32)
        tl.store(half_ptrs, scales.to(tl.bfloat16)[:, None], (is_key | is_value) & (slot >= 0))
    cached = slot * (num_kv_heads * dim) + column
    k_ptrs = k_cache_ptr + cached + (head - num_heads) * dim
    is_key = fits & is_key & (slot >= 0)
    tl.store(k_ptrs, rotated_low, is_key)
    tl.store(k_ptrs + half, rotated_high, is_key)
    v_ptrs = v_cache_ptr + cached + (head - num_heads - num_kv_heads) * dim
    is_value = fits & is_value & (slot >= 0)
    tl.store(v_ptrs, low, is_value)
    tl.store(v_ptrs + half, high, is_value)


def rope_and_cache(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_indices: torch.Tensor,
    num_heads: int,
    out: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotates queries and keys, writes keys and values to the cache, returns the queries: `out`, or new memory.

    qkv: [num_tokens, num_heads + 2 * num_kv_heads, head_dim], the heads of queries, keys and values in this order;
    cos, sin: [num_tokens, 1, head_dim], the first half of sin negated; caches: [num_blocks, block_size, num_kv_heads,
    head_dim]; kv_indices: [num_tokens] int64, block_id * block_size + offset, or negative for a padding row, whose key
    and value are dropped; out: [num_tokens, num_heads, head_dim]. All contiguous. scales: an FP8 cache's
    (kernels/fp8_cache.py), written too.

    Raises ValueError for tensors that the kernel does not take.
    """
    q = qkv.new_empty(len(qkv), num_heads, qkv.shape[-1]) if out is None else out
    launch = rope_and_cache_launch(qkv, cos, sin, k_cache, v_cache, kv_indices, num_heads, q, scales)
    if len(qkv):
        launch.run()
    return q


def rope_and_cache_launch(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_indices: torch.Tensor,
    num_heads: int,
    out: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> Launch:
    """What rope_and_cache launches: to be run only if there are tokens."""
    check_qkv(qkv, cos, sin, kv_indices, k_cache, v_cache, scales, num_heads)
    num_tokens, all_heads, head_dim = qkv.shape
    if out.shape != (num_tokens, num_heads, head_dim) or out.dtype != qkv.dtype or not out.is_contiguous():
        raise ValueError(
            f"rope_and_cache: out must be {[num_tokens, num_heads, head_dim]}, {qkv.dtype} and contiguous, "
            f"not {list(out.shape)}, {out.dtype}, strides {out.stride()}"
        )
    half, pdl = head_dim // 2, starts_early(qkv.device, num_tokens)
    head_block = _HEAD_BLOCK if num_tokens < _MANY_TOKENS else _WIDE_HEAD_BLOCK
    arguments = {
        "qkv_ptr": qkv,
        "cos_ptr": cos,
        "sin_ptr": sin,
        "q_ptr": out,
        "k_cache_ptr": k_cache,
        "v_cache_ptr": v_cache,
        "scales_ptr": scales,
        "kv_indices_ptr": kv_indices,
        "num_heads": num_heads,
        "num_kv_heads": k_cache.shape[2],
        "half": half,
        "head_block": head_block,
        "half_block": triton.next_power_of_2(half),
        "block_size": 0 if scales is None else k_cache.shape[1],
        "scale_stride": block_stride(scales),
        "pdl": pdl,
    }
    grid = num_tokens, triton.cdiv(all_heads, head_block), 1
    return Launch(_rope_and_cache_kernel, grid, arguments, {"num_warps": 4, "launch_pdl": pdl})


def check_qkv(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_indices: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scales: torch.Tensor | None,
    num_heads: int,
) -> None:
    """Raises ValueError for tensors that `rope_and_cache` does not take."""
    _check_heads(qkv, k_cache, v_cache, num_heads)
    check_dtype(qkv.dtype, k_cache, v_cache, scales)
    _check_tokens(qkv, cos, sin, kv_indices)


def _check_heads(qkv: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, num_heads: int) -> None:
    if qkv.dtype not in _DTYPES:
        raise ValueError(f"rope_and_cache: qkv of one of {_DTYPES} is needed, not {qkv.dtype}")
    if qkv.dim() != 3 or k_cache.dim() != 4 or k_cache.shape != v_cache.shape or num_heads < 1:
        raise ValueError(
            f"rope_and_cache: qkv {list(qkv.shape)} of {num_heads} query heads and caches {list(k_cache.shape)}, "
            f"{list(v_cache.shape)} are not [num_tokens, heads, head_dim] and [num_blocks, block_size, heads, head_dim]"
        )
    if qkv.shape[1] != num_heads + 2 * k_cache.shape[2] or qkv.shape[2] != k_cache.shape[3]:
        raise ValueError(
            f"rope_and_cache: qkv {list(qkv.shape)} is not {num_heads} query heads and the keys and values "
            f"of a cache {list(k_cache.shape)}"
        )
    if qkv.shape[2] % 2 or not 0 < qkv.shape[2] <= _MAX_HEAD_DIM or qkv.shape[1] > _MAX_HEADS:
        raise ValueError(
            f"rope_and_cache: an even head_dim to {_MAX_HEAD_DIM} and {_MAX_HEADS} heads are supported, "
            f"not {qkv.shape[2]} and {qkv.shape[1]}"
        )
    if not (qkv.is_contiguous() and k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError(
            "rope_and_cache: qkv and caches must be contiguous; "
            f"their strides are {qkv.stride()}, {k_cache.stride()}, {v_cache.stride()}"
        )


def _check_tokens(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kv_indices: torch.Tensor) -> None:
    shape = (qkv.shape[0], 1, qkv.shape[2])
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != shape or table.dtype != qkv.dtype or not table.is_contiguous():
            raise ValueError(
                f"rope_and_cache: {name} must be {list(shape)}, {qkv.dtype} and contiguous, "
                f"not {list(table.shape)}, {table.dtype}, strides {table.stride()}"
            )
    if kv_indices.shape != shape[:1] or kv_indices.dtype != torch.int64 or not kv_indices.is_contiguous():
        raise ValueError(
            f"rope_and_cache: kv_indices must be [{shape[0]}] int64 and contiguous, "
            f"not {list(kv_indices.shape)}, {kv_indices.dtype}, strides {kv_indices.stride()}"
        )
