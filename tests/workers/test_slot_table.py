"""Plans edit the slot table: every legal edit, every illegal one; and plans off the wire."""

import numpy as np
import pytest
import torch
from octavo.errors import FailedPreconditionError, InvalidArgumentError
from octavo.proto import sampling_pb2, worker_pb2
from octavo.workers.plan import decode_plan
from octavo.workers.slot_table import SlotTable, SlotTableShape

SHAPE = SlotTableShape(num_slots=4, max_model_len=30, block_size=4, num_blocks=20, vocab_size=100)
SAMPLING = sampling_pb2.SamplingParams(top_p=1.0, repetition_penalty=1.0, max_tokens=5)


def pack(values, dtype="<i4") -> bytes:
    return np.asarray(values, dtype=dtype).tobytes()


def join(slot, tokens, blocks=(0,), num_prompt=None, num_computed=0) -> worker_pb2.SlotJoin:
    return worker_pb2.SlotJoin(
        slot=slot, token_ids=pack(tokens), num_prompt_tokens=len(tokens) if num_prompt is None else num_prompt,
        num_computed_tokens=num_computed, block_ids=pack(blocks), sampling_params=SAMPLING,
    )  # fmt: skip


def make_plan(leave=(), joins=(), append=(), decode=None, chunks=(), amend=(), **fields):
    """append: (slot, block id) pairs; chunks: (slot, tokens); amend: (slot, token id). Through the wire's form."""
    return decode_plan(
        worker_pb2.BatchPlan(
            epoch=3,
            step_id=7,
            leave_slots=pack(leave, "<u2"),
            joins=joins,
            append_slots=pack([slot for slot, _ in append], "<u2"),
            append_block_ids=pack([block_id for _, block_id in append]),
            decode_slots_changed=decode is not None,
            decode_slots=pack(decode or (), "<u2"),
            chunk_slots=pack([slot for slot, _ in chunks], "<u2"),
            chunk_num_tokens=pack([count for _, count in chunks]),
            amend_slots=pack([slot for slot, _ in amend], "<u2"),
            amend_token_ids=pack([token_id for _, token_id in amend]),
            **fields,
        )
    )


@pytest.fixture
def table() -> SlotTable:
    """Slot 1 is ready to decode: five tokens, four of them computed, in blocks 3 and 9. Slot 2 has a prompt of nine."""
    table = SlotTable(SHAPE, torch.device("cpu"))
    table.apply(make_plan(joins=[join(1, [5, 6, 7, 8, 9], [3, 9], 2, 4), join(2, range(10, 19), [1, 2, 4])]))
    return table


def test_joins_fill_rows(table):
    assert table.occupied.tolist() == [False, True, True, False]
    assert table.token_ids[1, :5].tolist() == [5, 6, 7, 8, 9]
    assert table.token_ids[2, :9].tolist() == list(range(10, 19))
    assert table.block_tables[:3, :4].tolist() == [[0, 0, 0, 0], [3, 9, 0, 0], [1, 2, 4, 0]]
    assert (table.host_block_tables == table.block_tables.numpy()).all()
    for name, values in (("num_known", [0, 5, 9, 0]), ("num_computed", [0, 4, 0, 0]), ("num_prompt", [0, 2, 9, 0])):
        assert getattr(table, name).tolist() == values
    assert table.num_blocks.tolist() == [0, 2, 3, 0]


def test_blocks_are_appended_in_order(table):
    table.apply(make_plan(append=[(1, 7), (2, 8), (1, 6)]))
    assert table.block_tables[1:3, :5].tolist() == [[3, 9, 7, 6, 0], [1, 2, 4, 8, 0]]
    assert (table.host_block_tables == table.block_tables.numpy()).all()
    assert table.num_blocks.tolist() == [0, 4, 4, 0]


def test_a_slot_that_is_left_can_be_taken_in_the_same_plan(table):
    table.apply(make_plan(leave=[1], joins=[join(1, [42], [11])], append=[(1, 12)]))
    assert table.token_ids[1, 0] == 42
    assert table.block_tables[1, :2].tolist() == [11, 12]
    assert (table.num_known[1], table.num_computed[1], table.num_blocks[1]) == (1, 0, 2)


def test_the_decode_set_stays_until_it_is_replaced(table):
    table.apply(make_plan(decode=[1], chunks=[(2, 4)]))
    table.advance(np.array([1, 2]), np.array([1, 4]), np.array([1]))
    assert (table.num_known[1], table.num_computed[1]) == (6, 5)
    assert (table.num_known[2], table.num_computed[2]) == (9, 4)
    table.apply(make_plan())
    assert table.decode_slots.tolist() == [1]
    table.apply(make_plan(decode=[]))
    assert table.decode_slots.tolist() == []


def test_the_version_changes_when_rows_change_hands(table):
    version = table.version
    table.apply(make_plan(append=[(1, 7)], decode=[1]))
    assert table.version == version
    table.apply(make_plan(leave=[1], decode=[]))
    assert table.version != version


def test_the_newest_token_is_amended(table):
    table.apply(make_plan(decode=[1]))
    table.advance(np.array([1]), 1, np.array([1]))
    table.token_ids[1, 5] = 77  # as the step samples it
    table.apply(make_plan(amend=[(1, 99)]))
    assert table.token_ids[1, :7].tolist() == [5, 6, 7, 8, 9, 99, 0]
    assert (table.num_known[1], table.num_computed[1]) == (6, 5)


def test_a_slot_that_joins_is_amended_in_the_same_plan(table):
    table.apply(make_plan(joins=[join(0, [1, 2, 3], [7], 2, 2)], amend=[(1, 0), (0, 50)]))
    assert table.token_ids[0, :4].tolist() == [1, 2, 50, 0]
    assert table.token_ids[1, :6].tolist() == [5, 6, 7, 8, 0, 0]


ILLEGAL = {
    "amend a free slot": ({"amend": [(0, 1)]}, r"cannot amend slots \[0\]: they are free"),
    "amend a slot that left": ({"leave": [1], "amend": [(1, 1)]}, r"cannot amend slots \[1\]: they are free"),
    "amend a slot that does not exist": ({"amend": [(4, 1)]}, "cannot amend slot 4: there are 4"),
    "amend twice": ({"amend": [(1, 1), (1, 2)]}, "amends a slot twice"),
    "amend a prompt": ({"amend": [(2, 1)]}, "no token beyond its prompt"),
    "amend with a token that does not exist": ({"amend": [(1, 100)]}, r"amended token id is not in \[0, 100\)"),
    "amend with a negative token": ({"amend": [(1, -1)]}, r"amended token id is not in \[0, 100\)"),
    "leave a free slot": ({"leave": [0]}, r"cannot leave slots \[0\]: they are free"),
    "leave twice": ({"leave": [1, 1]}, "lets a slot leave twice"),
    "leave a slot that does not exist": ({"leave": [4]}, "cannot leave slot 4: there are 4"),
    "join an occupied slot": ({"joins": [join(1, [1])]}, "slot 1 is occupied"),
    "join twice": ({"joins": [join(0, [1]), join(0, [1])]}, "slot 0 is occupied"),
    "join a slot that does not exist": ({"joins": [join(4, [1])]}, r"slot 4 is not in \[0, 4\)"),
    "join with too many blocks": ({"joins": [join(0, [1], range(9))]}, "more than 8 blocks"),
    "join with a block that does not exist": ({"joins": [join(0, [1], [20])]}, r"a block id is not in \[0, 20\)"),
    "join with a negative block": ({"joins": [join(0, [1], [-1])]}, r"a block id is not in \[0, 20\)"),
    "append to a free slot": ({"append": [(0, 1)]}, r"cannot append a block to slots \[0\]"),
    "append too many blocks": ({"append": [(1, 1)] * 7}, "more than 8 blocks"),
    "append a block that does not exist": ({"append": [(1, 20)]}, r"a block id is not in \[0, 20\)"),
    "decode a free slot": ({"decode": [0]}, r"cannot decode slots \[0\]"),
    "decode a slot twice": ({"decode": [1, 1]}, "twice in one step"),
    "decode and chunk": ({"decode": [1], "chunks": [(1, 1)]}, "twice in one step"),
    "decode a prompt": ({"decode": [2]}, "does not have exactly one token left"),
    "decode a slot that left": ({"leave": [1], "decode": [1]}, r"cannot decode slots \[1\]"),
    "chunk of a free slot": ({"chunks": [(3, 1)]}, r"cannot compute a chunk of slots \[3\]"),
    "chunk of nothing": ({"chunks": [(2, 0)]}, "a chunk is empty"),
    "chunk past the tokens": ({"chunks": [(2, 10)]}, "goes past the tokens"),
    "chunk without blocks": ({"joins": [join(0, range(5), [7])], "chunks": [(0, 5)]}, "more tokens than its blocks"),
    "decode without a block": ({"joins": [join(0, range(5), [7], 5, 4)], "decode": [0]}, "more tokens than its blocks"),
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_illegal_edits_are_refused(name, table):
    edits, cause = ILLEGAL[name]
    with pytest.raises(FailedPreconditionError, match=cause):
        table.apply(make_plan(**edits))


def test_a_slot_that_decodes_cannot_just_leave(table):
    table.apply(make_plan(decode=[1]))
    with pytest.raises(FailedPreconditionError, match=r"cannot decode slots \[1\]"):
        table.apply(make_plan(leave=[1]))


def test_a_sequence_cannot_grow_past_the_longest(table):
    table.apply(make_plan(joins=[join(0, range(30), range(8), 30, 29)], decode=[0]))
    table.advance(np.array([0]), 1, np.array([0]))
    with pytest.raises(FailedPreconditionError, match="goes past 30 tokens"):
        table.apply(make_plan())


MALFORMED_JOINS = {
    "no tokens": (join(0, []), "token_ids"),
    "too many tokens": (join(0, [1] * 31), "token_ids"),
    "token id out of range": (join(0, [100]), "token_ids"),
    "negative token id": (join(0, [-1]), "token_ids"),
    "no prompt": (join(0, [1], num_prompt=0), "num_computed_tokens"),
    "more prompt than tokens": (join(0, [1], num_prompt=2), "num_computed_tokens"),
    "all computed": (join(0, [1], num_computed=1), "num_computed_tokens"),
}


@pytest.mark.parametrize("name", MALFORMED_JOINS)
def test_malformed_joins_are_refused_by_field(name, table):
    malformed, field = MALFORMED_JOINS[name]
    with pytest.raises(InvalidArgumentError) as error:
        table.apply(make_plan(joins=[malformed]))
    assert error.value.field == field


def test_a_plan_off_the_wire():
    plan = make_plan(
        leave=[65535], joins=[join(2, [1, 2], [3], 1, 1)], append=[(1, 9)], decode=[4, 5], chunks=[(6, 70000)]
    )
    assert (plan.epoch, plan.step_id) == (3, 7)
    assert plan.leave_slots.tolist() == [65535]
    assert (plan.append_slots.tolist(), plan.append_block_ids.tolist()) == ([1], [9])
    assert plan.decode_slots.tolist() == [4, 5]
    assert (plan.chunk_slots.tolist(), plan.chunk_num_tokens.tolist()) == ([6], [70000])
    (joined,) = plan.joins
    assert (joined.slot, joined.num_prompt_tokens, joined.num_computed_tokens) == (2, 1, 1)
    assert (joined.token_ids.tolist(), joined.block_ids.tolist()) == ([1, 2], [3])
    assert joined.sampling_params == SAMPLING


def test_moves_and_amended_tokens_off_the_wire():
    plan = make_plan(
        amend=[(3, 70000)], finished_transfers=6,
        copy_from_block_ids=pack([1, 1]), copy_to_block_ids=pack([2, 3]), save_block_ids=pack([4]),
        save_host_ids=pack([70001]), load_host_ids=pack([5, 6]), load_block_ids=pack([8, 7]),
    )  # fmt: skip
    assert (plan.amend_slots.tolist(), plan.amend_token_ids.tolist()) == ([3], [70000])
    moves = [(moved.sources.tolist(), moved.targets.tolist()) for moved in (plan.saves, plan.loads, plan.copies)]
    assert moves == [([4], [70001]), ([5, 6], [8, 7]), ([1, 1], [2, 3])]
    assert plan.finished_transfers == 6
    empty = make_plan()
    assert [len(moved) for moved in (empty.saves, empty.loads, empty.copies)] == [0, 0, 0]


def test_an_unchanged_decode_set_is_not_an_empty_one():
    assert make_plan(decode=None).decode_slots is None
    assert make_plan(decode=[]).decode_slots.tolist() == []


MALFORMED_PLANS = {
    "leave_slots": {"leave_slots": b"1"},
    "append_slots": {"append_slots": b"123"},
    "append_block_ids": {"append_slots": b"12", "append_block_ids": b"12345678"},
    "decode_slots": {"decode_slots": b"1", "decode_slots_changed": True},
    "chunk_slots": {"chunk_slots": b"1"},
    "chunk_num_tokens": {"chunk_slots": b"1234", "chunk_num_tokens": b"1234"},
    "amend_slots": {"amend_slots": b"1"},
    "amend_token_ids": {"amend_slots": b"12", "amend_token_ids": b""},
    "copy_from_block_ids": {"copy_from_block_ids": b"1"},
    "copy_to_block_ids": {"copy_from_block_ids": b"1234"},
    "save_block_ids": {"save_block_ids": b"123"},
    "save_host_ids": {"save_block_ids": b"1234", "save_host_ids": b"12345678"},
    "load_host_ids": {"load_host_ids": b"12345"},
    "load_block_ids": {"load_block_ids": b"1234"},
    "joins.token_ids": {"joins": [worker_pb2.SlotJoin(token_ids=b"12345")]},
    "joins.block_ids": {"joins": [worker_pb2.SlotJoin(block_ids=b"1")]},
}


@pytest.mark.parametrize("field", MALFORMED_PLANS)
def test_malformed_plans_are_refused_by_field(field):
    with pytest.raises(InvalidArgumentError) as error:
        decode_plan(worker_pb2.BatchPlan(**MALFORMED_PLANS[field]))
    assert error.value.field == field
