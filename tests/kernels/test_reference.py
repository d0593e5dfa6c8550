"""The reference operations against formulas written out, on odd shapes; paged attention against dense attention."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from octavo.kernels import reference
from octavo.kernels.batch import AttentionBatch
from octavo.kernels.cpu import CpuOperations
from octavo.kernels.ops import operations_for

# float32 sums of up to a few hundred terms, in another order than the formula's: a few units of 2**-23 each.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 257)])
def test_rms_norm(shape):
    x, weight = torch.randn(shape), torch.randn(shape[1])
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-5), expected, **CLOSE)


def test_rms_norm_of_half_precision_is_computed_in_float32():
    x, weight = torch.full((1, 512), 300.0, dtype=torch.float16), torch.ones(512, dtype=torch.float16)
    # 300^2 is over float16's range.
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-5), torch.ones(1, 512, dtype=torch.float16))


def test_add_rms_norm_returns_the_norm_and_the_sum_and_keeps_its_inputs():
    x, residual, weight = torch.randn(3, 7), torch.randn(3, 7), torch.randn(7)
    kept = residual.clone()
    normed, total = reference.add_rms_norm(x, residual, weight, 1e-6)
    torch.testing.assert_close(total, x + kept, rtol=0, atol=0)
    torch.testing.assert_close(normed, reference.rms_norm(x + kept, weight, 1e-6), rtol=0, atol=0)
    torch.testing.assert_close(residual, kept, rtol=0, atol=0)


@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 2), (3, 20), (5, 6)])
def test_rope_rotates_each_pair_by_its_angle(num_heads, head_dim):
    heads, angles = torch.randn(4, num_heads, head_dim), torch.rand(4, 1, head_dim // 2) * 6
    cos = torch.cat([angles.cos(), angles.cos()], dim=-1)
    sin = torch.cat([-angles.sin(), angles.sin()], dim=-1)
    first, second = heads.chunk(2, dim=-1)
    rotated = torch.view_as_complex(torch.stack([first, second], dim=-1)) * torch.exp(1j * angles)
    expected = torch.cat([rotated.real, rotated.imag], dim=-1)
    torch.testing.assert_close(reference.apply_rope(heads, cos, sin), expected, **CLOSE)


def test_silu_and_mul_keeps_its_input():
    gate_up = torch.randn(3, 10)
    kept = gate_up.clone()
    gate, up = kept[:, :5], kept[:, 5:]
    torch.testing.assert_close(reference.silu_and_mul(gate_up), gate / (1 + torch.exp(-gate)) * up, **CLOSE)
    torch.testing.assert_close(gate_up, kept, rtol=0, atol=0)


def test_write_kv_touches_only_the_given_places():
    k_cache, v_cache = torch.zeros(3, 4, 2, 6), torch.zeros(3, 4, 2, 6)
    k, v = torch.randn(2, 2, 6), torch.randn(2, 2, 6)
    reference.write_kv(k, v, k_cache, v_cache, torch.tensor([2 * 4 + 3, 0 * 4 + 1]))
    for cache, values in ((k_cache, k), (v_cache, v)):
        torch.testing.assert_close(cache[2, 3], values[0], rtol=0, atol=0)
        torch.testing.assert_close(cache[0, 1], values[1], rtol=0, atol=0)
        assert cache.count_nonzero() == values.count_nonzero()


def test_the_reference_serves_the_cpu():
    assert isinstance(operations_for(torch.device("cpu")), CpuOperations)


@dataclass(frozen=True, slots=True)
class Case:
    """A step: decodes of `decode_lens` tokens each, then chunks of (tokens before, tokens of the step)."""

    decode_lens: tuple[int, ...] = ()
    chunks: tuple[tuple[int, int], ...] = ()
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 6
    block_size: int = 8

    @property
    def rows(self) -> list[tuple[int, int]]:
        """(tokens of the step, all tokens) of each row."""
        return [(1, n) for n in self.decode_lens] + [(new, before + new) for before, new in self.chunks]


CASES = {
    "one decode of one token": Case(decode_lens=(1,)),
    "decodes at block borders": Case(decode_lens=(8, 9, 1, 16, 17, 7)),
    "decodes in several groups": Case(decode_lens=tuple(int(n) for n in range(700, 20, -31))),
    "whole prompts": Case(chunks=((0, 1), (0, 8), (0, 23))),
    "chunks behind a prefix": Case(chunks=((5, 7), (8, 8), (31, 1), (16, 40))),
    "mixed": Case(decode_lens=(3, 40, 12), chunks=((0, 9), (11, 3), (40, 1))),
    "one KV head for all": Case(decode_lens=(5, 20), chunks=((4, 9),), num_heads=6, num_kv_heads=1),
    "a KV head for each": Case(decode_lens=(5, 20), chunks=((4, 9),), num_heads=3, num_kv_heads=3),
    "odd head_dim and block size": Case(decode_lens=(5, 20), chunks=((4, 9),), head_dim=20, block_size=3),
}


def make_step(case: Case):
    """Queries, caches full of noise with each row's keys and values in random blocks, the batch, and those rows."""
    num_blocks = [-(-length // case.block_size) for _, length in case.rows]
    order = torch.randperm(sum(num_blocks) + 2).int()
    shape = (len(order), case.block_size, case.num_kv_heads, case.head_dim)
    caches = torch.randn(shape), torch.randn(shape)
    tables = torch.zeros(len(case.rows), max(num_blocks), dtype=torch.int32)
    rows, positions, indices, starts = [], [], [], [0]
    for row, ((new, length), blocks) in enumerate(zip(case.rows, order.split([*num_blocks, 2]), strict=False)):
        tables[row, : len(blocks)] = blocks
        where = torch.arange(length)
        places = blocks[where // case.block_size].long() * case.block_size + where % case.block_size
        rows.append([cache.flatten(0, 1)[places] for cache in caches])
        positions.append(where[-new:])
        indices.append(places[-new:])
        starts.append(starts[-1] + new)
    batch = AttentionBatch(
        num_decode_rows=len(case.decode_lens),
        positions=torch.cat(positions),
        kv_indices=torch.cat(indices),
        block_tables=tables,
        slots=torch.arange(len(tables)),
        seq_lens=torch.tensor([length for _, length in case.rows], dtype=torch.int32),
        query_starts=torch.tensor(starts, dtype=torch.int32),
        host_seq_lens=tuple(length for _, length in case.rows),
        host_query_starts=tuple(starts),
    )
    return torch.randn(starts[-1], case.num_heads, case.head_dim), caches, batch, rows


def dense_attention(q, k, v, scale):
    """The formula, one head and one query at a time. q: [n, heads, d] are the last n of the keys' positions."""
    out = torch.empty_like(q)
    group = q.shape[1] // k.shape[1]
    for i in range(len(q)):
        num_keys = len(k) - len(q) + i + 1
        for head in range(q.shape[1]):
            scores = k[:num_keys, head // group] @ q[i, head] * scale
            out[i, head] = torch.softmax(scores, dim=0) @ v[:num_keys, head // group]
    return out


@pytest.mark.parametrize("name", CASES)
def test_paged_attention_equals_dense_attention(name):
    case = CASES[name]
    q, caches, batch, rows = make_step(case)
    scale = 1 / math.sqrt(case.head_dim)
    out = reference.paged_attention(q, *caches, batch, scale)
    spans = pairwise(batch.host_query_starts)
    expected = [dense_attention(q[a:b], k, v, scale) for (a, b), (k, v) in zip(spans, rows, strict=True)]
    torch.testing.assert_close(out, torch.cat(expected), **CLOSE)


@pytest.mark.parametrize("name", ["decodes in several groups", "mixed"])
def test_what_others_left_reaches_no_row(name):
    """Behind its last block in the table, and behind its last key in that block."""
    case = CASES[name]
    q, caches, batch, _ = make_step(case)
    expected = reference.paged_attention(q, *caches, batch, 0.3)
    spoilt = max(set(range(len(caches[0]))) - set(batch.block_tables.flatten().tolist()))
    for cache in caches:
        cache[spoilt] = torch.nan
    for row, length in enumerate(batch.host_seq_lens):
        batch.block_tables[row, -(-length // case.block_size) :] = spoilt
        if row < batch.num_decode_rows and length % case.block_size:
            caches[1][batch.block_tables[row, length // case.block_size], length % case.block_size :] = torch.nan
    torch.testing.assert_close(reference.paged_attention(q, *caches, batch, 0.3), expected, **CLOSE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_paged_attention_on_a_gpu_equals_that_on_the_cpu(name):
    case = CASES[name]
    q, caches, batch, _ = make_step(case)
    expected = reference.paged_attention(q, *caches, batch, 0.3)
    names = ("positions", "kv_indices", "block_tables", "slots", "seq_lens", "query_starts")
    tensors = {name: getattr(batch, name).cuda() for name in names}
    out = reference.paged_attention(q.cuda(), *(cache.cuda() for cache in caches), replace(batch, **tensors), 0.3)
    # Scores go through another kernel, with another order of sums.
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-4, atol=1e-5)


def test_decodes_that_are_many_share_calls_but_not_results():
    case = CASES["decodes in several groups"]
    _, caches, batch, _ = make_step(case)
    assert len(reference.plan_attention(batch, case.block_size, caches[0].dtype).groups) > 1
