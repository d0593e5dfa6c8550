"""Chunk attention against the reference in float32: odd chunks behind odd prefixes, padding rows, poisoned caches."""

import math
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")

from octavo.kernels.chunk_attention import chunk_config, paged_chunk_attention

# float32: sums of up to a few hundred terms in another order. Half precisions: the output is rounded once (a unit of
# its last place), and so are the weights of the values (half a unit, of about the values' mean size, 0.8).
TOLERANCES = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-6},
    torch.float16: {"rtol": 2**-10, "atol": 2**-11},
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-8},
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@dataclass(frozen=True, slots=True)
class Case:
    """A step of chunks of (tokens before, tokens of the step); a chunk of no tokens is a padding row."""

    chunks: tuple[tuple[int, int], ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32

    @property
    def query_lens(self) -> tuple[int, ...]:
        return tuple(new for _, new in self.chunks)

    @property
    def seq_lens(self) -> tuple[int, ...]:
        return tuple(sum(chunk) for chunk in self.chunks)


CASES = {
    "one token": Case(((0, 1),)),
    "whole prompts": Case(((0, 16), (0, 17), (0, 40), (0, 1)), head_dim=20),
    "around tiles of keys": Case(((63, 1), (64, 1), (62, 2), (31, 33), (32, 32)), head_dim=20),
    "one token behind a long prefix": Case(((640, 1), (5, 3)), num_kv_heads=1),
    "padding rows": Case(((0, 0), (20, 12), (0, 0), (0, 5), (0, 0)), head_dim=20),
    "only padding rows": Case(((0, 0), (0, 0))),
    "a prompt of several tiles": Case(((0, 300),), 2, 1, 128, 16, torch.bfloat16),
    "several tiles behind a prefix": Case(((411, 289), (0, 140), (70, 2)), 2, 1, 64, 32, torch.float16),
    "a few tokens in half precision": Case(((130, 9), (0, 16), (15, 1)), dtype=torch.bfloat16),
    "tiles of 64": Case(((100, 60), (0, 33)), dtype=torch.float16),
    "blocks larger than a tile": Case(((130, 70), (0, 129)), block_size=128, dtype=torch.bfloat16),
    "small blocks, a head_dim between powers of two": Case(((9, 100),), head_dim=80, block_size=8, dtype=torch.float16),
    "a KV head for each": Case(((33, 20),), num_heads=3, num_kv_heads=3, head_dim=96),
    "eight heads to a KV head": Case(((50, 30),), num_heads=8, num_kv_heads=1, dtype=torch.float16),
}


def make_queries(case: Case, device: torch.device) -> torch.Tensor:
    return torch.randn(sum(case.query_lens), case.num_heads, case.head_dim).to(case.dtype).to(device)


def starts_of(query_lens, device, first=0) -> torch.Tensor:
    ends = torch.tensor((first, *query_lens)).cumsum(0)
    return ends.int().to(device)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name, make_rows, device):
    case = CASES[name]
    rows = make_rows(case.seq_lens, case.block_size, case.num_kv_heads, case.head_dim, case.dtype)
    q, starts, scale = make_queries(case, device), starts_of(case.query_lens, device), 1 / math.sqrt(case.head_dim)
    caches, tables = (rows.k_cache, rows.v_cache), (rows.block_tables, rows.slots, rows.seq_lens)
    out = paged_chunk_attention(q, *caches, *tables, starts, max(case.query_lens), scale)
    assert out.dtype == case.dtype
    assert out.shape == q.shape
    if len(q):
        expected = rows.attend(q, case.query_lens, scale)
        torch.testing.assert_close(out.float(), expected, **TOLERANCES[case.dtype])


def test_a_grid_for_longer_chunks_changes_nothing(make_rows, device):
    case = Case(((10, 20), (0, 3)), head_dim=20)
    rows = make_rows(case.seq_lens, case.block_size, case.num_kv_heads, case.head_dim, case.dtype)
    q, starts = make_queries(case, device), starts_of(case.query_lens, device)
    tables = (rows.block_tables, rows.slots, rows.seq_lens)
    exact, loose = (
        paged_chunk_attention(q, rows.k_cache, rows.v_cache, *tables, starts, max_query_len, 0.2)
        for max_query_len in (20, 90)
    )
    torch.testing.assert_close(loose, exact, rtol=0, atol=0)


def test_chunks_lie_behind_decodes_in_queries_and_output(make_rows, device):
    lens, query_lens = (40, 7, 30, 65), (1, 1, 12, 20)
    rows = make_rows(lens, 16, 2, 64, torch.float32)
    qkv = torch.randn(sum(query_lens), 8 * 64, device=device)
    q = qkv[:, : 4 * 64].unflatten(1, (4, 64))
    out = torch.full((sum(query_lens) + 3, 4, 64), 7.0, device=device)
    caches, chunks = (rows.k_cache, rows.v_cache), (rows.slots[2:], rows.seq_lens[2:])
    starts = starts_of(query_lens, device)[2:]
    paged_chunk_attention(q, *caches, rows.block_tables, *chunks, starts, 20, 0.1, out[: len(q)])
    expected = rows.attend(q, query_lens, 0.1)[2:]
    torch.testing.assert_close(out[2 : len(q)], expected, **TOLERANCES[torch.float32])
    assert (out[:2] == 7).all()
    assert (out[len(q) :] == 7).all()


def test_large_scores_do_not_overflow(make_rows, device):
    rows = make_rows((50,), 16, 1, 64, torch.float32)
    q = torch.randn(40, 1, 64, device=device)
    tables, starts = (rows.block_tables, rows.slots, rows.seq_lens), starts_of((40,), device)
    out = paged_chunk_attention(q, rows.k_cache, rows.v_cache, *tables, starts, 40, 50.0)
    torch.testing.assert_close(out, rows.attend(q, (40,), 50.0), rtol=1e-3, atol=1e-4)


def test_cells_behind_two_to_the_31_elements(device):
    # 4 GiB, of which only the pages in use are ever touched.
    cache = torch.empty(2**14 + 8, 128, 8, 128, dtype=torch.bfloat16, device=device)
    cache[-1] = torch.randn(128, 8, 128)
    tables = torch.tensor([[len(cache) - 1]], dtype=torch.int32, device=device)
    slots, lens = torch.zeros(1, dtype=torch.int64, device=device), torch.tensor([37], dtype=torch.int32, device=device)
    q = torch.randn(1, 8, 128).to(torch.bfloat16).to(device)
    out = paged_chunk_attention(q, cache, cache, tables, slots, lens, starts_of((1,), device), 1, 0.1)
    keys = cache[-1, :37].float().transpose(0, 1)
    expected = torch.softmax(q[0].float().unsqueeze(1) @ keys.mT * 0.1, -1) @ keys
    torch.testing.assert_close(out[0].float(), expected.squeeze(1), **TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("head_dim", [20, 64, 128, 256])
def test_config_keeps_tiles_within_shared_memory(dtype, head_dim):
    for max_query_len in (1, 16, 17, 64, 65, 8192):
        config = chunk_config(max_query_len, head_dim, dtype)
        for size in (config.queries_per_tile, config.keys_per_tile, config.num_warps):
            assert size & (size - 1) == 0
        assert min(config.queries_per_tile, config.keys_per_tile) >= 16
        cells = config.queries_per_tile + 2 * config.num_stages * config.keys_per_tile
        assert cells * max(16, head_dim) * dtype.itemsize <= 227 * 1024
    assert chunk_config(1, head_dim, dtype).queries_per_tile <= chunk_config(8192, head_dim, dtype).queries_per_tile


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_starts": torch.zeros(3, dtype=torch.int64)}, "query_starts"),
        ({"query_starts": torch.zeros(2, dtype=torch.int32)}, "for 2 rows"),
        ({"q": torch.zeros(2, 4, 512)}, "head_dim 512"),
        ({"k_cache": torch.zeros(4, 256, 2, 64)}, "block_size 256"),
        ({"v_cache": torch.zeros(4, 2, 16, 64).transpose(1, 2)}, "contiguous"),
        ({"seq_lens": torch.zeros(1, dtype=torch.int32)}, "one of each for each row"),
    ],
)
def test_refuses_what_it_does_not_take(changes, message, device):
    given = {
        "q": torch.zeros(2, 4, 64),
        "k_cache": torch.zeros(4, 16, 2, 64),
        "v_cache": torch.zeros(4, 16, 2, 64),
        "block_tables": torch.zeros(2, 4, dtype=torch.int32),
        "slots": torch.zeros(2, dtype=torch.int64),
        "seq_lens": torch.zeros(2, dtype=torch.int32),
        "query_starts": torch.zeros(3, dtype=torch.int32),
    } | changes
    with pytest.raises(ValueError, match=message):
        paged_chunk_attention(**{name: x.to(device) for name, x in given.items()}, max_query_len=1, scale=0.1)
