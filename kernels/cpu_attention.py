"""Attention of a CPU straight from the blocks of the cache: rotates queries and keys, caches, attends.

Each query is taken by itself, one head after the other: scores, softmax, the sum of values. That reads keys and values
where they lie, and is fast while they are in the core's cache. Scores and sums are float32 throughout.
Twins: reference.rope_and_cache, reference.attend.
"""

import numpy as np
import torch
from numba import njit

from .batch import AttentionBatch
from .cpu_launch import LIKE, KernelThreads, address
from .cpu_math import exp
from .cpu_pointwise import load_up_to, store_up_to
from .simd import fma, load, max_of, read_i32, read_i64, select_greater, splat_f32, store, sum_of

Tensor = torch.Tensor

_ROTATE_NS = 0.5  # for each element, about
_KEY_NS = 0.3  # for each key and sixteen of a head's dimensions, about

# Addresses of tensors, their sizes, the kind of their elements, then the rows to work on: every kernel's arguments.


@njit(cache=True, nogil=True)
def _rotate(source, at, cos, sin, angle, half, target, to, like):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """One head, whose position's cos and sin begin at `angle`; the first half of sin is negated."""
    for i in range(0, half, 16):
        first = load_up_to(source, at + i, at + half, like)
        second = load_up_to(source, at + half + i, at + 2 * half, like)
        cosine = load_up_to(cos, angle + i, angle + half, like)
        sine = load_up_to(sin, angle + i, angle + half, like)
        store_up_to(target, to + i, to + half, fma(second, sine, first * cosine), like)
        cosine = load_up_to(cos, angle + half + i, angle + 2 * half, like)
        sine = load_up_to(sin, angle + half + i, angle + 2 * half, like)
        store_up_to(target, to + half + i, to + 2 * half, fma(first, sine, second * cosine), like)


@njit(cache=True, nogil=True)
def _rope_and_cache(  # type: ignore[no-untyped-def]  # noqa: ANN202
    qkv, cos, sin, q, k_cache, v_cache, kv_indices, num_heads, num_kv_heads, head_dim, like, start, end  # noqa: ANN001
):
    """Of tokens [start, end)."""
    half, size = head_dim // 2, num_kv_heads * head_dim
    for token in range(start, end):
        source = token * (num_heads + 2 * num_kv_heads) * head_dim
        target = token * num_heads * head_dim
        for head in range(num_heads):
            at, to = source + head * head_dim, target + head * head_dim
            _rotate(qkv, at, cos, sin, token * head_dim, half, q, to, like)
        source += num_heads * head_dim
        target = read_i64(kv_indices, token) * size
        for head in range(num_kv_heads):
            at, to = source + head * head_dim, target + head * head_dim
            _rotate(qkv, at, cos, sin, token * head_dim, half, k_cache, to, like)
        for i in range(0, size, 16):
            value = load_up_to(qkv, source + size + i, source + 2 * size, like)
            store_up_to(v_cache, target + i, target + size, value, like)


@njit(cache=True, nogil=True)
def _score_keys(q, keys, head, shape, table, num_keys, scores, like):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Scores of one row's keys; q: float32, padded with zeros to whole vectors."""
    block_size, num_heads, head_dim = shape
    whole = head_dim // 16 * 16
    for start in range(0, num_keys, block_size):
        key = (read_i32(table, start // block_size) * block_size * num_heads + head) * head_dim
        for j in range(start, min(start + block_size, num_keys)):
            total = splat_f32(0.0)
            for i in range(0, whole, 16):
                total = fma(load(q, i, np.float32(0)), load(keys, key + i, like), total)
            if whole < head_dim:
                rest = load_up_to(keys, key + whole, key + head_dim, like)
                total = fma(load(q, whole, np.float32(0)), rest, total)
            scores[j] = sum_of(total)
            key += num_heads * head_dim


@njit(cache=True, nogil=True)
def _softmax(scores, num_keys):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Leaves exp(score - the greatest) in `scores`, which has room for whole vectors; returns their sum."""
    memory, like = scores.ctypes.data, np.float32(0)
    scores[num_keys : -(-num_keys // 16) * 16] = -np.inf
    highest = splat_f32(-np.inf)
    for i in range(0, num_keys, 16):
        score = load(memory, i, like)
        highest = select_greater(score, highest, score, highest)
    highest = splat_f32(max_of(highest))
    total = splat_f32(0.0)
    for i in range(0, num_keys, 16):
        weights = exp(load(memory, i, like) - highest)
        store(memory, i, weights, like)
        total = total + weights
    return sum_of(total)


@njit(cache=True, nogil=True)
def _sum_values(weights, values, head, shape, table, num_keys, first, like):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """The weighted sums of 32 dimensions of one row's values from `first` on, two vectors."""
    block_size, num_heads, head_dim = shape
    stride = num_heads * head_dim
    second = min(first + 16, (head_dim - 1) // 16 * 16)
    # Two keys at a time in sums of their own, which need not wait for each other.
    a = b = c = d = splat_f32(0.0)
    for start in range(0, num_keys, block_size):
        value = (read_i32(table, start // block_size) * block_size * num_heads + head) * head_dim
        end = min(start + block_size, num_keys)
        for j in range(start, end - 1, 2):
            weight, other_weight, other = splat_f32(weights[j]), splat_f32(weights[j + 1]), value + stride
            a = fma(load_up_to(values, value + first, value + head_dim, like), weight, a)
            b = fma(load_up_to(values, value + second, value + head_dim, like), weight, b)
            c = fma(load_up_to(values, other + first, other + head_dim, like), other_weight, c)
            d = fma(load_up_to(values, other + second, other + head_dim, like), other_weight, d)
            value = other + stride
        if (end - start) % 2:
            weight = splat_f32(weights[end - 1])
            a = fma(load_up_to(values, value + first, value + head_dim, like), weight, a)
            b = fma(load_up_to(values, value + second, value + head_dim, like), weight, b)
    return a + c, b + d


@njit(cache=True, nogil=True)
def _attend(  # type: ignore[no-untyped-def]  # noqa: ANN202
    q, k_cache, v_cache, out, tables, slots, starts, positions, num_rows, max_blocks, num_heads, shape, scale, like,  # noqa: ANN001
    start, end,  # noqa: ANN001
):  # fmt: skip
    """Of tokens [start, end)."""
    _, num_kv_heads, head_dim = shape
    scores = np.empty(_longest(positions, start, end) + 16, dtype=np.float32)
    query = np.zeros(-(-head_dim // 16) * 16, dtype=np.float32)
    for row in range(num_rows):
        table = tables + 4 * max_blocks * read_i64(slots, row)
        for token in range(max(read_i32(starts, row), start), min(read_i32(starts, row + 1), end)):
            num_keys = read_i64(positions, token) + 1
            for head in range(num_heads):
                at, kv_head = (token * num_heads + head) * head_dim, head // (num_heads // num_kv_heads)
                for i in range(0, head_dim, 16):
                    scaled = load_up_to(q, at + i, at + head_dim, like) * splat_f32(scale)
                    store(query.ctypes.data, i, scaled, np.float32(0))
                _score_keys(query.ctypes.data, k_cache, kv_head, shape, table, num_keys, scores, like)
                share = splat_f32(1.0 / _softmax(scores, num_keys))
                for i in range(0, head_dim, 32):
                    a, b = _sum_values(scores, v_cache, kv_head, shape, table, num_keys, i, like)
                    store_up_to(out, at + i, at + head_dim, a * share, like)
                    if i + 16 < head_dim:
                        store_up_to(out, at + i + 16, at + head_dim, b * share, like)


@njit(cache=True, nogil=True)
def _longest(positions, start, end):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    longest = 0
    for token in range(start, end):
        longest = max(longest, read_i64(positions, token) + 1)
    return longest


def rope_and_cache(
    threads: KernelThreads,
    qkv: Tensor,
    rope: tuple[Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    kv_indices: Tensor,
    num_heads: int,
) -> Tensor:
    """As the reference, for contiguous float32 or bfloat16."""
    num_tokens, num_all_heads, head_dim = qkv.shape
    assert head_dim % 2 == 0, f"head_dim is {head_dim}; heads are rotated in two halves"
    q = qkv.new_empty((num_tokens, num_heads, head_dim))
    places = (*map(address, rope), q.data_ptr(), *map(address, cache), address(kv_indices))
    args = (address(qkv), *places, num_heads, cache[0].shape[2], head_dim, LIKE[qkv.dtype])
    threads.run(_rope_and_cache, args, num_tokens, num_tokens * num_all_heads * head_dim * _ROTATE_NS)
    return q


def attend(
    threads: KernelThreads, q: Tensor, cache: tuple[Tensor, Tensor], batch: AttentionBatch, scale: float
) -> Tensor:
    """As the reference, for contiguous float32 or bfloat16."""
    _, num_heads, head_dim = q.shape
    out = torch.empty_like(q)
    rows = address(batch.block_tables), address(batch.slots), address(batch.query_starts), address(batch.positions)
    sizes = batch.num_rows, batch.block_tables.shape[1], num_heads, tuple(cache[0].shape[1:])
    args = (address(q), *map(address, cache), out.data_ptr(), *rows, *sizes, scale, LIKE[q.dtype])
    costs = num_heads * head_dim / 16 * _KEY_NS
    threads.run(_attend, args, len(q), costs * len(q) * 100)
    return out
