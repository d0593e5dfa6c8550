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
from .simd import fma, max_of, select_greater, splat_f32, sum_of
from .simd_memory import (
    line_size,
    load,
    load_lanes,
    prefetch,
    read_f32,
    read_i32,
    read_i64,
    store,
    store_sums,
    write_f32,
)

Tensor = torch.Tensor

_ROTATE_NS = 0.5  # for each element, about
_KEY_NS = 0.3  # for each key and sixteen of a head's dimensions, about

# Addresses of tensors, their sizes, the kind of their elements, then the rows to work on: every kernel's arguments.


@njit(cache=True, nogil=True)
def _rotate(source, at, cos, sin, angle, half, target, to, like):
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
def _rope_and_cache(
    qkv,
    cos,
    sin,
    q,
    k_cache,
    v_cache,
    kv_indices,
    num_heads,
    num_kv_heads,
    head_dim,
    like,
    start,
    end,
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
def _fetch(place, index, size, like):
    """Has the core read ahead: it does not foresee where the next block lies."""
    for i in range(0, size, line_size(like)):
        prefetch(place, index + i, like)


@njit(cache=True, nogil=True)
def _score_block(q, keys, key, stride, head_dim, num_keys, scores, start, like):
    """scores[start:] of a block's keys for one head. q: float32, padded with zeros to whole vectors."""
    whole, kind = head_dim // 16 * 16, np.float32(0)
    for j in range(0, num_keys - 3, 4):
        a = b = c = d = splat_f32(0.0)
        for i in range(0, whole, 16):
            part = load(q, i, kind)
            a = fma(part, load(keys, key + i, like), a)
            b = fma(part, load(keys, key + stride + i, like), b)
            c = fma(part, load(keys, key + 2 * stride + i, like), c)
            d = fma(part, load(keys, key + 3 * stride + i, like), d)
        if whole < head_dim:
            part = load(q, whole, kind)
            a = fma(part, _rest_of(keys, key, head_dim, like), a)
            b = fma(part, _rest_of(keys, key + stride, head_dim, like), b)
            c = fma(part, _rest_of(keys, key + 2 * stride, head_dim, like), c)
            d = fma(part, _rest_of(keys, key + 3 * stride, head_dim, like), d)
        store_sums(scores, start + j, a, b, c, d)
        key += 4 * stride
    for j in range(num_keys // 4 * 4, num_keys):
        a = splat_f32(0.0)
        for i in range(0, head_dim, 16):
            a = fma(load(q, i, kind), load_up_to(keys, key + i, key + head_dim, like), a)
        write_f32(scores, start + j, sum_of(a))
        key += stride


@njit(cache=True, nogil=True)
def _rest_of(place, index, head_dim, like):
    """The dimensions behind the last whole vector."""
    return load_lanes(place, index + head_dim // 16 * 16, 0, head_dim % 16, splat_f32(0.0), like)


@njit(cache=True, nogil=True)
def _softmax(scores, num_keys):
    """Leaves exp(score - the greatest) of one head's scores, which fill whole vectors; returns their sum."""
    like, infinite = np.float32(0), splat_f32(-np.inf)
    if num_keys % 16:
        last = num_keys // 16 * 16
        store(scores, last, load_lanes(scores, last, 0, num_keys - last, infinite, like), like)
    highest = infinite
    for i in range(0, num_keys, 16):
        score = load(scores, i, like)
        highest = select_greater(score, highest, score, highest)
    highest = splat_f32(max_of(highest))
    total = splat_f32(0.0)
    for i in range(0, num_keys, 16):
        weights = exp(load(scores, i, like) - highest)
        store(scores, i, weights, like)
        total = total + weights
    return sum_of(total)


@njit(cache=True, nogil=True)
def _add_block(weights, start, values, value, stride, head_dim, num_keys, sums, like):
    """sums += the weighted values of a block for one head."""
    kind = np.float32(0)
    for i in range(0, head_dim, 32):
        # Two keys at a time in sums of their own, which need not wait for each other.
        first, second = value + i, value + min(i + 16, (head_dim - 1) // 16 * 16)
        end = value + head_dim
        a, b = load(sums, first - value, kind), load(sums, second - value, kind)
        c = d = splat_f32(0.0)
        for j in range(0, num_keys - 1, 2):
            weight, other = splat_f32(read_f32(weights, start + j)), splat_f32(read_f32(weights, start + j + 1))
            a = fma(load_up_to(values, first, end, like), weight, a)
            b = fma(load_up_to(values, second, end, like), weight, b)
            c = fma(load_up_to(values, first + stride, end + stride, like), other, c)
            d = fma(load_up_to(values, second + stride, end + stride, like), other, d)
            first, second, end = first + 2 * stride, second + 2 * stride, end + 2 * stride
        if num_keys % 2:
            weight = splat_f32(read_f32(weights, start + num_keys - 1))
            a = fma(load_up_to(values, first, end, like), weight, a)
            b = fma(load_up_to(values, second, end, like), weight, b)
        store(sums, i, a + c, kind)
        if i + 16 < head_dim:
            store(sums, i + 16, b + d, kind)


@njit(cache=True, nogil=True)
def _attend_token(q, at, out, table, num_keys, following, caches, shape, num_heads, scale, scratch, like):
    """All heads of one query. They go through the blocks together, so that memory is read in the order it lies in.

    `following`: the block of keys that is read next; -1 if the blocks have just been read, and are not to be fetched.
    """
    (k_cache, v_cache), (block_size, num_kv_heads, head_dim), kind = caches, shape, np.float32(0)
    queries, sums, scores, totals, width, room = scratch
    group, stride, part = num_heads // num_kv_heads, num_kv_heads * head_dim, block_size * head_dim
    for head in range(num_heads):
        for i in range(0, head_dim, 16):
            query = load_up_to(q, at + head * head_dim + i, at + (head + 1) * head_dim, like)
            store(queries, head * width + i, query * splat_f32(scale), kind)
            store(sums, head * width + i, splat_f32(0.0), kind)
    num_blocks = -(-num_keys // block_size)
    for b in range(num_blocks):
        block, keys_left = read_i32(table, b) * block_size * stride, min(block_size, num_keys - b * block_size)
        ahead = read_i32(table, (b + 1) % num_blocks) * block_size * stride
        for kv_head in range(num_kv_heads):
            if following >= 0:
                _fetch(k_cache if b + 1 < num_blocks else v_cache, ahead + kv_head * part, part, like)
            for head in range(kv_head * group, (kv_head + 1) * group):
                key, row = block + kv_head * head_dim, head * room + b * block_size
                _score_block(queries + 4 * head * width, k_cache, key, stride, head_dim, keys_left, scores, row, like)
    for head in range(num_heads):
        write_f32(totals, head, _softmax(scores + 4 * head * room, num_keys))
    for b in range(num_blocks):
        block, keys_left = read_i32(table, b) * block_size * stride, min(block_size, num_keys - b * block_size)
        ahead = (read_i32(table, b + 1) if b + 1 < num_blocks else following) * block_size * stride
        for kv_head in range(num_kv_heads):
            if following >= 0:
                _fetch(v_cache if b + 1 < num_blocks else k_cache, ahead + kv_head * part, part, like)
            value = block + kv_head * head_dim
            for head in range(kv_head * group, (kv_head + 1) * group):
                row, total = head * room + b * block_size, sums + 4 * head * width
                _add_block(scores, row, v_cache, value, stride, head_dim, keys_left, total, like)
    for head in range(num_heads):
        share, to = splat_f32(np.float32(1.0) / read_f32(totals, head)), at + head * head_dim
        for i in range(0, head_dim, 16):
            store_up_to(out, to + i, to + head_dim, load(sums, head * width + i, kind) * share, like)


@njit(cache=True, nogil=True)
def _attend(
    q, k_cache, v_cache, out, tables, slots, starts, positions, num_rows, max_blocks, num_heads, shape, scale, like,
    start, end,
):  # fmt: skip
    """Of tokens [start, end)."""
    width, room = -(-shape[2] // 16) * 16, -(-_longest(positions, start, end) // 16) * 16
    memory = np.empty(num_heads * (2 * width + room + 1), dtype=np.float32)
    queries = memory.ctypes.data
    sums = queries + 4 * num_heads * width
    scores = sums + 4 * num_heads * width
    scratch = queries, sums, scores, scores + 4 * num_heads * room, width, room
    for row in range(num_rows):
        table = tables + 4 * max_blocks * read_i64(slots, row)
        following = read_i32(tables + 4 * max_blocks * read_i64(slots, min(row + 1, num_rows - 1)), 0)
        for token in range(max(read_i32(starts, row), start), min(read_i32(starts, row + 1), end)):
            num_keys, at = read_i64(positions, token) + 1, token * num_heads * shape[2]
            caches = k_cache, v_cache
            _attend_token(q, at, out, table, num_keys, following, caches, shape, num_heads, scale, scratch, like)
            following = -1
    memory[0] = 0.0  # numba frees an array behind its last use, and an address of it is none


@njit(cache=True, nogil=True)
def _longest(positions, start, end):
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
