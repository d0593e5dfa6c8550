"""A step of decodes and chunks through a GPU's operations, as the layers call them, against the reference."""

import pytest
import torch

pytest.importorskip("triton")

from octavo.kernels.batch import AttentionBatch
from octavo.kernels.ops import Operations
from octavo.kernels.triton_ops import TritonOperations

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, SCALE = 4, 2, 20, 16, 0.3


@pytest.mark.parametrize(
    ("seq_lens", "query_lens"),
    [
        ((70, 3, 33, 1), (1, 1, 1, 1)),
        ((33, 5, 17), (20, 5, 1)),
        ((70, 3, 33, 5, 17), (1, 1, 20, 5, 1)),
    ],
    ids=["decodes", "chunks", "both"],
)
def test_attention_of_a_step_equals_the_reference(seq_lens, query_lens, make_rows, device):
    torch.manual_seed(0)
    num_decodes = 4 if len(seq_lens) == 4 else len(seq_lens) - 3
    rows = make_rows(seq_lens, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, torch.float32)
    starts = tuple(sum(query_lens[:row]) for row in range(len(query_lens) + 1))
    positions = [(row, seq_lens[row] - n + i) for row, n in enumerate(query_lens) for i in range(n)]
    tables = rows.block_tables[rows.slots]
    cells = [int(tables[row, p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE for row, p in positions]
    kv_indices = torch.tensor(cells, device=device)
    batch = AttentionBatch(
        num_decode_rows=num_decodes, positions=torch.tensor([p for _, p in positions], device=device),
        kv_indices=kv_indices, block_tables=rows.block_tables.where(rows.block_tables < len(rows.k_cache), 0),
        slots=rows.slots, seq_lens=rows.seq_lens, host_seq_lens=seq_lens, host_query_starts=starts,
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
    )  # fmt: skip
    angles = torch.rand(starts[-1], 1, HEAD_DIM // 2) * 6
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
    rope = cos.to(device), sin.to(device)
    qkv = torch.randn(starts[-1], NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM, device=device)
    found = []
    for ops in (TritonOperations(device), Operations()):
        # The reference reads whole blocks, also where no key is yet.
        caches = rows.k_cache.nan_to_num(), rows.v_cache.nan_to_num()
        plan = ops.plan_attention(batch, BLOCK_SIZE, torch.float32)
        # Layers share the plan.
        outs = [ops.attention(qkv + layer, rope, caches, kv_indices, plan, NUM_HEADS, SCALE) for layer in range(2)]
        found.append((*outs, *caches))
    torch.testing.assert_close(*found, rtol=2e-5, atol=2e-6)
