"""The torch twins of the device kernels: the oracle of every kernel test, and what runs on a CPU.

They run on any device that torch knows. Decodes of a step attend in groups of rows, each one gather of blocks and one
attention call; prompt chunks are one call each. All that is the same for every layer is computed once a step, by
`plan_attention`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)

from .batch import AttentionBatch

# Keys that one group of decodes gathers on a CPU, so that they are still in its cache when they are attended to.
# Measured (64 rows of 20 to 190 keys, 4 KV heads of 32 floats, 6 layers, 2 cores): one group 7.8 ms, eight 5.5 ms.
_CPU_GROUP_KEYS = 1536
# The same on a GPU, to bound a step's memory: keys and values of 128 MiB each at 4 KV heads of 128 in bfloat16.
_GPU_GROUP_KEYS = 131072


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """A loaded weight [out_size, in_size] as `linear` of the same implementation takes it. Here: as it is."""
    return weight


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x @ weight.T + bias. x: [num_tokens, in_size]; bias: [out_size] or None; out: [num_tokens, out_size] or None."""
    if out is None:
        return F.linear(x, weight, bias)
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def embed(token_ids: torch.Tensor, table: torch.Tensor, start: int) -> torch.Tensor:
    """Rows of tokens [start, start + num_rows) of the vocabulary; zeros for others, which another rank has.

    token_ids: [num_tokens] int32 or int64; table: [num_rows, width]. Returns [num_tokens, width].
    """
    rows = token_ids - start
    elsewhere = (rows < 0) | (rows >= len(table))
    return F.embedding(rows.masked_fill(elsewhere, 0), table).masked_fill_(elsewhere.unsqueeze(-1), 0)


def rope_rows(
    positions: torch.Tensor, cos_table: torch.Tensor, sin_table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables [max_positions, head_dim] at positions [num_tokens]: two tensors [num_tokens, 1, head_dim]."""
    return cos_table[positions].unsqueeze(1), sin_table[positions].unsqueeze(1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. Half precisions are computed in float32."""
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, other: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x + residual, and that sum: the residual stream after a sublayer. [num_tokens, hidden_size] each.

    x may come in two parts, of which `other` is one. The sum is rounded once.
    """
    x = x if other is None else x.float() + other
    residual = (residual + x).to(residual.dtype)
    return rms_norm(residual, weight, eps), residual


def apply_rope(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates query and key heads to their positions (RoFormer, 3.2.2; the halves paired as in Llama's checkpoints).

    heads: [num_tokens, num_heads, head_dim]; cos, sin: [num_tokens, 1, head_dim], the first half of sin negated.
    """
    half = heads.shape[-1] // 2
    return torch.addcmul(heads * cos, heads.roll(half, dims=-1), sin)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (SwiGLU). [num_tokens, 2 * n] to [num_tokens, n]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def quantise(heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., head_dim] over their scales in FP8, and those [...] in bfloat16: largest / 448, rounded up."""
    heads = heads.float()
    # The formula of kernels/fp8_cache.py, operation by operation.
    bits = heads.abs().amax(-1).mul(1 / 448).clamp(min=2.0**-120).view(torch.int32)
    scales = (bits + 0xFFFF).bitwise_and(-65536).view(torch.float32)
    return (heads * scales.reciprocal().unsqueeze(-1)).to(torch.float8_e4m3fn), scales.bfloat16()


def dequantise(
    k_cache: torch.Tensor, v_cache: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """An FP8 cache's keys and values in `dtype`. scales: [num_blocks, num_kv_heads, block_size] int32, in whose lower
    halves are the keys' in bfloat16, and in the upper ones the values'."""
    halves = scales.view(torch.bfloat16).unflatten(-1, (-1, 2)).float()
    k_scales, v_scales = halves.permute(3, 0, 2, 1).unsqueeze(-1)
    return (k_cache.float() * k_scales).to(dtype), (v_cache.float() * v_scales).to(dtype)


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_indices: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> None:
    """Puts each token's key and value into its place in the cache.

    k, v: [num_tokens, num_kv_heads, head_dim]; caches: [num_blocks, block_size, num_kv_heads, head_dim];
    kv_indices: [num_tokens] int64, block_id * block_size + offset; scales: an FP8 cache's, as in `dequantise`.
    """
    if scales is not None:
        (k, k_scales), (v, v_scales) = quantise(k), quantise(v)
        block_size = k_cache.shape[1]
        words = torch.stack((k_scales, v_scales), -1).view(torch.int32).squeeze(-1)
        scales.transpose(1, 2)[kv_indices // block_size, kv_indices % block_size] = words
        # Torch copies FP8 as bytes.
        k, v, k_cache, v_cache = (x.view(torch.uint8) for x in (k, v, k_cache, v_cache))
    k_cache.flatten(0, 1).index_copy_(0, kv_indices, k)
    v_cache.flatten(0, 1).index_copy_(0, kv_indices, v)


def rope_and_cache(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_indices: torch.Tensor,
    num_heads: int,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotates queries and keys, caches keys and values, returns the queries [num_tokens, num_heads, head_dim].

    qkv: [num_tokens, num_heads + 2 * num_kv_heads, head_dim]: the heads of queries, keys and values in this order;
    scales: an FP8 cache's.
    """
    # Queries and keys lie side by side, so one call rotates both.
    qk, v = qkv.tensor_split((num_heads + k_cache.shape[2],), dim=1)
    q, k = apply_rope(qk, cos, sin).tensor_split((num_heads,), dim=1)
    write_kv(k, v, k_cache, v_cache, kv_indices, scales)
    return q


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """One row of several query tokens (or one, at the end of a prompt)."""

    start: int  # its query tokens are [start, end)
    end: int
    seq_len: int  # keys that it attends to, its own tokens included
    blocks: torch.Tensor  # [ceil(seq_len / block_size)] int32
    mask: torch.Tensor | None  # [num_query_tokens, seq_len], True where attended; None: causal from position 0


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decodes [start, end) of the plan's order, which attend in one call."""

    start: int
    end: int
    blocks: torch.Tensor  # [(end - start) * max_blocks] int32
    mask: torch.Tensor  # [end - start, 1, 1, max_blocks * block_size], added to the scores


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What all layers of a step share."""

    num_decode_rows: int
    decode_order: torch.Tensor | None  # [num_decode_rows] int64: rows in the groups' order; None: as they come
    decode_places: torch.Tensor | None  # the inverse: each row's place in that order
    groups: tuple[DecodeGroup, ...]
    chunks: tuple[ChunkPlan, ...]


def plan_attention(batch: AttentionBatch, block_size: int, dtype: torch.dtype) -> AttentionPlan:
    """Computes once a step what `attend` needs in every layer. `dtype` is that of the queries."""
    num_rows = batch.num_decode_rows
    max_blocks = -(-max(batch.host_seq_lens) // block_size)
    block_tables = batch.block_tables[:, :max_blocks].index_select(0, batch.slots)
    chunks = tuple(_plan_chunk(batch, block_tables[row], row, block_size) for row in range(num_rows, batch.num_rows))
    host_lens = list(batch.host_seq_lens[:num_rows])
    block_tables, seq_lens = block_tables[:num_rows], batch.seq_lens[:num_rows]
    order = places = None
    is_cpu = seq_lens.device.type == "cpu"
    if num_rows > 1 and is_cpu:
        # Rows of about the same length together: a group is padded to its longest.
        order = torch.tensor(sorted(range(num_rows), key=host_lens.__getitem__))
        places = torch.empty_like(order).index_copy_(0, order, torch.arange(num_rows))
        block_tables, seq_lens = block_tables.index_select(0, order), seq_lens.index_select(0, order)
        host_lens.sort()
    groups = []
    for start, end in _split_into_groups(host_lens, _CPU_GROUP_KEYS if is_cpu else _GPU_GROUP_KEYS):
        num_blocks = -(-max(host_lens[start:end]) // block_size)
        mask = _length_mask(seq_lens[start:end], num_blocks * block_size, dtype)
        groups.append(DecodeGroup(start, end, block_tables[start:end, :num_blocks].flatten(), mask))
    return AttentionPlan(num_rows, order, places, tuple(groups), chunks)


def _split_into_groups(seq_lens: list[int], max_keys: int) -> Iterator[tuple[int, int]]:
    """Spans of rows, at least one each, that gather `max_keys` keys at most."""
    start = longest = 0
    for row, seq_len in enumerate(seq_lens):
        longest = max(longest, seq_len)
        if row > start and (row + 1 - start) * longest > max_keys:
            yield start, row
            start, longest = row, seq_len
    if seq_lens:
        yield start, len(seq_lens)


def _length_mask(seq_lens: torch.Tensor, num_keys: int, dtype: torch.dtype) -> torch.Tensor:
    """[num_rows, 1, 1, num_keys]: 0 for keys that the row has, -inf behind them."""
    beyond = torch.arange(num_keys, device=seq_lens.device) >= seq_lens[:, None]
    return torch.zeros(beyond.shape, dtype=dtype, device=beyond.device).masked_fill_(beyond, -torch.inf)[:, None, None]


def _plan_chunk(batch: AttentionBatch, blocks: torch.Tensor, row: int, block_size: int) -> ChunkPlan:
    start, end = batch.host_query_starts[row : row + 2]
    seq_len = batch.host_seq_lens[row]
    mask = None
    if end - start < seq_len:
        keys = torch.arange(seq_len, device=batch.positions.device)
        mask = keys <= batch.positions[start:end, None]
    return ChunkPlan(start, end, seq_len, blocks[: -(-seq_len // block_size)], mask)


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of q over the cached keys and values, which this step's tokens are already part of.

    q: [num_tokens, num_heads, head_dim]; caches: [num_blocks, block_size, num_kv_heads, head_dim]; each run of
    num_heads / num_kv_heads query heads shares one KV head; scales: an FP8 cache's. Returns the shape of q.
    """
    if scales is not None:
        k_cache, v_cache = dequantise(k_cache, v_cache, scales, q.dtype)
    outputs = [_attend_chunk(q[chunk.start : chunk.end], k_cache, v_cache, chunk, scale) for chunk in plan.chunks]
    if plan.num_decode_rows:
        outputs.insert(0, _attend_decodes(q[: plan.num_decode_rows], k_cache, v_cache, plan, scale))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend_decodes(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: AttentionPlan, scale: float
) -> torch.Tensor:
    if plan.decode_order is not None:
        q = q.index_select(0, plan.decode_order)
    outputs = [_attend_group(q[group.start : group.end], k_cache, v_cache, group, scale) for group in plan.groups]
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return out if plan.decode_places is None else out.index_select(0, plan.decode_places)


def _attend_group(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, group: DecodeGroup, scale: float
) -> torch.Tensor:
    # Behind a row's own keys lies what others left there, and a mask does not hide what is no number.
    beyond = group.mask.transpose(2, 3).isinf()
    k, v = (_gather(x, group.blocks, len(q)).masked_fill(beyond, 0) for x in (k_cache, v_cache))
    if q.is_cuda:
        # Torch's GPU kernels that take a mask know no GQA, so the heads that share a KV head become its query rows.
        packed = q.unflatten(1, (k.shape[1], -1))
        return F.scaled_dot_product_attention(packed, k, v, group.mask, scale=scale).flatten(1, 2)
    # Measured on a CPU (64 rows, 144 keys, 8/4 heads): 0.49 ms so, 0.93 ms with a group's heads packed as query rows.
    return F.scaled_dot_product_attention(q.unsqueeze(2), k, v, group.mask, scale=scale, enable_gqa=True).squeeze(2)


def _attend_chunk(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, chunk: ChunkPlan, scale: float
) -> torch.Tensor:
    k = _gather(k_cache, chunk.blocks, 1)[:, :, : chunk.seq_len]
    v = _gather(v_cache, chunk.blocks, 1)[:, :, : chunk.seq_len]
    if q.is_cuda and chunk.mask is not None:
        # As above; without it the whole matrix of scores would be made.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0), k, v, chunk.mask, is_causal=chunk.mask is None, scale=scale, enable_gqa=True
    )
    return out.squeeze(0).transpose(0, 1)


def _gather(cache: torch.Tensor, blocks: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The blocks of each row, as [num_rows, num_kv_heads, num_keys, head_dim]."""
    _, _, num_kv_heads, head_dim = cache.shape
    # Rows of whole blocks: the gather then is a few long copies.
    gathered = cache.flatten(1).index_select(0, blocks)
    return gathered.view(num_rows, -1, num_kv_heads, head_dim).transpose(1, 2)


def paged_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: AttentionBatch, scale: float
) -> torch.Tensor:
    """`attend` for one call: plans and attends. Shapes as there."""
    return attend(q, k_cache, v_cache, plan_attention(batch, k_cache.shape[1], q.dtype), scale)
