"""Which decodes are said to share a prefix; and that reading it once for all of them changes no token."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.kernels.batch import SharedPrefix
from octavo.proto import engine_pb2, sampling_pb2, worker_pb2
from octavo.workers import model_runner, prefix_groups
from octavo.workers.plan import Join, Plan
from octavo.workers.prefix_groups import PrefixGroups, shared_prefixes
from octavo.workers.rank import RankSite, build_rank
from octavo.workers.slot_table import SlotTable, SlotTableShape
from octavo.workers.step_batch import take_step

NO_SLOTS = np.zeros(0, dtype=np.int64)
BLOCK_SIZE = 16


def groups_of(tables, num_blocks=None):
    """As (rows, blocks in common)."""
    width = max(map(len, tables))
    padded = np.array([[*row, *[0] * (width - len(row))] for row in tables], dtype=np.int64)
    lengths = np.array(num_blocks or [len(row) for row in tables], dtype=np.int64)
    return {(tuple(rows.tolist()), length) for rows, length in shared_prefixes(padded, lengths)}


def test_rows_that_begin_alike_are_a_group():
    assert groups_of([[1, 2, 3], [7, 8], [1, 2, 9], [4], [1, 2]]) == {((0, 2, 4), 2)}
    assert groups_of([[1, 2], [3, 4]]) == set()
    assert groups_of([[5]]) == set()


def test_more_rows_with_less_in_common_or_fewer_with_more():
    samples = [[1, *range(10, 20), row] for row in range(30, 34)]
    assert groups_of([*samples, [1, 50], [1, 51]]) == {((0, 1, 2, 3), 11), ((4, 5), 1)}
    many = [[1, 2, 50 + row] for row in range(40)]
    assert groups_of([*many, [1, 2, 50, 3]]) == {(tuple(range(41)), 2)}


def test_blocks_that_a_row_may_still_write_do_not_count():
    assert groups_of([[1, 2, 3], [1, 2, 3], [1, 2, 3]], num_blocks=[3, 2, 2]) == {((0, 1, 2), 2)}
    assert groups_of([[0, 0], [0, 0]], num_blocks=[0, 2]) == set()


def common(tables):
    length = 0
    while length < min(map(len, tables)) and len({row[length] for row in tables}) == 1:
        length += 1
    return length


@given(st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=5), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_groups_share_what_they_say_and_leave_nothing_alike(choices):
    # As blocks come to be shared: a block's id says all that is before it.
    tables = [[int("".join(map(str, row[: i + 1]))) for i in range(len(row))] for row in choices]
    groups = groups_of(tables)
    members = [row for rows, _ in groups for row in rows]
    assert len(members) == len(set(members))
    for rows, length in groups:
        assert 0 < length <= common([tables[row] for row in rows])
    left = [table[0] for row, table in enumerate(tables) if row not in members]
    assert len(left) == len(set(left))
    # As much as any one group could save.
    starts = {tuple(table[:length]) for table in tables for length in range(1, len(table) + 1)}
    alone = max(len(start) * (sum(tuple(t[: len(start)]) == start for t in tables) - 1) for start in starts)
    assert sum((len(rows) - 1) * length for rows, length in groups) >= alone


def join(slot, num_tokens, block_ids, num_computed):
    return Join(
        slot=slot,
        token_ids=(np.arange(num_tokens) * 7 % 50 + (np.arange(num_tokens) >= 192) * slot).astype(np.int32),
        num_prompt_tokens=num_tokens,
        num_computed_tokens=num_computed,
        block_ids=np.array(block_ids, dtype=np.int32),
        sampling_params=sampling_pb2.SamplingParams(top_p=1.0, repetition_penalty=1.0, max_tokens=99),
    )


def make_plan(**fields):
    empty = dict.fromkeys(("leave_slots", "append_slots", "chunk_slots", "chunk_num_tokens"), NO_SLOTS)
    return Plan(
        **({"epoch": 1, "step_id": 1, "joins": (), "decode_slots": None, "append_block_ids": np.zeros(0, np.int32)}
        | empty | fields)
    )  # fmt: skip


def sharing_table(num_slots):
    """Slots with 12 blocks in common, and a block of their own."""
    shape = SlotTableShape(num_slots, 256, BLOCK_SIZE, num_blocks=100, vocab_size=1000)
    table = SlotTable(shape, torch.device("cpu"))
    joins = tuple(join(slot, 200, [*range(12), 20 + slot, 60 + slot], 199) for slot in range(num_slots))
    table.apply(make_plan(joins=joins, decode_slots=np.arange(num_slots)))
    return table


def test_a_prefix_is_read_once_where_that_saves_enough():
    table = sharing_table(10)
    rows = take_step(table, make_plan())
    worth_it = 192 * 9
    enough, too_little = (
        PrefixGroups(table, -(-prefix_groups._MIN_SAVED_BYTES // keys)) for keys in (worth_it, worth_it + 20)
    )
    assert enough.of(rows) == (SharedPrefix(tuple(range(10)), 0, 192),)
    assert enough.of(rows)[0].num_saved_keys == worth_it
    assert too_little.of(rows) == ()
    assert enough.keys_worth_sharing(10) <= 192 < too_little.keys_worth_sharing(10)
    assert enough.keys_worth_sharing(2) is None


def test_rows_that_cannot_save_enough_are_not_looked_at(monkeypatch):
    """One that is much longer than the others, and one that begins otherwise: 11 of 200 tokens may share."""
    table = sharing_table(12)
    table.host_block_tables[3, 0] = 99
    monkeypatch.setattr(prefix_groups, "shared_prefixes", lambda tables, lengths: seen.append((tables, lengths)) or [])
    rows, seen = take_step(table, make_plan()), []
    rows.seq_lens[5] = 256
    PrefixGroups(table, -(-prefix_groups._MIN_SAVED_BYTES // (192 * 10 + 1))).of(rows)
    assert not seen
    PrefixGroups(table, -(-prefix_groups._MIN_SAVED_BYTES // (192 * 10))).of(rows)
    ((tables, lengths),) = seen
    assert tables.shape == (11, 12)
    assert lengths.tolist() == [12] * 11


def test_few_decodes_read_their_own():
    table = sharing_table(7)
    assert PrefixGroups(table, bytes_per_key=2**40).of(take_step(table, make_plan())) == ()


def test_groups_follow_who_decodes():
    table = sharing_table(12)
    groups = PrefixGroups(table, bytes_per_key=2**40)
    first = groups.of(take_step(table, make_plan()))
    assert groups.of(take_step(table, make_plan())) is first
    table.apply(make_plan(leave_slots=np.array([0, 1]), decode_slots=np.arange(2, 12)))
    assert groups.of(take_step(table, make_plan())) == (SharedPrefix(tuple(range(10)), 2, 192),)
    # One that joins in the place of another, with blocks of its own.
    table.apply(make_plan(leave_slots=np.array([5]), decode_slots=np.array([2, 3, 4, *range(6, 12)])))
    table.apply(make_plan(joins=(join(5, 200, range(40, 53), 199),), decode_slots=np.arange(2, 12)))
    assert groups.of(take_step(table, make_plan())) == (SharedPrefix((0, 1, 2, 4, 5, 6, 7, 8, 9), 2, 192),)


def build_runner(path, device, dtype="float32"):
    config = engine_pb2.WorkerConfig(
        model_path=str(path), load_format="safetensors", dtype=dtype, block_size=BLOCK_SIZE, max_model_len=256,
        max_num_seqs=12, max_num_batched_tokens=512, gpu_memory_utilization=0.9, num_blocks_override=100,
    )  # fmt: skip
    request = worker_pb2.ConfigureRequest(config=config, rank=0, tensor_parallel_size=1, epoch=1)
    return list(build_rank(request, RankSite(torch.device(device))))[-1].runner


def run_sharing(runner, num_seqs=12, num_steps=8):
    """Tokens of sequences that share 192 tokens of their prompts, step by step; the last steps beside a prompt."""
    first = join(0, 200, [*range(12), 20, 60], 0)
    others = tuple(join(slot, 200, [*range(12), 20 + slot, 60 + slot], 192) for slot in range(1, num_seqs))
    slots = np.arange(num_seqs - 1)
    results = [
        runner.execute(make_plan(joins=(first,), chunk_slots=slots[:1], chunk_num_tokens=np.array([200]))),
        runner.execute(make_plan(joins=others[:-1], chunk_slots=slots[1:], chunk_num_tokens=slots[1:] * 0 + 8)),
        runner.execute(make_plan(decode_slots=slots)),
        *(runner.execute(make_plan()) for _ in range(num_steps)),
    ]
    late = np.array([num_seqs - 1])
    late_plan = make_plan(joins=others[-1:], chunk_slots=late, chunk_num_tokens=np.array([8]))
    results.append(runner.execute(late_plan))
    tokens = [np.frombuffer(result.wait().token_ids, "<i4").tolist() for result in results]
    runner.execute(make_plan(leave_slots=np.arange(num_seqs), decode_slots=NO_SLOTS)).wait()
    return tokens


def test_a_step_hands_its_prefixes_to_attention(make_llama, monkeypatch):
    runner = build_runner(make_llama(eos_token_id=None, max_position_embeddings=256), "cpu")
    assert runner.prefix_groups is None, "attention on a CPU reads them for each"
    alone = run_sharing(runner)
    seen, send_step = [], model_runner.send_step
    monkeypatch.setattr(model_runner, "send_step", lambda *args: (seen.append(args[2]), send_step(*args))[1])
    runner.prefix_groups = PrefixGroups(runner._slots, bytes_per_key=2**40)
    assert run_sharing(runner) == alone
    assert seen[:2] == [(), ()], "two chunks of prompts"
    assert seen[2:] == [(SharedPrefix(tuple(range(11)), 0, 192),)] * 10


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tokens_on_a_gpu_are_those_of_decodes_that_read_their_own(dtype, make_llama):
    path = make_llama(eos_token_id=None, max_position_embeddings=256, hidden_size=256, head_dim=64)
    runner = build_runner(path, "cuda:0", dtype)
    launched = []
    runner.prefix_groups = None
    alone = run_sharing(runner)
    runner.prefix_groups = PrefixGroups(runner._slots, bytes_per_key=2**40)
    found, runner.prefix_groups.of = runner.prefix_groups.of, lambda rows: launched.append(found(rows)) or launched[-1]
    shared = run_sharing(runner)
    assert sum(map(bool, launched)) == 10
    if dtype == "float32":
        assert shared == alone
    else:  # rounded otherwise, scores that lie close may change places
        assert np.mean(np.concatenate(shared) == np.concatenate(alone)) > 0.5
