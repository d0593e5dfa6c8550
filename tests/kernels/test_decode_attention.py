"""Decode attention against the reference in float32: odd shapes, splits and their merge, padding, poisoned caches.

What it does with new keys is compared with the kernel that only rotates and caches.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch

pytest.importorskip("triton")

from octavo.kernels import decode_attention, decode_splits
from octavo.kernels.decode_attention import decode_workspace, paged_decode_attention
from octavo.kernels.decode_splits import decode_config
from octavo.kernels.rope_cache import rope_and_cache
from octavo.kernels.shared_prefixes import max_prefix_parts

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
    """A step of decodes; a row of no tokens is a padding row."""

    seq_lens: tuple[int, ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32


# Rows of 8 KV heads that fill the GPU, so that each is one split, however long. In the interpreter, whose programs take
# milliseconds, a GPU of 16 multiprocessors.
MANY_ROWS = (79, 64, 33, 1, 32, *range(2, 31)) if torch.cuda.is_available() else (79, 64, 33, 1, 32)


def make_gpu_small(monkeypatch):
    if not torch.cuda.is_available():
        for module in (decode_attention, decode_splits):
            monkeypatch.setattr(module, "num_sms", lambda device: 16)
        assert decode_splits.decode_config(len(MANY_ROWS), 8, 8, 20, torch.float32, 96, 16).num_splits == 1


CASES = {
    "one token": Case((1,)),
    "around blocks and tiles": Case((15, 16, 17, 31, 32, 33, 64, 65)),
    "padding rows": Case((0, 40, 0, 0, 7, 0)),
    "only padding rows": Case((0, 0)),
    "one long row of many splits": Case((430,), block_size=32),
    "short and long rows together": Case((3, 321, 64, 129), num_heads=8, head_dim=128, dtype=torch.bfloat16),
    "more splits than one merge tile": Case((900,), 4, 1, 128, 16, torch.bfloat16),
    "blocks larger than a tile": Case((130, 5, 257), block_size=128, dtype=torch.float16),
    "small blocks, odd head_dim": Case((9, 100, 64), head_dim=20, block_size=8),
    "a head_dim between powers of two": Case((70, 200), head_dim=80, dtype=torch.bfloat16),
    "a KV head for each": Case((33, 1), num_heads=3, num_kv_heads=3, head_dim=96),
    "eight heads to a KV head": Case((50, 260), num_heads=8, num_kv_heads=1, dtype=torch.float16),
    "more heads to a KV head than a dot's rows": Case((50,), num_heads=20, num_kv_heads=1, head_dim=20),
    "too many rows to split": Case(MANY_ROWS, num_heads=8, num_kv_heads=8, head_dim=20),
}


def as_qkv(q, num_kv_heads):
    """The arguments that have the kernel attend with `q` as they are to what is cached already."""
    num_rows, _, head_dim = q.shape
    cos, no_cell = q.new_ones(num_rows, 1, head_dim), torch.full((num_rows,), -1, device=q.device)
    return torch.cat([q, q.new_zeros(num_rows, 2 * num_kv_heads, head_dim)], 1), cos, torch.zeros_like(cos), no_cell


def run(rows, q, scale, workspace=None, out=None):
    """The kernel's output, by default with a workspace of its own."""
    _, num_heads, head_dim = q.shape
    num_kv_heads, max_keys = rows.k_cache.shape[2], rows.block_tables.shape[1] * rows.k_cache.shape[1]
    shape = (len(q), num_heads, num_kv_heads, head_dim, q.dtype, max_keys, q.device)
    tables = rows.block_tables, rows.slots, rows.seq_lens
    inputs = (*as_qkv(q, num_kv_heads), rows.k_cache, rows.v_cache, *tables)
    return paged_decode_attention(*inputs, num_heads, scale, workspace or decode_workspace(*shape), out)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name, make_rows, device, monkeypatch):
    case = CASES[name]
    if case.seq_lens == MANY_ROWS:
        make_gpu_small(monkeypatch)
    rows = make_rows(case.seq_lens, case.block_size, case.num_kv_heads, case.head_dim, case.dtype)
    q = torch.randn(len(case.seq_lens), case.num_heads, case.head_dim).to(case.dtype).to(device)
    scale = 1 / math.sqrt(case.head_dim)
    out = run(rows, q, scale)
    real = rows.seq_lens > 0
    assert out.dtype == case.dtype
    assert not out[~real].count_nonzero()
    if real.any():
        expected = rows.attend(q[real], (1,) * len(q), scale)
        torch.testing.assert_close(out[real].float(), expected, **TOLERANCES[case.dtype])


@dataclass(frozen=True, slots=True)
class NewTokens:
    """One new token for each row whose last cell is poison: what the model's QKV projection gives, and its place."""

    qkv: torch.Tensor  # [num_rows, num_heads + 2 * num_kv_heads, head_dim]
    cos: torch.Tensor  # [num_rows, 1, head_dim]
    sin: torch.Tensor
    kv_indices: torch.Tensor  # [num_rows] int64


def add_new_tokens(rows, num_heads):
    """New tokens for the last positions of `rows`, whose cells are poisoned."""
    _, block_size, num_kv_heads, head_dim = rows.k_cache.shape
    num_rows, device, dtype = len(rows.host_seq_lens), rows.k_cache.device, rows.k_cache.dtype
    last = (rows.seq_lens.long() - 1).clamp(min=0)
    blocks = rows.block_tables[rows.slots].gather(1, (last // block_size).unsqueeze(1)).squeeze(1)
    kv_indices = (blocks * block_size + last % block_size).where(rows.seq_lens > 0, -1)
    for cache in (rows.k_cache, rows.v_cache):
        cache.flatten(0, 1)[kv_indices[kv_indices >= 0]] = torch.nan
    angles = torch.rand(num_rows, 1, head_dim // 2) * 6
    qkv = torch.randn(num_rows, num_heads + 2 * num_kv_heads, head_dim)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
    return NewTokens(*(x.to(device, dtype) for x in (qkv, cos, sin)), kv_indices)


def run_qkv(rows, new, num_heads, scale, workspace=None, out=None):
    """The kernel's output; the new keys and values are in the rows' caches."""
    num_rows, _, head_dim = new.qkv.shape
    _, block_size, num_kv_heads, _ = rows.k_cache.shape
    max_keys = rows.block_tables.shape[1] * block_size
    shape = (num_rows, num_heads, num_kv_heads, head_dim, new.qkv.dtype, max_keys, new.qkv.device)
    return paged_decode_attention(
        new.qkv,
        new.cos,
        new.sin,
        new.kv_indices,
        rows.k_cache,
        rows.v_cache,
        rows.block_tables,
        rows.slots,
        rows.seq_lens,
        num_heads,
        scale,
        workspace or decode_workspace(*shape),
        out,
    )


QKV_CASES = CASES | {
    "a head_dim of one dimension a half": Case((5, 17), head_dim=2),
    "an odd half": Case((70, 33), head_dim=6, dtype=torch.float16),
    "no row to spare for the new key": Case((90, 40), num_heads=16, num_kv_heads=1, dtype=torch.bfloat16),
    "one row to spare": Case((90, 3), num_heads=15, num_kv_heads=1, head_dim=20),
    "the new key alone in its split": Case((65, 129, 193), num_heads=8, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", QKV_CASES)
def test_rotates_caches_and_attends_like_the_kernels_for_each(name, make_rows, device, monkeypatch):
    case = QKV_CASES[name]
    if case.seq_lens == MANY_ROWS:
        make_gpu_small(monkeypatch)
    rows = make_rows(case.seq_lens, case.block_size, case.num_kv_heads, case.head_dim, case.dtype)
    new = add_new_tokens(rows, case.num_heads)
    expected = replace(rows, k_cache=rows.k_cache.clone(), v_cache=rows.v_cache.clone())
    q = rope_and_cache(new.qkv, new.cos, new.sin, expected.k_cache, expected.v_cache, new.kv_indices, case.num_heads)
    scale = 1 / math.sqrt(case.head_dim)

    out = run_qkv(rows, new, case.num_heads, scale)

    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close((rows.k_cache, rows.v_cache), (expected.k_cache, expected.v_cache), **same)
    real = rows.seq_lens > 0
    assert out.dtype == case.dtype
    assert not out[~real].count_nonzero()
    if real.any():
        exact = expected.attend(q[real], (1,) * len(q), scale)
        torch.testing.assert_close(out[real].float(), exact, **TOLERANCES[case.dtype])


def test_a_sequence_grows_by_its_own_new_keys(make_rows, device):
    rows = make_rows((70, 62, 1), 16, 2, 64, torch.float32)
    workspace = decode_workspace(3, 4, 2, 64, torch.float32, rows.block_tables.shape[1] * 16, device)
    for lens in ((61, 62, 0), (62, 0, 1), (63, 0, 0), (64, 0, 0), (65, 0, 0)):
        rows.seq_lens.copy_(torch.tensor(lens))
        rows = replace(rows, host_seq_lens=lens)
        new = add_new_tokens(rows, 4)
        out = run_qkv(rows, new, 4, 0.1, workspace)
        # Once more, on what is cached by now: rotating is all that this does.
        caches = rows.k_cache.clone(), rows.v_cache.clone()
        q = rope_and_cache(new.qkv, new.cos, new.sin, *caches, new.kv_indices, 4)
        assert torch.equal(caches[0].nan_to_num(), rows.k_cache.nan_to_num())
        real = rows.seq_lens > 0
        torch.testing.assert_close(out[real], rows.attend(q[real], (1,) * 3, 0.1), **TOLERANCES[torch.float32])


def test_the_first_rows_of_a_mixed_step(make_rows, device):
    rows = make_rows((90, 20), 16, 2, 64, torch.float32)
    new = add_new_tokens(rows, 4)
    wide = torch.full((5, 4, 64), 7.0, device=device)
    # Tokens of prompt chunks lie behind the decodes' in the same tensors.
    behind = [torch.cat([x, x.new_full((3, *x.shape[1:]), 9)]) for x in (new.qkv, new.cos, new.sin, new.kv_indices)]
    out = run_qkv(rows, NewTokens(*(x[:2] for x in behind)), 4, 0.1, out=wide[:2])
    q = rope_and_cache(new.qkv, new.cos, new.sin, rows.k_cache.clone(), rows.v_cache.clone(), new.kv_indices, 4)
    torch.testing.assert_close(out, rows.attend(q, (1, 1), 0.1), **TOLERANCES[torch.float32])
    assert (wide[2:] == 7).all()


def test_a_workspace_serves_one_call_after_the_other(make_rows, device):
    workspace = decode_workspace(3, 4, 2, 64, torch.float32, 512, device)
    for lens in ((300, 200, 100), (65, 300), (300, 0, 299)):
        rows = make_rows(lens, 16, 2, 64, torch.float32)
        q = torch.randn(len(lens), 4, 64, device=device)
        out = run(rows, q, 0.1, workspace)
        real = rows.seq_lens > 0
        expected = rows.attend(q[real], (1,) * len(lens), 0.1)
        torch.testing.assert_close(out[real], expected, **TOLERANCES[torch.float32])
        assert not workspace.arrivals.count_nonzero()


def test_outputs_may_lie_in_wider_rows(make_rows, device):
    rows = make_rows((90, 20), 16, 2, 64, torch.float32)
    q = torch.randn(2, 4, 64, device=device)
    wide = torch.full((3, 6 * 64), 7.0, device=device)
    out = wide[:2, : 4 * 64].unflatten(1, (4, 64))
    assert run(rows, q, 0.1, out=out) is out
    torch.testing.assert_close(out, rows.attend(q, (1, 1), 0.1), **TOLERANCES[torch.float32])
    assert (wide[2] == 7).all()
    assert (wide[:, 4 * 64 :] == 7).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_graph_serves_rows_of_any_length(make_rows, device):
    rows = make_rows((4000, 4000, 4000, 4000), 16, 8, 128, torch.bfloat16)
    new = add_new_tokens(rows, 32)
    workspace = decode_workspace(4, 32, 8, 128, torch.bfloat16, rows.block_tables.shape[1] * 16, device)
    run_qkv(rows, new, 32, 0.1, workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run_qkv(rows, new, 32, 0.1, workspace)
    for lens in ((1, 64, 65, 4000), (3999, 0, 1000, 130), (0, 0, 0, 0), (4000, 4000, 4000, 4000)):
        rows.seq_lens.copy_(torch.tensor(lens))
        now = replace(rows, host_seq_lens=lens)
        for name in ("qkv", "cos", "sin", "kv_indices"):
            getattr(new, name).copy_(getattr(add_new_tokens(now, 32), name))
        # Again and again: the splits arrive in another order every time.
        for _ in range(20):
            graph.replay()
        real = rows.seq_lens > 0
        assert not out[~real].count_nonzero()
        if real.any():
            caches = rows.k_cache.clone(), rows.v_cache.clone()
            q = rope_and_cache(new.qkv, new.cos, new.sin, *caches, new.kv_indices, 32)
            expected = now.attend(q[real], (1,) * 4, 0.1)
            torch.testing.assert_close(out[real].float(), expected, **TOLERANCES[torch.bfloat16])


def test_large_scores_do_not_overflow(make_rows, device):
    rows = make_rows((200,), 16, 1, 64, torch.float32)
    q = torch.randn(1, 2, 64, device=device)
    torch.testing.assert_close(run(rows, q, 50.0), rows.attend(q, (1,), 50.0), rtol=1e-3, atol=1e-4)


def test_cells_behind_two_to_the_31_elements(device):
    # 4 GiB, of which only the pages in use are ever touched.
    cache = torch.empty(2**14 + 8, 128, 8, 128, dtype=torch.bfloat16, device=device)
    cache[-1] = torch.randn(128, 8, 128)
    tables = torch.tensor([[len(cache) - 1]], dtype=torch.int32, device=device)
    slots, lens = torch.zeros(1, dtype=torch.int64, device=device), torch.tensor([37], dtype=torch.int32, device=device)
    q = torch.randn(1, 8, 128).to(torch.bfloat16).to(device)
    workspace = decode_workspace(1, 8, 8, 128, torch.bfloat16, 128, device)
    out = paged_decode_attention(*as_qkv(q, 8), cache, cache, tables, slots, lens, 8, 0.1, workspace)
    keys = cache[-1, :37].float().transpose(0, 1)
    expected = torch.softmax(q[0].float().unsqueeze(1) @ keys.mT * 0.1, -1) @ keys
    torch.testing.assert_close(out[0].float(), expected.squeeze(1), **TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 8])
@pytest.mark.parametrize("max_keys", [8, 1024, 16384, 131072])
def test_config_fills_the_gpu_once_and_no_row_takes_one_program_forever(dtype, num_kv_heads, max_keys):
    for num_rows in (1, 8, 32, 256, 512):
        config = decode_config(num_rows, 32, num_kv_heads, 128, dtype, max_keys)
        needed = -(-max_keys // 16384)
        assert 1 <= config.num_splits <= max(64, needed)
        assert config.num_splits >= needed
        assert config.num_splits == needed or num_rows * num_kv_heads * config.num_splits <= 4 * 132
        assert config.min_keys_per_split % config.keys_per_tile == 0
        for size in (config.keys_per_tile, config.splits_per_tile, config.num_warps):
            assert size & (size - 1) == 0
    assert decode_config(1, 8, 2, 128, dtype, 16384).num_splits == 64
    assert decode_config(1, 32, 8, 128, dtype, 16384).num_splits == 33
    assert decode_config(256, 32, 8, 128, dtype, 16384).num_splits == 1


def test_a_workspace_holds_what_fewer_rows_need(device):
    workspace = decode_workspace(40, 32, 8, 128, torch.bfloat16, 16384, device)
    for num_rows in range(1, 41):
        config = decode_config(num_rows, 32, 8, 128, torch.bfloat16, 16384)
        parts = config.num_splits + max_prefix_parts(num_rows, 32, 8, 132)
        assert workspace.log_sums.numel() >= num_rows * 32 * parts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": torch.zeros(2, 9, 64)}, "not 4 query heads"),
        ({"cos": torch.zeros(1, 1, 64)}, "cos must be"),
        ({"kv_indices": torch.zeros(2, dtype=torch.int32)}, "kv_indices must be"),
        ({"seq_lens": torch.zeros(2, dtype=torch.int64)}, "seq_lens torch.int64"),
        ({"slots": torch.zeros(3, dtype=torch.int64)}, "one of each for each row"),
        (
            {
                name: torch.zeros(3, dtype=torch.int64 if name == "slots" else torch.int32)
                for name in ("slots", "seq_lens")
            },
            "3 slots for 2 rows",
        ),
        ({"block_tables": torch.zeros(4, 2, dtype=torch.int32).mT}, "contiguous"),
        ({"k_cache": torch.zeros(4, 24, 2, 64), "v_cache": torch.zeros(4, 24, 2, 64)}, "block_size 24"),
        ({"out": torch.zeros(2, 8, 64)}, "out"),
        ({"block_tables": torch.zeros(2, 200, dtype=torch.int32)}, "a workspace of 272 partial results: 400 needed"),
    ],
)
def test_refuses_what_it_does_not_take(changes, message, device):
    given = {
        "qkv": torch.zeros(2, 8, 64),
        "cos": torch.zeros(2, 1, 64),
        "sin": torch.zeros(2, 1, 64),
        "kv_indices": torch.zeros(2, dtype=torch.int64),
        "k_cache": torch.zeros(4, 16, 2, 64),
        "v_cache": torch.zeros(4, 16, 2, 64),
        "block_tables": torch.zeros(2, 4, dtype=torch.int32),
        "slots": torch.zeros(2, dtype=torch.int64),
        "seq_lens": torch.zeros(2, dtype=torch.int32),
        "out": None,
    } | changes
    given = {name: x if x is None else x.to(device) for name, x in given.items()}
    workspace = decode_workspace(4, 4, 2, 64, torch.float32, 64, device)
    with pytest.raises(ValueError, match=message):
        paged_decode_attention(**given, num_heads=4, scale=0.1, workspace=workspace)
