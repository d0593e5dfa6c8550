"""A step of decodes and chunks through a GPU's operations, as the layers call them, against the reference."""

import pytest
import torch

pytest.importorskip("triton")

from octavo.kernels.batch import AttentionBatch
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
    unused = torch.empty(0, dtype=torch.int64, device=device)
    batch = AttentionBatch(
        num_decode_rows=num_decodes, positions=unused, kv_indices=unused, block_tables=rows.block_tables,
        slots=rows.slots, seq_lens=rows.seq_lens, host_seq_lens=seq_lens, host_query_starts=starts,
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
    )  # fmt: skip
    q = torch.randn(starts[-1], NUM_HEADS, HEAD_DIM, device=device)
    ops = TritonOperations(device)
    plan = ops.plan_attention(batch, BLOCK_SIZE, torch.float32)
    for _ in range(2):  # layers share the plan
        out = ops.attend(q, rows.k_cache, rows.v_cache, plan, SCALE)
        torch.testing.assert_close(out, rows.attend(q, query_lens, SCALE), rtol=2e-5, atol=2e-6)
