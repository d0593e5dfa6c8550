"""Decodes that share prefixes: read once for all of them, attention is what it is when each reads its own."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

pytest.importorskip("triton")

from octavo.kernels.batch import SharedPrefix
from octavo.kernels.decode_attention import decode_attention_launch
from octavo.kernels.decode_splits import decode_workspace
from octavo.kernels.fp8_cache import DTYPE as FP8
from octavo.kernels.prefix_attention import prefix_attention_launch
from octavo.kernels.rope_cache import rope_and_cache
from octavo.kernels.shared_prefixes import max_prefix_parts, plan_prefix_jobs, sent

# As in test_decode_attention.py.
TOLERANCES = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-6},
    torch.float16: {"rtol": 2**-10, "atol": 2**-11},
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-8},
}
NUM_SMS = 132


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@dataclass(frozen=True, slots=True)
class Case:
    """A step of decodes, and which of them share how many keys."""

    seq_lens: tuple[int, ...]
    shared: tuple[tuple[tuple[int, ...], int], ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16


CASES = {
    "two of two": Case((80, 90), (((0, 1), 64),)),
    "a prefix that ends within a tile": Case((200, 201, 300), (((0, 1, 2), 176),)),
    "rows between that share nothing, and padding": Case((0, 90, 40, 0, 130, 65), (((1, 5, 4), 64),)),
    "two prefixes": Case((150, 70, 140, 75, 130, 80), (((0, 2, 4), 128), ((1, 3, 5), 64))),
    "one token behind it": Case((129, 129), (((0, 1), 128),)),
    "many parts": Case((450, 401, 399), (((0, 1, 2), 384),), 8, 1, 128),
    "more rows than a tile": Case((*range(65, 95),), ((tuple(range(30)), 64),), 8, 2, 20),
    "long own keys of many splits": Case((390, 70), (((0, 1), 64),), 4, 1),
    "float32": Case((100, 110, 300), (((0, 1), 64), ), dtype=torch.float32),
    "float16, small blocks, odd head_dim": Case((140, 150), (((1, 0), 136),), 6, 2, 20, 8, torch.float16),
    "large blocks": Case((130, 140, 257), (((0, 1, 2), 128),), block_size=128),
    "three heads to a KV head": Case((70, 70, 80), (((0, 1, 2), 64),), 6, 2, 80),
    "more heads to a KV head than a dot's rows": Case((70, 90), (((0, 1), 64),), 20, 1, 20),
}  # fmt: skip


def share(rows, case):
    """The rows with the first keys of each prefix's first row in the place of the others'."""
    tables = rows.block_tables.clone()
    for members, num_keys in case.shared:
        num_blocks = num_keys // case.block_size
        first, *others = rows.slots[list(members)].tolist()
        for slot in others:
            tables[slot, :num_blocks] = tables[first, :num_blocks]
    return replace(rows, block_tables=tables)


def prefixes_of(rows, case):
    slots = rows.slots.tolist()
    return [SharedPrefix(members, slots[members[0]], num_keys) for members, num_keys in case.shared]


def make_step(num_rows, num_heads, num_kv_heads, head_dim, device, dtype):
    """What a QKV product and the tables of a rotation give."""
    angles = torch.rand(num_rows, 1, head_dim // 2) * 6
    qkv = torch.randn(num_rows, num_heads + 2 * num_kv_heads, head_dim)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
    return tuple(x.to(device, dtype) for x in (qkv, cos, sin))


def attend(rows, caches, step, num_heads, prefixes=(), workspace=None):
    """Through the launches of a step, each prefix read once; new keys go to the rows' last cells."""
    num_rows, _, head_dim = step[0].shape
    _, block_size, num_kv_heads, _ = caches[0].shape
    device, dtype = step[0].device, step[0].dtype
    last = (rows.seq_lens.long() - 1).clamp(min=0)
    blocks = rows.block_tables[rows.slots].gather(1, (last // block_size).unsqueeze(1)).squeeze(1)
    cells = (blocks * block_size + last % block_size).where(rows.seq_lens > 0, -1)
    max_keys = rows.block_tables.shape[1] * block_size
    workspace = workspace or decode_workspace(num_rows, num_heads, num_kv_heads, head_dim, dtype, max_keys, device)
    jobs = plan_prefix_jobs(prefixes, num_rows, num_heads, num_kv_heads, head_dim, dtype, NUM_SMS)
    jobs = jobs and sent(jobs, device)
    out = step[0].new_empty(num_rows, num_heads, head_dim)
    tables = rows.block_tables, rows.slots, rows.seq_lens
    scales = caches[2] if len(caches) > 2 else None
    scale = 1 / math.sqrt(head_dim)
    decodes = decode_attention_launch(
        *step, cells, *caches[:2], *tables, num_heads, scale, workspace, out, scales, prefixes=jobs
    )
    if jobs is not None:
        prefix_attention_launch(decodes, jobs).run()
    decodes.run()
    assert not workspace.arrivals.count_nonzero()
    return out


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name, make_rows, device):
    case = CASES[name]
    rows = make_rows(case.seq_lens, case.block_size, case.num_kv_heads, case.head_dim, case.dtype)
    rows = share(rows, case)
    step = make_step(len(case.seq_lens), case.num_heads, case.num_kv_heads, case.head_dim, device, case.dtype)
    prefixes = prefixes_of(rows, case)
    assert plan_prefix_jobs(
        prefixes, len(case.seq_lens), case.num_heads, case.num_kv_heads, case.head_dim, case.dtype, NUM_SMS
    )

    out = attend(rows, (rows.k_cache, rows.v_cache), step, case.num_heads, prefixes)

    nowhere = torch.full((len(out),), -1, device=device)
    rotated = rope_and_cache(*step, rows.k_cache, rows.v_cache, nowhere, case.num_heads)
    real = rows.seq_lens > 0
    assert not out[~real].count_nonzero()
    expected = rows.attend(rotated[real], (1,) * len(rotated), 1 / math.sqrt(case.head_dim))
    torch.testing.assert_close(out[real].float(), expected, **TOLERANCES[case.dtype])


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.bfloat16, 128), (torch.float16, 20)])
def test_an_fp8_cache_is_read_as_it_is_without_sharing(dtype, head_dim, make_rows, device):
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the GPU has no FP8")
    case = Case((150, 70, 140, 130), (((0, 2, 3), 128),), head_dim=head_dim)
    rows = share(make_rows(case.seq_lens, 16, 2, head_dim, torch.float32), case)
    from octavo.kernels import reference

    (k, k_scales), (v, v_scales) = (reference.quantise(c.nan_to_num(0)) for c in (rows.k_cache, rows.v_cache))
    scales = torch.stack((k_scales, v_scales), -1).view(torch.int32).squeeze(-1).transpose(1, 2).contiguous()
    assert k.dtype == FP8
    step = make_step(4, 4, 2, head_dim, device, dtype)
    shared = attend(rows, (k, v, scales), step, 4, prefixes_of(rows, case))
    alone = attend(rows, (k, v, scales), step, 4)
    torch.testing.assert_close(shared.float(), alone.float(), **TOLERANCES[dtype])


def test_a_workspace_serves_steps_with_and_without_prefixes(make_rows, device):
    workspace = decode_workspace(3, 4, 2, 64, torch.float32, 512, device)
    for shared in ((((0, 2), 128),), (), (((0, 1, 2), 64),)):
        case = Case((300, 200, 140), shared, dtype=torch.float32)
        rows = share(make_rows(case.seq_lens, 16, 2, 64, torch.float32), case)
        step, caches = make_step(3, 4, 2, 64, device, torch.float32), (rows.k_cache, rows.v_cache)
        out = attend(rows, caches, step, 4, prefixes_of(rows, case), workspace)
        torch.testing.assert_close(out, attend(rows, caches, step, 4), **TOLERANCES[torch.float32])


def test_a_plan_covers_each_prefix_once_and_fits_the_workspace():
    prefixes = [SharedPrefix(tuple(range(0, 60, 2)), 3, 1000), SharedPrefix((1, 5, 7), 9, 320)]
    prefixes.append(SharedPrefix((9, 11), 4, 40))
    jobs = plan_prefix_jobs(prefixes, 64, 32, 8, 128, torch.bfloat16, NUM_SMS)
    assert jobs.max_parts == max_prefix_parts(64, 32, 8, NUM_SMS) == 8
    read = {}
    for first, count, slot, start, end, part, *_ in jobs.jobs.tolist():
        assert 0 < count <= jobs.tile.queries
        assert start % jobs.tile.keys == 0
        assert part < jobs.max_parts
        for row in jobs.rows[first : first + count].tolist():
            read.setdefault((row, slot), []).append((part, start, end))
    # Whole tiles of 64 keys: 40 are none.
    wanted = {(row, 3): 960 for row in range(0, 60, 2)} | {(row, 9): 320 for row in (1, 5, 7)}
    assert read.keys() == wanted.keys()
    for (row, slot), parts in read.items():
        parts.sort()
        assert [part for part, *_ in parts] == list(range(len(parts)))
        assert [start for _, start, _ in parts] == [0, *(end for *_, end in parts[:-1])]
        assert parts[-1][2] == wanted[row, slot] == jobs.num_keys[row]
        assert len(parts) == jobs.num_parts[row]
    others = set(range(64)) - {row for row, _ in wanted}
    assert not jobs.num_keys[list(others)].any()


def test_a_plan_of_nothing_is_none():
    assert plan_prefix_jobs([], 4, 4, 2, 64, torch.bfloat16, NUM_SMS) is None
    assert plan_prefix_jobs([SharedPrefix((0, 1), 0, 48)], 4, 4, 2, 64, torch.bfloat16, NUM_SMS) is None
    too_many_heads = plan_prefix_jobs([SharedPrefix((0, 1), 0, 640)], 4, 80, 1, 64, torch.bfloat16, NUM_SMS)
    assert too_many_heads is None, "a tile holds the heads of one query at least"
