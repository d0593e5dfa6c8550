"""Which kernel sums what. What the kernels compute is tested with them; here memory that GPUs would share is plain."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from octavo.workers import symmetric_memory
from octavo.workers.meeting import Meeting
from octavo.workers.parallel import TensorParallel
from octavo.workers.symmetric_memory import SymmetricMemory

_MAX_EXCHANGED_BYTES = 1 << 20  # 128 rows below, where there are 64 MiB


@pytest.fixture
def make_memory(monkeypatch):
    """make_memory(world_size) -> rank 0's memory, and the calls that it makes of its kernels: (name, arguments)."""

    class Exchange:
        def __init__(self, meeting):
            pass

        def rendezvous(self, mine):
            return SimpleNamespace(get_buffer=lambda rank, shape, dtype: torch.zeros(shape, dtype=dtype))

    def make(world_size):
        calls = []
        monkeypatch.setattr(symmetric_memory.symm_mem, "empty", torch.empty)
        monkeypatch.setattr(symmetric_memory, "_Exchange", Exchange)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(symmetric_memory, "_MAX_EXCHANGED_BYTES", _MAX_EXCHANGED_BYTES)
        for name in ("ll_sum", "ll_add_rms_norm", "two_shot_add_rms_norm", "ll_take_tokens"):
            monkeypatch.setattr(symmetric_memory, name, lambda *args, name=name: calls.append((name, args)))
        return SymmetricMemory(Meeting(dist.HashStore(), 1, 0, world_size), torch.device("cpu")), calls

    return make


def _sum(memory, partial):
    memory.all_reduce_add_rms_norm(partial, partial, partial[0], 1e-5)


@pytest.mark.parametrize(("world_size", "max_small"), [(2, 64), (4, 32), (8, 16)])
def test_few_rows_are_pushed_and_more_are_dealt(make_memory, world_size, max_small):
    memory, calls = make_memory(world_size)
    for num_rows in (1, max_small, max_small + 1, 1024):
        partial = torch.empty(num_rows, 4096, dtype=torch.bfloat16)
        assert memory.takes_norm(partial)
        _sum(memory, partial)
    assert [name for name, _ in calls] == ["ll_add_rms_norm"] * 2 + ["two_shot_add_rms_norm"] * 2


@pytest.mark.parametrize(
    "partial",
    [
        torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta"),
        torch.empty(4, 4096, dtype=torch.float16),
        torch.empty(4, 4096).T,
        torch.empty(0, 4096),
        torch.empty(4096),
    ],
)
def test_what_no_kernel_sums_faster_is_left_to_nccl(make_memory, partial):
    memory, _ = make_memory(2)
    assert not memory.takes_norm(partial)


@pytest.mark.parametrize("num_rows", [1024, 4096, 4097, 8192])
def test_a_residual_that_each_rank_has_in_part_is_never_cut_in_halves(make_memory, num_rows):
    memory, _ = make_memory(2)
    stream = torch.empty(num_rows, 4096, dtype=torch.bfloat16, device="meta")
    assert memory.takes_norm(stream) != TensorParallel(0, 2, torch.device("meta")).sums_in_halves(stream)


@pytest.mark.parametrize(("world_size", "num_rows", "is_exchanged"), [(2, 128, True), (2, 129, False), (4, 64, False)])
def test_large_sums_of_two_ranks_are_exchanged(make_memory, world_size, num_rows, is_exchanged):
    memory, _ = make_memory(world_size)
    assert memory.exchanges(torch.empty(num_rows, 4096, dtype=torch.bfloat16)) == is_exchanged


def test_an_exchange_that_only_compiles_gives_tensors_like_shares_and_reaches_nobody(make_memory, monkeypatch):
    monkeypatch.setattr(symmetric_memory.PeerFlag, "raise_for_peer", lambda flag: None)
    monkeypatch.setattr(symmetric_memory.PeerFlag, "hold_until_raised", lambda flag: None)
    memory, _ = make_memory(2)
    tp = TensorParallel(0, 2, torch.device("cpu"), symmetric_memory=memory)
    share = torch.ones(3, 4096)
    parts = tp.for_compiling().start_all_reduce(share, share)()
    assert [(part.shape, part.dtype) for part in parts] == [(share.shape, share.dtype)] * 2
    assert [part.sum().item() for part in tp.start_all_reduce(share, share)()] == [share.sum().item(), 0.0]
    assert not parts[1].any()


def test_two_halves_go_the_same_way(make_memory, monkeypatch):
    """The smaller would fit into a place, the larger does not."""
    memory, _ = make_memory(2)
    summed = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **_: summed.append(len(tensor)) or SimpleNamespace(wait=int))
    tp = TensorParallel(0, 2, torch.device("cpu"), symmetric_memory=memory)
    larger, smaller = torch.ones(257, 4096, dtype=torch.bfloat16).chunk(2)
    for half in (larger, smaller):
        assert len(tp.start_all_reduce(half, larger)()) == 1
    assert summed == [129, 128]


@pytest.mark.parametrize(("world_size", "num_rows"), [(1, None), (2, 4097)])
def test_the_smallest_step_in_halves_is_cut_and_one_smaller_is_not(world_size, num_rows):
    tp = TensorParallel(0, world_size, torch.device("cpu"))
    assert tp.least_num_rows_in_halves(8192) == num_rows
    for rows in (4096, 4097):
        stream = torch.empty(rows, 4096, dtype=torch.bfloat16, device="meta")
        assert tp.sums_in_halves(stream) == (num_rows is not None and rows >= num_rows)


def test_a_product_may_write_where_it_is_summed(make_memory):
    memory, calls = make_memory(2)
    buffer = memory.input_buffer(100, 4096, torch.bfloat16)
    assert buffer.shape == (100, 4096)
    assert buffer.dtype == torch.bfloat16
    _sum(memory, buffer)
    _, (*_, buffers) = calls[0]
    assert buffers.input_like(buffer).data_ptr() == buffer.data_ptr()


@pytest.mark.parametrize("num_rows", [1, 5000])
def test_no_product_writes_to_a_buffer_that_would_not_be_summed(make_memory, num_rows):
    memory, _ = make_memory(2)
    assert memory.input_buffer(num_rows, 4096, torch.bfloat16) is None


@pytest.mark.parametrize("num_rows", [1, 1000])
def test_a_wait_that_was_given_up_is_seen(make_memory, num_rows):
    memory, calls = make_memory(2)
    _sum(memory, torch.empty(num_rows, 4096, dtype=torch.bfloat16))
    assert not memory.has_failed()
    _, (*_, buffers) = calls[0]
    buffers.wait.host_failed.fill_(1)
    assert memory.has_failed()


@pytest.mark.parametrize(("num_rows", "is_taken"), [(1, True), (2048, True), (2049, False)])
def test_candidates_of_all_rows_of_a_step_meet(make_memory, num_rows, is_taken):
    memory, calls = make_memory(4)
    keys, out = torch.zeros(num_rows, 3, dtype=torch.int64), torch.zeros(num_rows, dtype=torch.int32)
    assert memory.takes_keys(keys) == is_taken
    if is_taken:
        memory.take_tokens(keys, 100, out)
        assert calls[0][0] == "ll_take_tokens"
        assert not memory.has_failed()
        _, (_, _, inbox, *_) = calls[0]
        inbox.wait.host_failed.fill_(1)
        assert memory.has_failed()


@pytest.mark.parametrize(
    ("tensor", "is_taken"),
    [
        (torch.zeros(64), True),  # a number for each row
        (torch.zeros(65), False),
        (torch.zeros(64, 256), True),
        (torch.zeros(2, dtype=torch.int64), False),
        (torch.zeros(2, 3, dtype=torch.float16), False),
        (torch.zeros(()), False),
    ],
)
def test_few_rows_are_summed_without_a_norm(make_memory, tensor, is_taken):
    memory, _ = make_memory(2)
    assert memory.takes(tensor) == is_taken


def test_all_waits_end_when_the_epoch_does(make_memory):
    memory, calls = make_memory(2)
    for num_rows in (1, 1000):
        _sum(memory, torch.empty(num_rows, 4096, dtype=torch.bfloat16))
    memory.take_tokens(torch.zeros(1, 3, dtype=torch.int64), 100, torch.zeros(1, dtype=torch.int64))
    memory.abandon()
    sides = [next(each for each in arguments if hasattr(each, "wait")) for _, arguments in calls]
    assert len(sides) == 3
    assert all(side.wait.has_failed() for side in sides)
    assert memory.has_failed()
