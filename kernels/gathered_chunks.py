"""Attention of a step's prompt chunks over their keys gathered out of the paged cache: one plan a step for all layers.

Gathering reads and writes each key once; a chunk's queries read it once for each 128 of them. So chunks that bring many
queries for each key attend faster to a copy in token order (kernels/contiguous_attention.py), and others through their
block tables (kernels/chunk_attention.py).
"""

from dataclasses import dataclass, replace

import torch

from .batch import AttentionBatch
from .contiguous_attention import DTYPES, HEAD_DIMS, Chunk, QueryTiles, contiguous_attention, query_tiles
from .fp8_cache import gather_fp8_blocks

# Below this many chunk tokens the copy costs what it saves. Measured on an H200, copy included, against block tables:
# with 32 query heads 90 us of 93 for 2,048 tokens, 1,058 of 1,165 for 8,192; with 8 query heads 48 of 38, 275 of 302.
_MIN_TOKENS = 4096
# An FP8 cache is copied in the queries' dtype; through its block tables it is converted anew for each tile of queries.
# Measured on an H100 (32 heads): 10 us of 14 for 256 tokens, 1,029 of 2,483 for 8,192, 1,020 of 2,304 for 2,048 behind
# 14,336. What the copy may take follows from that.
_MIN_FP8_TOKENS = 256
_MAX_FP8_KEYS_PER_TOKEN = 16
# Keys for each chunk token: bounds the copy, so that a layer's MLP still needs the most memory of a step.
_MAX_KEYS_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class GatherPlan:
    """What all layers of a step share."""

    block_ids: torch.Tensor  # [num_blocks] int32: the chunks' blocks, row after row
    tiles: QueryTiles  # on the device; queries counted from the step's first token


def is_worth_gathering(batch: AttentionBatch, head_dim: int, dtype: torch.dtype, is_fp8: bool = False) -> bool:
    """Whether the chunk rows of `batch` attend faster to a copy of their keys. `dtype` is that of the queries, and of
    the cache unless `is_fp8`."""
    min_tokens = _MIN_FP8_TOKENS if is_fp8 else _MIN_TOKENS
    max_keys_per_token = _MAX_FP8_KEYS_PER_TOKEN if is_fp8 else _MAX_KEYS_PER_TOKEN
    num_tokens = batch.host_query_starts[-1] - batch.host_query_starts[batch.num_decode_rows]
    num_keys = sum(batch.host_seq_lens[batch.num_decode_rows :])
    takes = dtype in DTYPES and head_dim in HEAD_DIMS
    return takes and num_tokens >= min_tokens and num_keys <= max_keys_per_token * num_tokens


def plan_gather(batch: AttentionBatch, num_heads: int, block_size: int) -> GatherPlan:
    """For all chunk rows of `batch`, with one transfer to the device. num_heads: query heads of this rank."""
    rows = range(batch.num_decode_rows, batch.num_rows)
    num_blocks = torch.tensor([-(-batch.host_seq_lens[row] // block_size) for row in rows])
    first_blocks = num_blocks.cumsum(0) - num_blocks
    chunks = [
        Chunk(
            query_start=batch.host_query_starts[row],
            query_len=batch.host_query_starts[row + 1] - batch.host_query_starts[row],
            key_start=first_block * block_size,
            num_keys=batch.host_seq_lens[row],
        )
        for row, first_block in zip(rows, first_blocks.tolist(), strict=True)
    ]
    tiles = query_tiles(chunks, num_heads)
    block_rows = torch.tensor(rows).repeat_interleave(num_blocks)
    block_columns = torch.arange(len(block_rows)) - first_blocks.repeat_interleave(num_blocks)
    packed = torch.cat((tiles.table.flatten(), block_rows, block_columns)).to(torch.int32)
    if batch.slots.is_cuda:
        packed = packed.pin_memory()
    packed = packed.to(batch.slots.device, non_blocking=True)
    flat_table, block_rows, block_columns = packed.split((tiles.table.numel(), len(block_rows), len(block_rows)))
    block_ids = batch.block_tables[batch.slots[block_rows], block_columns]
    return GatherPlan(block_ids, replace(tiles, table=flat_table.view(-1, 5)))


def attend_gathered(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: GatherPlan,
    scale: float,
    out: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the step's chunk tokens, written to their places in `out`; other tokens' are left alone.

    q, out: [num_tokens, num_heads, head_dim], all tokens of the step; caches: [num_blocks, block_size, num_kv_heads,
    head_dim], with this step's keys in them; scales: an FP8 cache's. Returns `out`. Raises ValueError for shapes that
    the kernel does not take.
    """
    if scales is None:
        k, v = (_gather(cache, plan.block_ids) for cache in (k_cache, v_cache))
    else:
        k, v = gather_fp8_blocks(k_cache, v_cache, scales, plan.block_ids, q.dtype)
    return contiguous_attention(q, k, v, plan.tiles, scale, out)


def _gather(cache: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    """[keys of whole blocks, num_kv_heads, head_dim]"""
    # Rows of whole blocks: the gather then is a few long copies.
    return cache.flatten(1).index_select(0, block_ids).view(-1, *cache.shape[2:])
