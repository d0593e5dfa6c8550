"""A KV cache in FP8 (e4m3), in which each token's key and value of each KV head have a scale of their own.

x is kept as q = x / s in e4m3, s being amax / 448 of the head, rounded up to a bfloat16: 448 is e4m3's largest number.
Scales come from what is kept, so they need no calibration, and nothing is ever out of range. Powers of two would divide
without rounding, but the largest numbers of a head, which count most, would no longer lie on 448: measured, 3 % more
error on normal numbers and 16 % more on heads with outliers. Scales in float32 have no less error than in bfloat16.

A layer's scales are [num_blocks, num_kv_heads, block_size] int32: side by side for the keys of a head, blocks any
stride apart. Of a word the lower half is the bfloat16 of the key, the upper half that of the value: four bytes are the
least that the hardware copies without a thread's help. The twins are `quantise` and `dequantise` of
kernels/reference.py.

Products on tensor cores take e4m3 as float16, for which Hopper has one instruction (for bfloat16 it takes five). Powers
of two make do with its range: queries are multiplied by one, and so are the weights of values, which have the values'
scales in them.
"""

import torch
import triton
import triton.language as tl

DTYPE = torch.float8_e4m3fn
_GATHERED_ROWS = 64
SMALLEST_SCALE = tl.constexpr(2.0**-112)


def check_dtype(dtype: torch.dtype, k_cache: torch.Tensor, v_cache: torch.Tensor, scales: torch.Tensor | None) -> None:
    """Raises ValueError unless the caches are of `dtype` without scales, or FP8 with theirs."""
    wanted = dtype if scales is None else DTYPE
    if k_cache.dtype != wanted or v_cache.dtype != wanted:
        raise ValueError(f"dtypes {k_cache.dtype} and {v_cache.dtype} of the caches: {wanted} is needed for both")
    if scales is None:
        return
    num_blocks, block_size, num_kv_heads, _ = k_cache.shape
    shape = (num_blocks, num_kv_heads, block_size)
    if scales.shape != shape or scales.dtype != torch.int32 or not scales[:1].is_contiguous():
        raise ValueError(
            f"scales {tuple(scales.shape)} of {scales.dtype} with strides {scales.stride()}: {shape} of int32 is "
            "needed, contiguous for each block"
        )


def block_stride(scales: torch.Tensor | None) -> int:
    """Words from one block's scales to the next one's, which may lie apart; 0 without scales."""
    return 0 if scales is None else scales.stride(0)


@triton.jit
def largest(heads: tl.tensor) -> tl.tensor:
    """[heads, dims] to [heads] float32."""
    return tl.max(tl.abs(heads.to(tl.float32)), 1)


@triton.jit
def scales_of(amax: tl.tensor) -> tl.tensor:
    """float32 that bfloat16 holds exactly: amax / 448, rounded up."""
    least: tl.constexpr = 2.0**-120  # so that 1 / s is finite
    bits = tl.maximum(amax * (1.0 / 448.0), least).to(tl.int32, bitcast=True)
    return ((bits + 0xFFFF) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def quantise(heads: tl.tensor, scales: tl.tensor) -> tl.tensor:
    """[heads, dims] and [heads] float32 to FP8."""
    return (heads.to(tl.float32) * tl.math.div_rn(1.0, scales)[:, None]).to(tl.float8e4nv)


@triton.jit
def scale_word(key_scale: tl.tensor, value_scale: tl.tensor) -> tl.tensor:
    return (key_scale.to(tl.int32, bitcast=True) >> 16) | value_scale.to(tl.int32, bitcast=True)


@triton.jit
def key_scales(words: tl.tensor) -> tl.tensor:
    """float32."""
    return (words << 16).to(tl.float32, bitcast=True)


@triton.jit
def value_scales(words: tl.tensor) -> tl.tensor:
    """float32."""
    return (words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def power_of_two(x: tl.tensor) -> tl.tensor:
    """The one not above x, a positive normal float32."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def inverse_power_of_two(powers: tl.tensor) -> tl.tensor:
    """1 / x of powers of two, without a division."""
    return (254 * 2**23 - powers.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def fit_queries(q: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Queries [queries, dims] as products with FP8 take them: float32, or scaled into float16's range without loss for
    all but the tiniest. And what their scores are to be multiplied by, [queries] float32."""
    unit = power_of_two(tl.maximum(largest(q), SMALLEST_SCALE))
    # The largest of a query comes to 2**13 or more, and products with 448 in 256 dimensions stay far below 2**127.
    fitted = q.to(tl.float32) * (inverse_power_of_two(unit) * 8192.0)[:, None]
    return fitted.to(tl.float32 if q.dtype == tl.float32 else tl.float16), unit * (1.0 / 8192.0)


@triton.jit
def split_pairs(pairs: tl.tensor, dtype: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Of words uint16, two numbers in FP8 each: the even ones, which lie lower, and the odd ones."""
    even = pairs.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    odd = (pairs >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return even.to(dtype), odd.to(dtype)


@triton.jit
def _gather_kernel(
    k_ptr: tl.tensor,  # [num_gathered, block_size, num_kv_heads, head_dim]
    v_ptr: tl.tensor,
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    block_ids_ptr: tl.tensor,  # [num_gathered] int32
    block_size: tl.constexpr,
    scale_stride: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    head_dim_padded: tl.constexpr,
    rows_per_program: tl.constexpr,  # a row is a head of a cell
) -> None:
    gathered = tl.program_id(0).to(tl.int64)
    block = tl.load(block_ids_ptr + gathered).to(tl.int64)
    rows = tl.program_id(1) * rows_per_program + tl.arange(0, rows_per_program)
    dims = tl.arange(0, head_dim_padded)
    is_row = rows < block_size * num_kv_heads
    is_real = is_row[:, None] & (dims < head_dim)[None, :]
    in_block = rows[:, None] * head_dim + dims[None, :]
    size: tl.constexpr = block_size * num_kv_heads * head_dim
    in_scales = rows % num_kv_heads * block_size + rows // num_kv_heads
    words = tl.load(scales_ptr + block * scale_stride + in_scales, mask=is_row, other=0)
    k = tl.load(k_cache_ptr + block * size + in_block, mask=is_real, other=0.0).to(tl.float32)
    v = tl.load(v_cache_ptr + block * size + in_block, mask=is_real, other=0.0).to(tl.float32)
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    tl.store(k_ptr + gathered * size + in_block, (k * key_scales(words)[:, None]).to(dtype), mask=is_real)
    tl.store(v_ptr + gathered * size + in_block, (v * value_scales(words)[:, None]).to(dtype), mask=is_real)


def gather_fp8_blocks(
    k_cache: torch.Tensor, v_cache: torch.Tensor, scales: torch.Tensor, block_ids: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of blocks in `dtype`, each [keys of whole blocks, num_kv_heads, head_dim].

    block_ids: [num_gathered] int32, contiguous. Raises ValueError for a cache that is not FP8.
    """
    check_dtype(dtype, k_cache, v_cache, scales)
    _, block_size, num_kv_heads, head_dim = k_cache.shape
    k, v = (
        torch.empty(len(block_ids) * block_size, num_kv_heads, head_dim, dtype=dtype, device=k_cache.device)
        for _ in range(2)
    )
    with torch.cuda.device_of(k_cache):
        _gather_kernel[(len(block_ids), triton.cdiv(block_size * num_kv_heads, _GATHERED_ROWS))](
            k,
            v,
            k_cache,
            v_cache,
            scales,
            block_ids,
            block_size=block_size,
            scale_stride=block_stride(scales),
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            head_dim_padded=triton.next_power_of_2(head_dim),
            rows_per_program=_GATHERED_ROWS,
        )
    return k, v
