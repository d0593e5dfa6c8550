"""The CPU's kernels against their torch twins, on odd shapes, by one thread and by several."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from octavo.kernels import cpu_attention, cpu_linear, cpu_pointwise, cpu_sampling, reference
from octavo.kernels.batch import AttentionBatch
from octavo.kernels.cpu import CpuOperations
from octavo.kernels.cpu_launch import KernelThreads
from octavo.workers.parallel import TensorParallel
from octavo.workers.sampler.gumbel import gumbel_noise
from octavo.workers.sampler.vocab import VocabSlice

DTYPES = [torch.float32, torch.bfloat16]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=[1, 3])
def threads(request):
    """With several, the smallest work is split too."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield KernelThreads(least_work=1)
    torch.set_num_threads(before)


def close(dtype, num_terms=1):
    """Of a sum of terms about 1 in another order; bfloat16 is rounded once or twice."""
    if dtype == torch.bfloat16:
        return {"rtol": 2 * torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps}
    return {"rtol": 2e-6 * num_terms**0.5, "atol": 1e-6 * num_terms**0.5}


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("in_size", "out_size"), [(1, 32), (7, 96), (65, 64), (704, 256)])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 8, 15, 64, 79, 129])
def test_linear(threads, num_tokens, in_size, out_size, has_bias):
    x, weight = torch.randn(num_tokens, in_size), torch.randn(out_size, in_size)
    bias = torch.randn(out_size) if has_bias else None
    product = cpu_linear.linear(threads, x, cpu_linear.pack(weight), bias)
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    # Each rounding is of a partial sum about the square root of its terms; they add up as in a random walk.
    torch.testing.assert_close(product.double(), expected, rtol=0, atol=3e-7 * in_size + 1e-6)


def test_linear_takes_a_view_of_tokens():
    x, weight = torch.randn(5, 48)[:, ::2], torch.randn(32, 24)
    expected = reference.linear(x, weight, None)
    torch.testing.assert_close(cpu_linear.linear(KernelThreads(), x, cpu_linear.pack(weight), None), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_size", [64, 70])
def test_operations_multiply_with_what_they_packed(dtype, out_size):
    ops, x, weight = CpuOperations(), torch.randn(5, 24).to(dtype), torch.randn(out_size, 24).to(dtype)
    product = ops.linear(x, ops.pack_weight(weight.clone()), None)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(product.float(), reference.linear(x.float(), weight.float(), None), rtol=eps, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 257), (33, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(threads, dtype, shape):
    x, residual, weight = (torch.randn(size).to(dtype) for size in (shape, shape, shape[1]))
    kept = x.clone(), residual.clone()
    normed, total = cpu_pointwise.add_rms_norm(threads, x, residual, weight, 1e-5)
    expected, expected_total = reference.add_rms_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(total, expected_total, rtol=0, atol=0)
    torch.testing.assert_close(normed, expected, **close(dtype))
    torch.testing.assert_close(
        cpu_pointwise.rms_norm(threads, x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), **close(dtype)
    )
    assert torch.equal(x, kept[0])
    assert torch.equal(residual, kept[1])


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 33), (7, 704)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul(threads, dtype, shape):
    # To where exp overflows.
    gate_up = torch.randn(shape[0], 2 * shape[1]) * torch.tensor([1.0, 10.0, 100.0])[torch.arange(shape[0]) % 3, None]
    gate_up = gate_up.to(dtype)
    expected = reference.silu_and_mul(gate_up.float()).to(dtype)
    torch.testing.assert_close(cpu_pointwise.silu_and_mul(threads, gate_up), expected, **close(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_stays_in_its_row(dtype):
    threads, x = KernelThreads(), torch.ones(3, 40, dtype=dtype)
    x[1, 35] = torch.nan
    weight = torch.ones(40, dtype=dtype)
    assert cpu_pointwise.rms_norm(threads, x, weight, 1e-5).isnan().any(1).tolist() == [False, True, False]
    assert cpu_pointwise.silu_and_mul(threads, x).isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(1, 1, 2), (6, 2, 20), (4, 1, 64), (3, 3, 34)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_and_cache(threads, dtype, num_heads, num_kv_heads, head_dim):
    num_tokens = 7
    qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim).to(dtype)
    angles = torch.rand(num_tokens, 1, head_dim // 2) * 6
    cos = torch.cat([angles.cos(), angles.cos()], dim=-1).to(dtype)
    sin = torch.cat([-angles.sin(), angles.sin()], dim=-1).to(dtype)
    indices = torch.randperm(3 * 5)[:num_tokens]
    caches = torch.randn(2, 3, 5, num_kv_heads, head_dim).to(dtype)
    expected_caches = caches.clone()
    expected = reference.rope_and_cache(qkv, cos, sin, *expected_caches, indices, num_heads)
    q = cpu_attention.rope_and_cache(threads, qkv, (cos, sin), tuple(caches), indices, num_heads)
    torch.testing.assert_close(q, expected, **close(dtype))
    torch.testing.assert_close(caches, expected_caches, **close(dtype))


STEPS = {  # tokens of each row, and how many of them are this step's
    "one token": ((1,), (1,)),
    "decodes": ((8, 9, 1, 16, 17, 7, 130), (1,) * 7),
    "prompts": ((1, 8, 23, 70), (1, 8, 23, 70)),
    "mixed": ((3, 40, 12, 9, 41, 100), (1, 1, 1, 9, 3, 60)),
}
SHAPES = [(1, 1, 2, 8), (6, 1, 20, 16), (4, 2, 32, 16), (3, 3, 64, 32), (8, 2, 128, 8), (2, 2, 50, 3)]


def batch_of(rows, query_lens):
    starts = [sum(query_lens[:row]) for row in range(len(query_lens) + 1)]
    positions = [torch.arange(n - new, n) for n, new in zip(rows.host_seq_lens, query_lens, strict=True)]
    return AttentionBatch(
        num_decode_rows=next((i for i, n in enumerate(query_lens) if n > 1), len(query_lens)),
        positions=torch.cat(positions),
        kv_indices=torch.empty(0, dtype=torch.int64),
        block_tables=rows.block_tables.cpu(),
        slots=rows.slots,
        seq_lens=rows.seq_lens.cpu(),
        query_starts=torch.tensor(starts, dtype=torch.int32),
        host_seq_lens=rows.host_seq_lens,
        host_query_starts=tuple(starts),
    )


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim", "block_size"), SHAPES)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attend(make_rows, threads, dtype, step, num_heads, num_kv_heads, head_dim, block_size):
    seq_lens, query_lens = STEPS[step]
    rows = make_rows(seq_lens, block_size, num_kv_heads, head_dim, dtype)
    rows = replace(rows, k_cache=rows.k_cache.cpu(), v_cache=rows.v_cache.cpu())
    q = torch.randn(sum(query_lens), num_heads, head_dim).to(dtype)
    scale = head_dim**-0.5
    caches = rows.k_cache, rows.v_cache
    out = cpu_attention.attend(threads, q, caches, batch_of(rows, query_lens), scale)
    assert out.dtype == dtype
    expected = rows.attend(q, query_lens, scale).to(dtype)
    torch.testing.assert_close(out, expected, **close(dtype, num_terms=head_dim))


LONG_CONTEXT = """
import torch
from octavo.kernels import cpu_attention
from octavo.kernels.batch import AttentionBatch
from octavo.kernels.cpu_launch import KernelThreads
n = 40_000
ids, zero = torch.arange(n, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
tables, lens, starts = ids[None, : n // 16].contiguous(), torch.tensor([n], dtype=torch.int32), ids[:2]
batch = AttentionBatch(1, zero + n - 1, zero[:0], tables, zero, lens, starts, (n,), (0, 1))
caches = torch.ones(2, n // 16, 16, 2, 32)
out = cpu_attention.attend(KernelThreads(), torch.ones(1, 8, 32), (caches[0], caches[1]), batch, 0.2)
torch.testing.assert_close(out, torch.ones(1, 8, 32))
"""


def test_what_a_kernel_works_in_is_not_freed_before():
    """In a process of its own, where so much memory goes back to the system when it is freed: its use is the end."""
    run = subprocess.run([sys.executable, "-c", LONG_CONTEXT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_scores_far_apart_and_far_from_zero(make_rows):
    rows = make_rows((50,), 16, 1, 16, torch.float32)
    q = torch.randn(1, 1, 16) * 300
    out = cpu_attention.attend(KernelThreads(), q, (rows.k_cache.cpu(), rows.v_cache.cpu()), batch_of(rows, (1,)), 1.0)
    torch.testing.assert_close(out, rows.attend(q, (1,), 1.0), rtol=1e-4, atol=1e-5)  # of scores to 3,000


def test_a_nan_in_one_head_stays_there(make_rows):
    rows = make_rows((20, 20), 16, 2, 16, torch.float32)
    q = torch.randn(2, 4, 16)
    q[1, 2, 3] = torch.nan
    caches = rows.k_cache.cpu(), rows.v_cache.cpu()
    out = cpu_attention.attend(KernelThreads(), q, caches, batch_of(rows, (1, 1)), 1.0)
    assert out.isnan().all(-1).nonzero().tolist() == [[1, 2]]
    assert out.isnan().any(-1).nonzero().tolist() == [[1, 2]]


def draws(threads, logits, first=0):
    """Each row's best, where the last one is greedy."""
    torch.manual_seed(5)
    num_rows = len(logits)
    seeds, positions = torch.randint(0, 2**32, (num_rows, 2)), torch.randint(0, 2**20, (num_rows,))
    temperatures = torch.rand(num_rows) + 0.3
    temperatures[-1] = 0
    best = cpu_sampling.find_best(threads, logits, temperatures, seeds, positions, first)
    return best, temperatures[:, None], seeds, positions


@pytest.mark.parametrize(("size", "first"), [(1, 0), (1, 3), (31, 0), (64, 33), (4096, 0), (1001, 3002)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_best_is_the_twins(threads, dtype, size, first):
    logits = (torch.randn(9, size) * 3).to(dtype)
    (scores, columns), temperatures, seeds, positions = draws(threads, logits, first)
    noise = gumbel_noise(seeds, positions, VocabSlice(TensorParallel(0, 1, CPU), first, size, first + size))
    noise = noise.where(temperatures > 0, 0)
    expected = logits.float() * temperatures.where(temperatures > 0, 1).reciprocal() + noise
    assert columns.tolist() == expected.argmax(-1).tolist()
    # Logarithms to a few units in the last place.
    torch.testing.assert_close(scores, expected.amax(-1), rtol=3e-7, atol=1e-6)


def test_a_slice_draws_what_the_whole_vocabulary_does():
    threads, logits = KernelThreads(), torch.randn(9, 1000)
    (scores, columns), *_ = draws(threads, logits)
    parts = [draws(threads, logits[:, a:b].contiguous(), a)[0] for a, b in ((0, 13), (13, 400), (400, 1000))]
    best = torch.stack([part[0] for part in parts])
    assert torch.equal(best.amax(0), scores)
    offsets = torch.tensor([0, 13, 400])
    chosen = torch.stack([part[1] for part in parts]).gather(0, best.argmax(0)[None])[0]
    assert torch.equal(chosen + offsets[best.argmax(0)], columns)


def test_equal_logits_give_the_lowest_and_what_is_no_number_never_wins():
    logits = torch.full((4, 50), -torch.inf)
    logits[1, [7, 20, 49]] = 3.0
    logits[2] = torch.nan
    logits[3, [0, 30]], logits[3, 40] = torch.nan, torch.inf
    zeros = torch.zeros(4, dtype=torch.int64)
    seeds = torch.zeros(4, 2, dtype=torch.int64)
    _, columns = cpu_sampling.find_best(KernelThreads(), logits, torch.zeros(4), seeds, zeros, 0)
    assert columns.tolist() == [0, 7, 0, 40]
    _, columns = cpu_sampling.find_best(KernelThreads(), logits, torch.ones(4), seeds, zeros, 0)
    assert columns[[0, 2, 3]].tolist() == [0, 0, 40]
    assert columns[1] in (7, 20, 49)
