"""Chunk attention split over the keys, against the reference in float32: as test_chunk_attention.py, cut at odd places.

Tolerances are those of the kernel that does not split: partial results are float32.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from octavo.kernels import reference
from octavo.kernels.batch import AttentionBatch
from octavo.kernels.chunk_attention import paged_chunk_attention
from octavo.kernels.chunk_splits import ChunkRows, chunk_tile, chunk_workspace, cut, plan_chunk_splits, sent
from octavo.kernels.ops import Operations
from octavo.kernels.split_chunk_attention import split_chunk_attention
from octavo.kernels.triton_ops import TritonOperations

TOLERANCES = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-6},
    torch.float16: {"rtol": 2**-10, "atol": 2**-11},
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-8},
}
NAN_WORD = 0x7FC07FC0
has_fp8 = not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 9)
needs_fp8 = pytest.mark.skipif(not has_fp8, reason="the GPU has no FP8")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@dataclass(frozen=True, slots=True)
class Case:
    """A step of chunks of (tokens before, tokens of the step, parts of its keys); of no tokens: a padding row."""

    chunks: tuple[tuple[int, int, int], ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32

    @property
    def query_lens(self) -> tuple[int, ...]:
        return tuple(new for _, new, _ in self.chunks)

    @property
    def seq_lens(self) -> tuple[int, ...]:
        return tuple(before + new for before, new, _ in self.chunks)


CASES = {
    "one token": Case(((300, 1, 3),)),
    "one token at each border": Case(((63, 1, 2), (64, 1, 2), (65, 1, 2), (127, 1, 4), (128, 1, 4)), head_dim=20),
    "chunks around borders": Case(((60, 8, 2), (64, 16, 2), (63, 2, 2), (96, 12, 4), (31, 17, 2)), head_dim=20),
    "contexts shorter than a split": Case(((0, 1, 9), (3, 5, 9), (31, 1, 9), (0, 40, 9)), head_dim=20),
    "split and whole rows": Case(((130, 9, 3), (0, 40, 1), (50, 3, 1), (70, 12, 2))),
    "padding rows": Case(((0, 0, 1), (120, 12, 3), (0, 0, 3), (90, 5, 2), (0, 0, 1)), head_dim=20),
    "several tiles": Case(((130, 40, 3),), dtype=torch.float16),
    "many parts": Case(((440, 5, 14),), num_kv_heads=1),
    "more parts than a merge reads at once": Case(((767, 2, 24),), 8, 1, 128),
    "half precision": Case(((250, 16, 4), (130, 9, 2)), 8, 2, 128, 16, torch.bfloat16),
    "small blocks, a head_dim between powers of two": Case(((300, 20, 3),), 4, 2, 80, 8, torch.float16),
    "blocks larger than a tile": Case(((200, 33, 3), (255, 1, 2)), block_size=128, dtype=torch.bfloat16),
    "a KV head for each": Case(((133, 20, 3),), num_heads=3, num_kv_heads=3, head_dim=96),
    "three heads to a KV head": Case(((250, 30, 3),), 6, 2, 64, 32, torch.float16),
    "more heads to a KV head than a dot's rows": Case(((90, 4, 2),), 20, 1, 20),
    "a tile of one query": Case(((200, 3, 2),), 64, 1, 16, 16, torch.float16),
    "the largest head_dim": Case(((150, 10, 2),), 2, 1, 256, 16, torch.bfloat16),
}


def splits_of(case, device, first_token=0):
    starts = np.cumsum([first_token, *case.query_lens])
    rows, parts = ChunkRows.of(starts.tolist(), case.seq_lens), np.array([parts for *_, parts in case.chunks])
    tile = chunk_tile(case.num_heads // case.num_kv_heads, case.head_dim, case.dtype)
    return sent(cut(rows, parts, tile), device)


def workspace_of(case, device):
    """Of NaN, so that what no program wrote is seen."""
    workspace = chunk_workspace(case.num_heads, case.num_kv_heads, case.head_dim, case.dtype, 132, device)
    workspace.partials.fill_(torch.nan)
    workspace.log_sums.fill_(torch.nan)
    return workspace


def make_queries(case, device):
    return torch.randn(sum(case.query_lens), case.num_heads, case.head_dim).to(case.dtype).to(device)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name, make_rows, device):
    case = CASES[name]
    rows = make_rows(case.seq_lens, case.block_size, case.num_kv_heads, case.head_dim, case.dtype)
    q, scale, splits = make_queries(case, device), 1 / math.sqrt(case.head_dim), splits_of(case, device)
    assert splits.num_partials or name == "contexts shorter than a split"
    given = q, rows.k_cache, rows.v_cache, rows.block_tables, rows.slots, splits
    out = split_chunk_attention(*given, workspace_of(case, device), scale)
    assert out.dtype == case.dtype
    torch.testing.assert_close(out.float(), rows.attend(q, case.query_lens, scale), **TOLERANCES[case.dtype])
    if device.type == "cuda":  # where programs run in an order of their own
        again = split_chunk_attention(*given, workspace_of(case, device), scale)
        assert torch.equal(out, again)


def to_fp8(rows):
    """The rows' caches in FP8, and their scales; poison stays poison."""
    is_cell = ~rows.k_cache[..., 0].isnan()
    (k, k_scales), (v, v_scales) = (reference.quantise(cache) for cache in (rows.k_cache, rows.v_cache))
    words = torch.stack((k_scales, v_scales), -1).view(torch.int32).squeeze(-1).where(is_cell, NAN_WORD)
    return k, v, words.transpose(1, 2).contiguous()


@needs_fp8
@pytest.mark.parametrize("name", CASES)
def test_attends_to_what_an_fp8_cache_holds(name, make_rows, device):
    case = CASES[name]
    rows = make_rows(case.seq_lens, case.block_size, case.num_kv_heads, case.head_dim, torch.float32)
    # Scales far apart: small values first in some rows, last in others.
    cells = torch.arange(rows.v_cache.shape[0] * case.block_size, device=device).view(-1, case.block_size, 1, 1)
    rows = replace(rows, v_cache=rows.v_cache * 2.0 ** -(cells % 13))
    *caches, scales = to_fp8(rows)
    k, v = reference.dequantise(*caches, scales, torch.float32)
    q, scale = make_queries(case, device), 1 / math.sqrt(case.head_dim)
    given = q, *caches, rows.block_tables, rows.slots, splits_of(case, device), workspace_of(case, device)
    out = split_chunk_attention(*given, scale, scales=scales)
    exact = replace(rows, k_cache=k, v_cache=v).attend(q, case.query_lens, scale)
    torch.testing.assert_close(out.float(), exact, **TOLERANCES[case.dtype])


def test_chunks_lie_behind_decodes_in_queries_and_output(make_rows, device):
    case = Case(((200, 12, 3), (45, 20, 1)))
    rows = make_rows(case.seq_lens, 16, 2, 64, torch.float32)
    qkv = torch.randn(2 + 32, 8 * 64, device=device)
    q = qkv[:, : 4 * 64].unflatten(1, (4, 64))
    out = torch.full((len(q) + 3, 5, 64), 7.0, device=device)[:, :4]  # heads of another kind lie between its tokens
    caches, plan = (rows.k_cache, rows.v_cache), splits_of(case, device, first_token=2)
    given = q, *caches, rows.block_tables, rows.slots, plan, workspace_of(case, device), 0.1
    assert split_chunk_attention(*given, out[: len(q)]).data_ptr() == out.data_ptr()
    torch.testing.assert_close(out[2 : len(q)], rows.attend(q[2:], (12, 20), 0.1), **TOLERANCES[torch.float32])
    assert (out[:2] == 7).all()
    assert (out[len(q) :] == 7).all()


def test_large_scores_do_not_overflow(make_rows, device):
    case = Case(((200, 10, 4),), 1, 1)
    rows = make_rows(case.seq_lens, 16, 1, 64, torch.float32)
    q = make_queries(case, device)
    given = q, rows.k_cache, rows.v_cache, rows.block_tables, rows.slots
    out = split_chunk_attention(*given, splits_of(case, device), workspace_of(case, device), 50.0)
    torch.testing.assert_close(out, rows.attend(q, (10,), 50.0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("is_fp8", [False, pytest.param(True, marks=needs_fp8)], ids=["float32", "fp8"])
def test_a_step_equals_the_reference(is_fp8, make_rows, device):
    """Decodes, a chunk that is split, a new prompt and a prompt's last token, in two layers of one plan."""
    num_heads, num_kv_heads, head_dim, block_size = 8, 2, 32, 16
    seq_lens, query_lens = (70, 3, 1030, 12, 200), (1, 1, 5, 12, 1)
    rows = make_rows(seq_lens, block_size, num_kv_heads, head_dim, torch.float32)
    starts = tuple(sum(query_lens[:row]) for row in range(len(query_lens) + 1))
    positions = [(row, seq_lens[row] - n + i) for row, n in enumerate(query_lens) for i in range(n)]
    tables = rows.block_tables[rows.slots]
    cells = [int(tables[row, p // block_size]) * block_size + p % block_size for row, p in positions]
    batch = AttentionBatch(
        num_decode_rows=2, positions=torch.tensor([p for _, p in positions], device=device),
        kv_indices=torch.tensor(cells, device=device),
        block_tables=rows.block_tables.where(rows.block_tables < len(rows.k_cache), 0),
        slots=rows.slots, seq_lens=rows.seq_lens, host_seq_lens=seq_lens, host_query_starts=starts,
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
    )  # fmt: skip
    chunks = ChunkRows.of(starts[2:], seq_lens[2:])
    assert plan_chunk_splits(chunks, num_heads, num_kv_heads, head_dim, torch.float32, 132) is not None
    # By no angle: the twin rounds rotations otherwise, and what is next to a tie would be another number in FP8.
    rope = tuple(torch.full((starts[-1], 1, head_dim), float(x), device=device) for x in (1, 0))
    qkv = torch.randn(starts[-1], num_heads + 2 * num_kv_heads, head_dim, device=device)
    found = []
    for ops in (TritonOperations(device), Operations()):
        if is_fp8:
            k, v, words = to_fp8(rows)
            # The reference reads whole blocks, also where no key is yet.
            caches = *(x.float().nan_to_num().to(k.dtype) for x in (k, v)), words.where(words != NAN_WORD, 0)
        else:
            caches = rows.k_cache.nan_to_num(), rows.v_cache.nan_to_num()
        plan = ops.plan_attention(batch, block_size, torch.float32)
        given = batch.kv_indices, plan, num_heads, 0.2
        found.append([ops.attention(qkv + layer, rope, caches, *given) for layer in range(2)])
    torch.testing.assert_close(*found, rtol=2e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("new", [1, 16, 100])
def test_equals_the_kernel_that_does_not_split(new, dtype, make_rows, device):
    rows = make_rows((8176 + new, 900, 5000), 16, 8, 128, dtype)
    lens = (new, 3, 2)
    q = torch.randn(sum(lens), 32, 128, dtype=dtype, device=device)
    starts = torch.tensor((0, *lens), device=device).cumsum(0).int()
    tables = rows.block_tables, rows.slots
    whole = paged_chunk_attention(q, rows.k_cache, rows.v_cache, *tables, rows.seq_lens, starts, new, 0.09)
    chunks = ChunkRows.of(starts.tolist(), rows.host_seq_lens)
    splits = sent(plan_chunk_splits(chunks, 32, 8, 128, dtype, 132), device)
    workspace = chunk_workspace(32, 8, 128, dtype, 132, device)
    outs = [split_chunk_attention(q, rows.k_cache, rows.v_cache, *tables, splits, workspace, 0.09) for _ in range(5)]
    torch.testing.assert_close(outs[0], whole, rtol=2**-6, atol=2**-9)
    for out in outs[1:]:
        assert torch.equal(out, outs[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 4, 512)}, "head_dim 512"),
        ({"k_cache": torch.zeros(4, 256, 2, 64)}, "block_size 256"),
        ({"slots": torch.zeros(2, dtype=torch.int32)}, "slots"),
        ({"block_tables": torch.zeros(2, 4)}, "block_tables"),
        ({"jobs": torch.zeros(3, 7, dtype=torch.int32)}, r"jobs \(3, 7\)"),
        ({"merges": torch.zeros(3, 4)}, "merges"),
        ({"q": torch.zeros(2, 8, 64)}, "tiles of 16 rows for 8 queries of 4 heads"),
        ({"num_partials": 1000}, "a workspace of"),
    ],
)
def test_refuses_what_it_does_not_take(changes, message, device):
    case = Case(((60, 2, 2),))
    splits, workspace = splits_of(case, device), workspace_of(case, device)
    tensors = {
        "q": torch.zeros(2, 4, 64),
        "k_cache": torch.zeros(4, 16, 2, 64),
        "v_cache": torch.zeros(4, 16, 2, 64),
        "block_tables": torch.zeros(2, 4, dtype=torch.int32),
        "slots": torch.zeros(1, dtype=torch.int64),
    }
    of_plan = {name: change for name, change in changes.items() if hasattr(splits, name)}
    given = {name: x.to(device) for name, x in (tensors | changes).items() if name not in of_plan}
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in of_plan.items()}
    with pytest.raises(ValueError, match=message):
        split_chunk_attention(**given, splits=replace(splits, **moved), workspace=workspace, scale=0.1)
