"""A step's chunks over gathered keys against the reference, and which steps gather."""

import pytest
import torch

pytest.importorskip("triton")

from octavo.kernels.batch import AttentionBatch
from octavo.kernels.gathered_chunks import attend_gathered, is_worth_gathering, plan_gather


def make_batch(seq_lens, query_lens, rows=None) -> AttentionBatch:
    device = rows.slots.device if rows else torch.device("cpu")
    starts = (0, *torch.tensor(query_lens).cumsum(0).tolist())
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    return AttentionBatch(
        num_decode_rows=next((i for i, n in enumerate(query_lens) if n > 1), len(query_lens)),
        positions=nothing,
        kv_indices=nothing,
        block_tables=rows.block_tables if rows else nothing,
        slots=rows.slots if rows else nothing,
        seq_lens=rows.seq_lens if rows else nothing,
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        host_seq_lens=tuple(seq_lens),
        host_query_starts=starts,
    )


@pytest.mark.parametrize("block_size", [16, 32])
def test_equals_the_reference_behind_decodes_and_poison(block_size, make_rows, device):
    torch.manual_seed(0)
    seq_lens, query_lens = (40, 7, 30, 165, 16, 70), (1, 1, 12, 140, 16, 3)
    rows = make_rows(seq_lens, block_size, 2, 64, torch.float16)
    batch = make_batch(seq_lens, query_lens, rows)
    q = torch.randn(sum(query_lens), 4, 64).half().to(device)
    out = torch.full_like(q, 7.0)
    plan = plan_gather(batch, 4, block_size)
    assert attend_gathered(q, rows.k_cache, rows.v_cache, plan, 0.1, out) is out
    expected = rows.attend(q, query_lens, 0.1)
    # As in test_contiguous_attention.py.
    torch.testing.assert_close(out[2:].float(), expected[2:], rtol=2**-10, atol=2**-11)
    assert (out[:2] == 7).all(), "decodes are another kernel's"


@pytest.mark.parametrize(
    ("seq_lens", "query_lens", "expected"),
    [
        ((4096,), (4096,), True),
        ((9000,) * 64 + (4096,), (1,) * 64 + (4096,), True),
        ((3700, 800), (3700, 396), True),
        ((16384,), (4096,), True),
        ((16385,), (4096,), False),
        ((4095,), (4095,), False),
        ((9000,) * 64, (1,) * 64, False),
    ],
)
def test_gathers_for_many_queries_to_a_key(seq_lens, query_lens, expected):
    assert is_worth_gathering(make_batch(seq_lens, query_lens), 128, torch.bfloat16) is expected


def test_gathers_only_what_the_kernel_takes():
    batch = make_batch((4096,), (4096,))
    assert not is_worth_gathering(batch, 80, torch.bfloat16)
    assert not is_worth_gathering(batch, 128, torch.float32)
