"""Plans of split prompt chunks: who takes which keys, and when programs share them at all."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from octavo.kernels.chunk_splits import (
    ChunkRows,
    chunk_tile,
    chunk_workspace,
    cut,
    max_partials,
    num_splits,
    plan_chunk_splits,
    sent,
)

NUM_SMS = 132


def rows_of(chunks):
    """Chunks of (tokens before, tokens of the step), one behind the other behind 5 other tokens."""
    starts = np.cumsum([5, *(new for _, new in chunks)])
    return ChunkRows.of(starts.tolist(), [sum(chunk) for chunk in chunks])


def plan(chunks, num_heads=32, num_kv_heads=8, dtype=torch.bfloat16, num_sms=NUM_SMS):
    return plan_chunk_splits(rows_of(chunks), num_heads, num_kv_heads, 128, dtype, num_sms)


def programs(splits, num_kv_heads=8):
    return len(splits.jobs) * num_kv_heads


CHUNKS = st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 200)), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None)
@given(CHUNKS, st.sampled_from([1, 3, 4, 20]), st.sampled_from([torch.bfloat16, torch.float32]), st.data())
def test_each_query_has_each_of_its_keys_once(chunks, group, dtype, data):
    rows, tile = rows_of(chunks), chunk_tile(group, 128, dtype)
    parts = data.draw(st.lists(st.integers(1, 40), min_size=len(chunks), max_size=len(chunks)))
    splits = cut(rows, np.array(parts), tile)
    jobs, merges = splits.jobs.tolist(), {first_token: rest for first_token, *rest in splits.merges.tolist()}
    keys_of, partials_of = {}, {}
    for row, first_token, num_queries, position, start, end, partial, _ in jobs:
        assert start <= position, "every query sees the first key"
        assert start % tile.keys == 0
        assert end == position + num_queries or (end <= position and end % tile.keys == 0)
        assert 0 < num_queries <= tile.queries
        keys_of.setdefault((row, first_token, num_queries, position), []).append((start, end))
        partials_of.setdefault(first_token, []).append(partial)
    queries = {}
    for (row, first_token, num_queries, position), spans in keys_of.items():
        ends = [end for _, end in sorted(spans)]
        assert [start for start, _ in sorted(spans)] == [0, *ends[:-1]]
        assert ends[-1] == position + num_queries
        assert len(spans) <= parts[row]
        for query in range(num_queries):
            queries[first_token + query] = (row, position + query)
        found = sorted(partials_of[first_token])
        if len(spans) == 1:
            assert found == [-1]
            assert first_token not in merges
        else:
            assert merges[first_token] == [num_queries, found[0], len(spans)]
            assert found == list(range(found[0], found[0] + len(spans)))
    wanted, token = {}, 5
    for row, (before, new) in enumerate(chunks):
        wanted |= {token + i: (row, before + i) for i in range(new)}
        token += new
    assert queries == wanted
    taken = [partial for found in partials_of.values() for partial in found if partial >= 0]
    assert sorted(taken) == list(range(splits.num_partials))
    lengths = [end - start for *_, start, end, _, _ in jobs]
    assert lengths == sorted(lengths, reverse=True)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 140_000), st.integers(0, 4000)), min_size=1, max_size=6),
    st.sampled_from([(32, 8), (4, 1), (3, 3), (71, 1), (16, 2)]),
    st.sampled_from([132, 20]),
)
def test_plans_fill_the_gpu_twice_at_most_and_fit_their_workspace(chunks, heads, num_sms):
    splits = plan_chunk_splits(rows_of(chunks), *heads, 64, torch.bfloat16, num_sms)
    if splits is None:
        return
    workspace = chunk_workspace(*heads, 64, torch.bfloat16, num_sms, torch.device("cpu"))
    workspace.check(splits.num_partials * heads[1] * splits.tile.rows, 64)
    assert splits.num_partials <= max_partials(heads[1], num_sms)
    # A step of one token behind the longest context is split too: that is what the start compiles.
    longest = max(map(sum, chunks))
    assert plan_chunk_splits(rows_of([(longest - 1, 1)]), *heads, 64, torch.bfloat16, num_sms) is not None


@pytest.mark.parametrize("before", [2032, 8176, 131_056])
@pytest.mark.parametrize("new", [1, 16, 33, 64])
def test_few_queries_behind_a_long_context_fill_the_gpu(before, new):
    splits = plan([(before, new)])
    assert 80 <= programs(splits) <= 2 * NUM_SMS


@pytest.mark.parametrize(
    "chunks",
    [
        [(0, 0)],
        [(300, 16)],
        [(0, 2048)],
        [(8192, 512)],
        [(0, 40)] * 64,
        [(14_336, 2048)],
        [(2000, 40)] * 30,
    ],
    ids=str,
)
def test_programs_that_fill_the_gpu_or_have_little_to_do_share_nothing(chunks):
    assert plan(chunks) is None


def test_only_the_row_that_the_others_would_wait_for_is_split():
    rows = rows_of([(0, 2048), (131_056, 16)])
    assert num_splits(rows, chunk_tile(4, 128, torch.bfloat16), 8, NUM_SMS).tolist()[0] == 1
    splits = plan([(0, 2048), (131_056, 16)])
    assert len(splits.merges) == 1
    assert max(splits.jobs[:, 5] - splits.jobs[:, 4]) < 8192


def test_a_plan_hangs_on_nothing_but_lengths():
    plans = [plan([(9000, 16), (70, 3)]) for _ in range(2)]
    assert torch.equal(plans[0].jobs, plans[1].jobs)
    assert torch.equal(plans[0].merges, plans[1].merges)


def test_more_heads_than_a_tile_has_rows_are_left_alone():
    assert plan([(9000, 16)], 65, 1) is None
    assert chunk_workspace(65, 1, 64, torch.bfloat16, NUM_SMS, torch.device("cpu")).partials.numel() == 0


def test_a_plan_is_sent_whole(device):
    here = plan([(9000, 16), (70, 3)])
    there = sent(here, device)
    assert torch.equal(there.jobs.cpu(), here.jobs)
    assert torch.equal(there.merges.cpu(), here.merges)
    assert (there.num_partials, there.tile) == (here.num_partials, here.tile)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [20, 64, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 4, 33, 64])
def test_tiles_fit_in_shared_memory(group, head_dim, dtype):
    tile = chunk_tile(group, head_dim, dtype)
    for size in (tile.rows, tile.keys, tile.num_warps):
        assert size & (size - 1) == 0
    assert tile.queries * group <= tile.rows < (tile.queries + 1) * group
    cells = tile.rows + 2 * tile.num_stages * tile.keys
    assert cells * max(16, head_dim) * dtype.itemsize <= 227 * 1024
