"""Ranks meet over a store: those that live on with those that were started anew, and none waits beyond its epoch."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist
from octavo.errors import UnavailableError
from octavo.workers.meeting import ExchangeStore, Meeting, await_keys


def test_all_ranks_meet_in_each_epoch():
    store = dist.HashStore()
    for epoch in (1, 2):
        meetings = [Meeting(store, epoch, rank, 3) for rank in range(3)]
        with ThreadPoolExecutor(3) as pool:
            first = pool.submit(meetings[0].await_all)
            assert not first.done()
            for rank in (1, 2):
                pool.submit(meetings[rank].await_all)
            first.result(20)


def test_a_wait_ends_with_its_epoch_or_its_time():
    meeting = Meeting(dist.HashStore(), 1, 0, 2)
    threading.Timer(0.1, meeting.is_over.set).start()
    with pytest.raises(UnavailableError, match="the epoch is over"):
        meeting.await_all()
    with pytest.raises(UnavailableError, match="did not come within 0 s"):
        await_keys(meeting.store, ["nothing"], timedelta(seconds=0), threading.Event())


def exchange(store, count: int, rank: int, values: list[bytes]) -> list[bytes]:
    """As c10d's StoreExchange does it in a process that has made `count` exchanges before."""
    found = []
    for index, value in enumerate(values, start=count):
        keys = [f"CUDASymmetricMemory/{index}/{peer}" for peer in range(2)]
        store.set(keys[rank], value)
        store.wait([keys[1 - rank]])
        found.append(store.get(keys[1 - rank]))
        assert store.multi_get(keys)[1 - rank] == found[-1]
    return found


def test_a_rank_that_lives_on_exchanges_with_one_that_is_new():
    """Their processes have made different numbers of exchanges; called as c10d calls it, from C++."""
    store = dist.HashStore()
    sent = [[b"a0", b"a1", b"a2"], [b"b0", b"b1", b"b2"]]
    for epoch, counts in ((1, (0, 0)), (2, (3, 0)), (3, (6, 3))):
        ours = [ExchangeStore(Meeting(store, epoch, rank, 2)) for rank in range(2)]
        seen_from_c = [dist.PrefixStore("", each) for each in ours]
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(exchange, seen_from_c[rank], counts[rank], rank, sent[rank]) for rank in range(2)]
            assert [each.result(20) for each in asked] == sent[::-1]


def test_barriers_of_the_exchange_are_counted_too():
    store = dist.HashStore()
    ours = [ExchangeStore(Meeting(store, 4, rank, 2)) for rank in range(2)]
    for rank, count in enumerate((7, 0)):
        assert ours[rank].add(f"CUDASymmetricMemory/{count}/num_members", 1) == rank + 1
    ours[1].set("CUDASymmetricMemory/0/last_member", b"1")
    ours[0].wait(["CUDASymmetricMemory/7/last_member"])
    assert ours[0].check(["CUDASymmetricMemory/7/last_member"])
    assert not ours[0].check(["CUDASymmetricMemory/8/last_member"])


def test_an_exchange_ends_with_its_epoch():
    meeting = Meeting(dist.HashStore(), 1, 0, 2)
    store = ExchangeStore(meeting)
    threading.Timer(0.1, meeting.is_over.set).start()
    with pytest.raises(UnavailableError, match="the epoch is over"):
        store.get("CUDASymmetricMemory/0/1")
