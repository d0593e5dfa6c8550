"""An FP8 cache: what is written to it, bit by bit, and attention over it against the reference on what it holds.

The twin of a kernel that reads it is the reference in float32 on the dequantised cache, so tolerances are those of the
same kernels on other caches: rounding to FP8 itself is in neither.
"""

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from octavo.kernels import fp8_cache, reference
from octavo.kernels.batch import AttentionBatch
from octavo.kernels.chunk_attention import paged_chunk_attention
from octavo.kernels.decode_attention import decode_workspace, paged_decode_attention
from octavo.kernels.fp8_cache import gather_fp8_blocks
from octavo.kernels.gathered_chunks import attend_gathered, is_worth_gathering, plan_gather
from octavo.kernels.ops import Operations
from octavo.kernels.rope_cache import rope_and_cache
from octavo.kernels.triton_ops import TritonOperations

from .test_decode_attention import MANY_ROWS, make_gpu_small

FP8 = fp8_cache.DTYPE
NAN_WORD = 0x7FC07FC0
# As in test_chunk_attention.py. Weights in float16 are rounded less than those in bfloat16.
TOLERANCES = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-6},
    torch.float16: {"rtol": 2**-10, "atol": 2**-11},
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-8},
}
# (query heads, KV heads, head_dim, block size)
SHAPES = [(1, 1, 2, 16), (8, 4, 20, 8), (3, 1, 64, 128), (5, 5, 80, 32), (32, 8, 128, 64), (16, 1, 256, 8)]

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="the GPU has no FP8"
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def to_fp8(rows):
    """The rows' caches in FP8, and their scales; poison stays poison."""
    is_cell = ~rows.k_cache[..., 0].isnan()
    (k, k_scales), (v, v_scales) = (reference.quantise(cache) for cache in (rows.k_cache, rows.v_cache))
    words = torch.stack((k_scales, v_scales), -1).view(torch.int32).squeeze(-1).where(is_cell, NAN_WORD)
    return k, v, words.transpose(1, 2).contiguous()


def held(rows, caches):
    """Rows of what the caches hold, in float32."""
    k, v = reference.dequantise(*caches, torch.float32)
    return replace(rows, k_cache=k, v_cache=v)


def make_step(num_tokens, num_heads, num_kv_heads, head_dim, device, dtype=torch.float32):
    """What a QKV product and the tables of a rotation give."""
    angles = torch.rand(num_tokens, 1, head_dim // 2) * 6
    qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    # Heads with outliers, and of sizes far apart.
    qkv *= torch.exp(torch.randn(head_dim)) * torch.exp(2 * torch.randn(num_tokens, qkv.shape[1], 1))
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
    return tuple(x.to(device, dtype) for x in (qkv, cos, sin))


def new_cache(num_blocks, block_size, num_kv_heads, head_dim, device):
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    k, v = (torch.zeros(shape, device=device).to(FP8) for _ in range(2))
    return k, v, torch.zeros(num_blocks, num_kv_heads, block_size, dtype=torch.int32, device=device)


def assert_same_bits(caches, expected):
    for found, wanted in zip(caches, expected, strict=True):
        views = (x if x.dtype == torch.int32 else x.view(torch.uint8) for x in (found, wanted))
        assert torch.equal(*views)


def test_the_twin_keeps_three_digits_of_the_mantissa_whatever_the_size():
    heads = torch.randn(2000, 64) * 10.0 ** (torch.rand(2000, 1) * 60 - 30)
    q, scales = reference.quantise(heads)
    back = q.float() * scales.float().unsqueeze(-1)
    # Half a unit of the last of four digits, or, among the smallest numbers, of 2**-9 / 448 of the largest.
    assert ((back - heads).abs() <= heads.abs() / 16 + heads.abs().amax(-1, keepdim=True) * (1.01 / 1024 / 448)).all()
    largest = q.float().abs().amax(-1)
    assert largest.max() == 448
    assert (largest >= 416).all(), "a scale rounded up leaves it a step below"


def test_the_twin_of_zeros_is_zeros():
    q, scales = reference.quantise(torch.zeros(3, 8))
    assert not q.float().any()
    assert scales.float().isfinite().all()
    assert (scales > 0).all()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rope_and_cache_writes_what_the_twin_makes_of_plain_caches(shape, dtype, device):
    num_heads, num_kv_heads, head_dim, block_size = shape
    qkv, cos, sin = make_step(5, num_heads, num_kv_heads, head_dim, device, dtype)
    # A row of padding among them, and a head of zeros.
    cells = torch.tensor([2 * block_size + 1, 0, -1, block_size - 1, block_size], device=device)
    qkv[0, num_heads] = 0
    caches, expected = (new_cache(3, block_size, num_kv_heads, head_dim, device) for _ in range(2))
    q = rope_and_cache(qkv, cos, sin, *caches[:2], cells, num_heads, scales=caches[2])

    plain = [cache.to(dtype) for cache in expected[:2]]
    plain_q = rope_and_cache(qkv, cos, sin, *plain, cells, num_heads)
    cells = cells[cells >= 0]
    k, v = (cache.flatten(0, 1)[cells] for cache in plain)
    reference.write_kv(k, v, *expected[:2], cells, expected[2])
    assert torch.equal(q, plain_q)
    assert_same_bits(caches, expected)
    assert (expected[2] != 0).sum() == 4 * num_kv_heads


DECODES = {
    "one token": ((1,), 4, 2, 64, 16, torch.float32),
    "around blocks and tiles": ((15, 16, 17, 31, 32, 33, 64, 65), 4, 2, 64, 16, torch.float32),
    "padding rows": ((0, 40, 0, 0, 7, 0), 4, 2, 64, 16, torch.bfloat16),
    "one long row of many splits": ((430,), 4, 2, 64, 32, torch.float32),
    "short and long rows together": ((3, 321, 64, 129), 8, 2, 128, 16, torch.bfloat16),
    "blocks larger than a tile": ((130, 5, 257), 4, 2, 64, 128, torch.float16),
    "blocks of a tile": ((130, 5, 257), 4, 2, 64, 64, torch.bfloat16),
    "small blocks, odd head_dim": ((9, 100, 64), 4, 2, 20, 8, torch.float32),
    "a head_dim between powers of two": ((70, 200), 4, 2, 80, 16, torch.bfloat16),
    "a head_dim of one dimension a half": ((5, 17), 4, 2, 2, 16, torch.float32),
    "an odd half": ((70, 33), 4, 2, 6, 16, torch.float16),
    "a KV head for each": ((33, 1), 3, 3, 96, 16, torch.float32),
    "eight heads to a KV head": ((50, 260), 8, 1, 64, 16, torch.float16),
    "no row to spare for the new key": ((90, 40), 16, 1, 64, 16, torch.bfloat16),
    "more heads to a KV head than a dot's rows": ((50,), 20, 1, 20, 16, torch.float32),
    "too many rows to split": (MANY_ROWS, 8, 8, 20, 16, torch.float32),
}


def decode(rows, caches, qkv, cos, sin, cells, num_heads):
    num_rows, _, head_dim = qkv.shape
    num_kv_heads, max_keys = caches[0].shape[2], rows.block_tables.shape[1] * caches[0].shape[1]
    workspace = decode_workspace(num_rows, num_heads, num_kv_heads, head_dim, qkv.dtype, max_keys, qkv.device)
    tables = rows.block_tables, rows.slots, rows.seq_lens
    scale = 1 / math.sqrt(head_dim)
    return paged_decode_attention(
        qkv, cos, sin, cells, *caches[:2], *tables, num_heads, scale, workspace, scales=caches[2]
    )


@pytest.mark.parametrize("name", DECODES)
def test_decodes_cache_as_the_other_kernel_does_and_attend_to_what_is_held(name, make_rows, device, monkeypatch):
    seq_lens, num_heads, num_kv_heads, head_dim, block_size, dtype = DECODES[name]
    if seq_lens == MANY_ROWS:
        make_gpu_small(monkeypatch)
    rows = make_rows(seq_lens, block_size, num_kv_heads, head_dim, torch.float32)
    caches = to_fp8(rows)
    qkv, cos, sin = make_step(len(seq_lens), num_heads, num_kv_heads, head_dim, device, dtype)
    last = (rows.seq_lens.long() - 1).clamp(min=0)
    blocks = rows.block_tables[rows.slots].gather(1, (last // block_size).unsqueeze(1)).squeeze(1)
    real = rows.seq_lens > 0
    cells = (blocks * block_size + last % block_size).where(real, -1)
    expected = tuple(cache.clone() for cache in caches)
    q = rope_and_cache(qkv, cos, sin, *expected[:2], cells, num_heads, scales=expected[2])

    out = decode(rows, caches, qkv, cos, sin, cells, num_heads)

    assert_same_bits(caches, expected)
    assert out.dtype == dtype
    assert not out[~real].count_nonzero()
    exact = held(rows, expected).attend(q[real], (1,) * len(q), 1 / math.sqrt(head_dim))
    bound = TOLERANCES[dtype]
    # Against the size of a row's outputs: sums of values with outliers.
    size = exact.abs().amax((1, 2), keepdim=True).clamp(min=1)
    torch.testing.assert_close(out[real].float() / size, exact / size, **bound)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("exponent", [-20, 0, 12])
def test_scales_of_any_size_and_far_apart(exponent, dtype, make_rows, device):
    rows = make_rows((200,), 16, 1, 64, torch.float32)
    # Values of which each is up to 2**12 times another, small ones first and last.
    keys = torch.arange(rows.v_cache.shape[0] * 16, device=device).view(-1, 16, 1, 1)
    rows = replace(rows, v_cache=rows.v_cache * 2.0 ** (exponent - (keys % 13)))
    caches = to_fp8(rows)
    q = torch.randn(1, 2, 64).to(dtype).to(device)
    one, no_cell = q.new_ones(1, 1, 64), torch.full((1,), -1, device=device)
    qkv = torch.cat([q, q.new_zeros(1, 2, 64)], 1)
    out = decode(rows, caches, qkv, one, torch.zeros_like(one), no_cell, 2)
    starts = torch.tensor([0, 1], dtype=torch.int32, device=device)
    tables = rows.block_tables, rows.slots, rows.seq_lens
    chunk = paged_chunk_attention(q, *caches[:2], *tables, starts, 1, 1 / 8, scales=caches[2])
    exact = held(rows, caches).attend(q, (1,), 1 / 8)
    size = exact.abs().max()
    for found in (out, chunk):
        if dtype == torch.float16 and exponent == -20:
            continue  # outputs are below what it can hold
        torch.testing.assert_close(found.float() / size, exact / size, **TOLERANCES[dtype])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_graph_serves_rows_of_any_length(make_rows, device):
    rows = make_rows((3000, 3000, 3000), 16, 8, 128, torch.float32)
    caches = to_fp8(rows)
    caches = *(x.float().nan_to_num().to(FP8) for x in caches[:2]), caches[2].where(caches[2] != NAN_WORD, 0)
    qkv, cos, sin = make_step(3, 32, 8, 128, device, torch.bfloat16)
    cells = torch.full((3,), -1, device=device)
    decode(rows, caches, qkv, cos, sin, cells, 32)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode(rows, caches, qkv, cos, sin, cells, 32)
    tables = rows.block_tables[rows.slots]
    for lens in ((1, 65, 3000), (2999, 0, 130), (0, 0, 0)):
        rows.seq_lens.copy_(torch.tensor(lens))
        last = (rows.seq_lens.long() - 1).clamp(min=0)
        blocks = tables.gather(1, (last // 16).unsqueeze(1)).squeeze(1)
        cells.copy_((blocks * 16 + last % 16).where(rows.seq_lens > 0, -1))
        qkv.normal_()
        expected = decode(rows, tuple(cache.clone() for cache in caches), qkv, cos, sin, cells, 32)
        for _ in range(20):
            graph.replay()
        torch.testing.assert_close(out, expected, rtol=0, atol=0)


CHUNKS = {
    "one token": (((0, 1),), 4, 2, 64, 16, torch.float32),
    "whole prompts": (((0, 16), (0, 17), (0, 40), (0, 1)), 4, 2, 20, 16, torch.float32),
    "around tiles of keys": (((63, 1), (64, 1), (62, 2), (31, 33), (32, 32)), 4, 2, 20, 16, torch.float32),
    "padding rows": (((0, 0), (20, 12), (0, 0), (0, 5), (0, 0)), 4, 2, 20, 16, torch.float32),
    "a prompt of several tiles": (((0, 300),), 2, 1, 128, 16, torch.bfloat16),
    "several tiles behind a prefix": (((411, 289), (0, 140), (70, 2)), 2, 1, 64, 32, torch.float16),
    "a few tokens in half precision": (((130, 9), (0, 16), (15, 1)), 4, 2, 64, 16, torch.bfloat16),
    "blocks larger than a tile": (((130, 70), (0, 129)), 4, 2, 64, 128, torch.bfloat16),
    "small blocks, a head_dim between powers of two": (((9, 100),), 4, 2, 80, 8, torch.float16),
    "a KV head for each": (((33, 20),), 3, 3, 96, 16, torch.float32),
    "eight heads to a KV head": (((50, 30),), 8, 1, 64, 16, torch.float16),
    "the largest head_dim": (((50, 40),), 2, 1, 256, 16, torch.bfloat16),
}


@pytest.mark.parametrize("name", CHUNKS)
def test_chunks_attend_to_what_is_held(name, make_rows, device):
    chunks, num_heads, num_kv_heads, head_dim, block_size, dtype = CHUNKS[name]
    query_lens, seq_lens = tuple(new for _, new in chunks), tuple(map(sum, chunks))
    rows = make_rows(seq_lens, block_size, num_kv_heads, head_dim, torch.float32)
    caches = to_fp8(rows)
    q = torch.randn(sum(query_lens), num_heads, head_dim).to(dtype).to(device)
    starts = torch.tensor((0, *query_lens)).cumsum(0).int().to(device)
    tables, scale = (rows.block_tables, rows.slots, rows.seq_lens), 1 / math.sqrt(head_dim)
    out = paged_chunk_attention(q, *caches[:2], *tables, starts, max(query_lens), scale, scales=caches[2])
    exact = held(rows, caches).attend(q, query_lens, scale)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), exact, **TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("num_kv_heads", "head_dim", "block_size"), [(2, 64, 16), (5, 20, 8), (3, 128, 128)])
def test_gathered_blocks_are_what_is_held(num_kv_heads, head_dim, block_size, dtype, make_rows, device):
    rows = make_rows((block_size * 4,), block_size, num_kv_heads, head_dim, torch.float32)
    caches = to_fp8(rows)
    block_ids = rows.block_tables[rows.slots[0], torch.tensor([2, 0, 3], device=device)]
    found = gather_fp8_blocks(*caches, block_ids, dtype)
    expected = (cache[block_ids].flatten(0, 1) for cache in reference.dequantise(*caches, dtype))
    # Triton's interpreter truncates to bfloat16.
    bound = 2**-7 if dtype == torch.bfloat16 and device.type == "cpu" else 0
    torch.testing.assert_close(found, tuple(expected), rtol=bound, atol=0)


def make_batch(rows, query_lens, kv_indices, device):
    starts = (0, *torch.tensor(query_lens).cumsum(0).tolist())
    lens = rows.host_seq_lens
    positions = [p for n, length in zip(query_lens, lens, strict=True) for p in range(length - n, length)]
    return AttentionBatch(
        num_decode_rows=next((i for i, n in enumerate(query_lens) if n > 1), len(query_lens)),
        positions=torch.tensor(positions, device=device),
        kv_indices=kv_indices,
        block_tables=rows.block_tables.where(rows.block_tables < len(rows.k_cache), 0),
        slots=rows.slots,
        seq_lens=rows.seq_lens,
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        host_seq_lens=lens,
        host_query_starts=starts,
    )


def test_chunks_over_gathered_keys_attend_to_what_is_held(make_rows, device):
    query_lens = (1, 1, 12, 140, 16, 3)
    rows = make_rows((40, 7, 30, 165, 16, 70), 16, 2, 64, torch.float32)
    caches = to_fp8(rows)
    q = torch.randn(sum(query_lens), 4, 64).half().to(device)
    out = torch.full_like(q, 7.0)
    plan = plan_gather(make_batch(rows, query_lens, rows.slots, device), 4, 16)
    assert attend_gathered(q, *caches[:2], plan, 0.1, out, caches[2]) is out
    expected = held(rows, caches).attend(q, query_lens, 0.1)
    # The copied keys and values are rounded too.
    torch.testing.assert_close(out[2:].float(), expected[2:], rtol=2**-9, atol=2**-10)
    assert (out[:2] == 7).all(), "decodes are another kernel's"


def test_gathers_earlier_than_from_other_caches(make_rows, device):
    rows = make_rows((300,), 16, 2, 64, torch.float32)
    batch = make_batch(rows, (300,), rows.slots, device)
    assert is_worth_gathering(batch, 128, torch.bfloat16, is_fp8=True)
    assert not is_worth_gathering(batch, 128, torch.bfloat16)
    long = replace(batch, host_seq_lens=(16 * 300,))
    assert is_worth_gathering(long, 128, torch.bfloat16, is_fp8=True)
    assert not is_worth_gathering(replace(long, host_seq_lens=(16 * 300 + 1,)), 128, torch.bfloat16, is_fp8=True)
    assert not is_worth_gathering(batch, 80, torch.bfloat16, is_fp8=True)


@pytest.mark.parametrize(
    ("seq_lens", "query_lens"),
    [((70, 3, 33, 1), (1, 1, 1, 1)), ((33, 5, 17), (20, 5, 1)), ((70, 3, 33, 5, 17), (1, 1, 20, 5, 1))],
    ids=["decodes", "chunks", "both"],
)
def test_a_step_equals_the_reference(seq_lens, query_lens, make_rows, device):
    rows = make_rows(seq_lens, 16, 2, 20, torch.float32)
    positions = [(row, seq_lens[row] - n + i) for row, n in enumerate(query_lens) for i in range(n)]
    tables = rows.block_tables[rows.slots]
    cells = [int(tables[row, p // 16]) * 16 + p % 16 for row, p in positions]
    batch = make_batch(rows, query_lens, torch.tensor(cells, device=device), device)
    # One token at the end of a prompt is a chunk, not a decode, where only chunks come.
    batch = replace(batch, num_decode_rows=4 if len(seq_lens) == 4 else len(seq_lens) - 3)
    qkv, *_ = make_step(sum(query_lens), 4, 2, 20, device)
    # By no angle: the twin rounds rotations otherwise, and what is next to a tie would be another number in FP8.
    rope, found = (torch.ones(len(qkv), 1, 20, device=device), torch.zeros(len(qkv), 1, 20, device=device)), []
    for ops in (TritonOperations(device), Operations()):
        k, v, words = to_fp8(rows)
        # The reference reads whole blocks, also where no key is yet.
        caches = *(x.float().nan_to_num().to(FP8) for x in (k, v)), words.where(words != NAN_WORD, 0)
        plan = ops.plan_attention(batch, 16, torch.float32)
        outs = [ops.attention(qkv + layer, rope, caches, batch.kv_indices, plan, 4, 0.3) for layer in range(2)]
        found.append((outs, caches))
    (outs, caches), (expected, expected_caches) = found
    # Outputs reach some 30.
    torch.testing.assert_close(outs, expected, rtol=2e-5, atol=1e-4)
    assert_same_bits(caches, expected_caches)


def test_how_a_prompt_is_cut_changes_only_the_last_digits(make_rows, device):
    """In float32: with one pass of 40 tokens, or 25 and then 15, keys and values are the same."""
    rows = make_rows((40,), 16, 2, 64, torch.float32)
    table = rows.block_tables[rows.slots[0]]
    cells = torch.arange(40, device=device)
    cells = table[cells // 16].long() * 16 + cells % 16
    qkv, cos, sin = make_step(40, 4, 2, 64, device)
    ops, found = TritonOperations(device), []
    for parts in ((40,), (25, 15), (39, 1)):
        caches, outs, start = new_cache(len(rows.k_cache), 16, 2, 64, device), [], 0
        for part in parts:
            end = start + part
            lens = torch.tensor([end], dtype=torch.int32, device=device)
            now = replace(rows, seq_lens=lens, host_seq_lens=(end,))
            batch = make_batch(now, (part,), cells[start:end], device)
            plan = ops.plan_attention(batch, 16, torch.float32)
            rope = cos[start:end], sin[start:end]
            outs.append(ops.attention(qkv[start:end].contiguous(), rope, caches, cells[start:end], plan, 4, 0.1))
            start = end
        found.append((torch.cat(outs), caches))
    (whole, caches), *others = found
    for out, other_caches in others:
        assert_same_bits(other_caches, caches)
        torch.testing.assert_close(out, whole, rtol=2e-5, atol=1e-4)


def test_cells_behind_two_to_the_31_elements(device):
    # 2 GiB each, of which only the pages in use are ever touched.
    cache = torch.empty(2**14 + 8, 128, 8, 128, dtype=torch.uint8, device=device).view(FP8)
    keys, key_scales = reference.quantise(torch.randn(128, 8, 128).to(device))
    cache[-1] = keys
    scales = torch.zeros(len(cache), 8, 128, dtype=torch.int32, device=device)
    scales[-1] = torch.stack((key_scales, key_scales), -1).view(torch.int32).squeeze(-1).T
    tables = torch.tensor([[len(cache) - 1]], dtype=torch.int32, device=device)
    slots, lens = torch.zeros(1, dtype=torch.int64, device=device), torch.tensor([37], dtype=torch.int32, device=device)
    q = torch.randn(1, 8, 128).to(torch.bfloat16).to(device)
    qkv, one = torch.cat([q, q.new_zeros(1, 16, 128)], 1), q.new_ones(1, 1, 128)
    workspace = decode_workspace(1, 8, 8, 128, torch.bfloat16, 128, device)
    no_cell, starts = torch.full((1,), -1, device=device), torch.tensor([0, 1], dtype=torch.int32, device=device)
    outs = (
        paged_decode_attention(
            qkv, one, torch.zeros_like(one), no_cell, cache, cache, tables, slots, lens, 8, 0.1, workspace, None, scales
        ),
        paged_chunk_attention(q, cache, cache, tables, slots, lens, starts, 1, 0.1, scales=scales),
    )
    held_keys = (keys.float() * key_scales.float().unsqueeze(-1))[:37].transpose(0, 1)
    expected = torch.softmax(q[0].float().unsqueeze(1) @ held_keys.mT * 0.1, -1) @ held_keys
    for out in outs:
        torch.testing.assert_close(out[0].float(), expected.squeeze(1), **TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": None}, "float8_e4m3fn and .* of the caches: torch.float32 is needed"),
        ({"k_cache": torch.zeros(4, 16, 2, 64)}, "torch.float32 and .* torch.float8_e4m3fn is needed"),
        ({"scales": torch.zeros(4, 16, 2, dtype=torch.int32)}, r"\(4, 2, 16\) of int32"),
        ({"scales": torch.zeros(4, 2, 16)}, "of torch.float32"),
        ({"scales": torch.zeros(4, 16, 2, dtype=torch.int32).mT}, "contiguous"),
    ],
)
def test_refuses_what_is_no_fp8_cache(changes, message, device):
    given = {
        "k_cache": torch.zeros(4, 16, 2, 64).to(FP8),
        "v_cache": torch.zeros(4, 16, 2, 64).to(FP8),
        "scales": torch.zeros(4, 2, 16, dtype=torch.int32),
    } | changes
    given = {name: x if x is None else x.to(device) for name, x in given.items()}
    qkv, cos = torch.zeros(2, 8, 64, device=device), torch.zeros(2, 1, 64, device=device)
    cells, starts = torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int32)
    tables = torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)
    cells, starts, *tables = (x.to(device) for x in (cells, starts, *tables))
    workspace = decode_workspace(4, 4, 2, 64, torch.float32, 64, device)
    caches, scales = (given["k_cache"], given["v_cache"]), given["scales"]
    calls = (
        lambda: rope_and_cache(qkv, cos, cos, *caches, cells, 4, scales=scales),
        lambda: paged_decode_attention(qkv, cos, cos, cells, *caches, *tables, 4, 0.1, workspace, scales=scales),
        lambda: paged_chunk_attention(qkv[:, :4].contiguous(), *caches, *tables, starts, 1, 0.1, scales=scales),
    )
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
