"""Causal attention of prompt chunks over keys that lie in token order: chunks long enough to repay gathering the cache.

softmax(q k^T * scale) v, online and tile by tile (FlashAttention-2, arXiv 2307.08691, algorithm 1), as in
kernels/chunk_attention.py, which reads keys through block tables. Here tiles of keys are one box in memory each, which
Hopper's copy engine brings to shared memory without a thread's help. A program serves one tile of queries of one head;
the step's tiles are listed on the host, those with the most keys first, so that none of them is left for the end.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128)
# Two for each multiprocessor of an H200: with fewer programs, smaller ones fill it better.
_FILLING_PROGRAMS = 264


@dataclass(frozen=True, slots=True)
class TileConfig:
    """How the kernel is cut: Hopper's tensor cores want 64 queries for each 4 warps."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int
    max_registers: int | None  # a thread's


# Either way two programs share a multiprocessor: one multiplies while the other takes exponents. 128 queries read each
# key half as often; their 8 warps fit twice with 128 registers a thread.
_LARGE = TileConfig(128, 64, 8, 2, 128)
_SMALL = TileConfig(64, 64, 4, 2, None)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A row's query tokens, the last of its keys: [query_start, query_start + query_len) and
    [key_start, key_start + num_keys) of the tensors that are attended with."""

    query_start: int
    query_len: int
    key_start: int
    num_keys: int


@dataclass(frozen=True, slots=True)
class QueryTiles:
    """The work of one call of `contiguous_attention` for each head."""

    # [num_tiles, 5] int32, those with the most keys first: the tile's first query token, how many queries it has, its
    # row's first key, the position of its first query among the row's keys, the number of the row's keys.
    table: torch.Tensor
    config: TileConfig


def query_tiles(chunks: Sequence[Chunk], num_heads: int) -> QueryTiles:
    """The tiles of a step's chunks, on the CPU. num_heads: query heads of this rank."""
    large = num_heads * sum(-(-chunk.query_len // _LARGE.queries) for chunk in chunks)
    return cut(chunks, _LARGE if large >= _FILLING_PROGRAMS else _SMALL)


def cut(chunks: Sequence[Chunk], config: TileConfig) -> QueryTiles:
    """As query_tiles, into tiles of one's own choice."""
    step = config.queries
    tiles = [
        (chunk.query_start + i, min(step, chunk.query_len - i), chunk.key_start, position + i, chunk.num_keys)
        for chunk in chunks
        for position in (chunk.num_keys - chunk.query_len,)
        for i in range(0, chunk.query_len, step)
    ]
    tiles.sort(key=lambda tile: -tile[3])
    return QueryTiles(torch.tensor(tiles, dtype=torch.int32).view(-1, 5), config)


@triton.jit
def _take_keys(
    scores: tl.tensor,  # [queries, keys]
    log2_scale: tl.tensor,
    v: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The running maximum, sum and output with one more tile of keys in them."""
    # Scaled once more behind the maximum, not before it: scaling then is one instruction with the subtraction.
    new_top = tl.maximum(top, tl.max(scores, 1) * log2_scale)
    rescale = tl.exp2(top - new_top)
    weights = tl.exp2(scores * log2_scale - new_top[:, None])
    total = total * rescale + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None])
    return new_top, total, acc


@triton.jit
def _contiguous_kernel(
    out_ptr: tl.tensor,
    q_box: tl.tensor,  # descriptors of [num_tokens, num_heads * head_dim] and [num_keys, num_kv_heads * head_dim]
    k_box: tl.tensor,
    v_box: tl.tensor,
    v_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    log2_scale: tl.tensor,  # scale * log2(e): exponents are of 2
    out_stride: tl.tensor,
    v_stride: tl.tensor,
    group: tl.constexpr,  # query heads of a KV head
    head_dim: tl.constexpr,
    queries_per_tile: tl.constexpr,
    keys_per_tile: tl.constexpr,
) -> None:
    head = tl.program_id(0)
    tile_ptr = tiles_ptr + tl.program_id(1) * 5
    first_token = tl.load(tile_ptr)
    num_queries = tl.load(tile_ptr + 1)
    key_start = tl.load(tile_ptr + 2)
    first_position = tl.load(tile_ptr + 3)
    num_keys = tl.load(tile_ptr + 4)

    queries = tl.arange(0, queries_per_tile)
    dims = tl.arange(0, head_dim)
    column = head // group * head_dim
    q = q_box.load([first_token, head * head_dim])
    top = tl.full([queries_per_tile], -float("inf"), dtype=tl.float32)
    total = tl.zeros([queries_per_tile], dtype=tl.float32)
    acc = tl.zeros([queries_per_tile, head_dim], dtype=tl.float32)

    # Every query sees a key of the first tile that either loop takes, so no maximum is ever that of nothing.
    seen_by_all = (first_position + 1) // keys_per_tile * keys_per_tile
    for start in range(0, seen_by_all, keys_per_tile):
        k = k_box.load([key_start + start, column])
        v = v_box.load([key_start + start, column])
        top, total, acc = _take_keys(tl.dot(q, k.T), log2_scale, v, top, total, acc)
    for start in range(seen_by_all, tl.minimum(first_position + num_queries, num_keys), keys_per_tile):
        keys = start + tl.arange(0, keys_per_tile)
        k = k_box.load([key_start + start, column])
        # Behind the row's keys lies what may be no number, and would stay none under a weight of 0.
        v_ptrs = v_ptr + (key_start + keys).to(tl.int64)[:, None] * v_stride + column + dims[None, :]
        v = tl.load(v_ptrs, mask=(keys < num_keys)[:, None], other=0.0)
        is_seen = keys[None, :] <= (first_position + queries)[:, None]
        scores = tl.where(is_seen, tl.dot(q, k.T), -float("inf"))
        top, total, acc = _take_keys(scores, log2_scale, v, top, total, acc)

    tokens = (first_token + queries).to(tl.int64)
    out_ptrs = out_ptr + tokens[:, None] * out_stride + head * head_dim + dims[None, :]
    attention = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, attention, mask=(queries < num_queries)[:, None])


def contiguous_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: QueryTiles, scale: float, out: torch.Tensor
) -> torch.Tensor:
    """Causal attention of the queries that `tiles` names, written to their places in `out`; others are left alone.

    q, out: [num_tokens, num_heads, head_dim]; k, v: [num_keys, num_kv_heads, head_dim]; tokens any multiple of 16 bytes
    apart, so that views of a QKV product will do. tiles: their table on the device; scale: above 0.
    Returns `out`. Raises ValueError for shapes that the kernel does not take.
    """
    _check(q, k, v, out)
    table, config = tiles.table, tiles.config
    if table.dtype != torch.int32 or table.dim() != 2 or table.shape[1] != 5 or not table.is_contiguous():
        raise ValueError(f"tiles {tuple(table.shape)} of {table.dtype} are not what query_tiles makes")
    if not len(table):
        return out
    _, num_heads, head_dim = q.shape
    with torch.cuda.device_of(q):
        _contiguous_kernel[(num_heads, len(table))](
            out,
            _box(q, config.queries),
            _box(k, config.keys),
            _box(v, config.keys),
            v,
            table,
            scale * math.log2(math.e),
            out.stride(0),
            v.stride(0),
            group=num_heads // k.shape[1],
            head_dim=head_dim,
            queries_per_tile=config.queries,
            keys_per_tile=config.keys,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            maxnreg=config.max_registers,
        )
    return out


def _box(x: torch.Tensor, num_tokens: int) -> TensorDescriptor:
    """Of one head of `num_tokens` tokens."""
    shape = [x.shape[0], x.shape[1] * x.shape[2]]
    return TensorDescriptor(x, shape, [x.stride(0), 1], [num_tokens, x.shape[2]])


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
    num_heads, head_dim = q.shape[1:]
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype == out.dtype:
        raise ValueError(f"dtypes {q.dtype}, {k.dtype}, {v.dtype}, {out.dtype}: one of {DTYPES} for all")
    if head_dim not in HEAD_DIMS or k.shape[2] != head_dim:
        raise ValueError(f"head_dim {head_dim} of the queries, {k.shape[2]} of the keys: one of {HEAD_DIMS} for both")
    if k.shape != v.shape or out.shape != q.shape or num_heads % k.shape[1]:
        raise ValueError(f"shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}, {tuple(out.shape)}")
    for name, x in (("q", q), ("k", k), ("v", v), ("out", out)):
        if x.stride()[1:] != (head_dim, 1) or x.stride(0) * x.itemsize % 16 or x.data_ptr() % 16:
            raise ValueError(f"{name} with strides {x.stride()}: the heads of a token lie apart, or tokens oddly")
