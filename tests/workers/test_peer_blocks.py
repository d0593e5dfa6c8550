"""KV blocks from a rank of another group: bit by bit the same, beside the steps of both, and never half of them."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
from octavo.workers import block_copy
from octavo.workers.block_copy import BlockStaging, pieces
from octavo.workers.block_rows import BlockRows
from octavo.workers.kv_cache import FP8, KVCache
from octavo.workers.peer_group import PeerGroup
from octavo.workers.rendezvous import bind_collectives_to

from .rank_process import LocalRank, RankProcess

CPU = torch.device("cpu")
PROMPT = [(7 * i * i + 3 * i) % 128 for i in range(50)]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
DEVICES = [("cpu", "cpu"), pytest.param(("cuda:0", "cuda:1"), marks=[pytest.mark.gpu, two_gpus])]


def make_cache(dtype, device, seed) -> KVCache:
    """Of random bits."""
    cache = KVCache(
        num_layers=5, num_blocks=20, block_size=4, num_kv_heads=2, head_dim=16, dtype=dtype, device=device
    )  # fmt: skip
    words = cache.rows._words
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(1 << 62), 1 << 62, words.shape, generator=generator)
    words.copy_(bits.to(words.dtype))
    return cache


@dataclass(frozen=True)
class Holder:
    """Of blocks that no step touches."""

    block_rows: BlockRows

    def has_queued(self, step_id: int) -> bool:
        return True

    def wait_for_transfers(self) -> None:
        pass


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("staging_bytes", [1, 10_000, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
def test_rows_arrive_bit_by_bit_and_in_their_places_alone(dtype, staging_bytes, devices, monkeypatch):
    monkeypatch.setattr(block_copy, "_STAGING_BYTES", staging_bytes)
    devices = [torch.device(device) for device in devices]
    source, target = (make_cache(dtype, device, seed) for seed, device in enumerate(devices))
    expected = target.rows._words.cpu().view(-1, 20, target.rows._words.shape[1]).clone()
    theirs, ours = np.array([3, 19, 0, 7, 4], np.int32), np.array([5, 6, 18, 0, 9], np.int32)
    expected[:, ours] = source.rows._words.cpu().view(expected.shape)[:, theirs]
    bind_collectives_to("127.0.0.1")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    arrived = threading.Barrier(2)

    def run(cache, is_source):
        if cache.device.type == "cuda":
            torch.cuda.set_device(cache.device)
        own = store if is_source else dist.TCPStore("127.0.0.1", store.port, is_master=False)
        group = PeerGroup(own, is_source, cache.device, patience_s=30)
        staging = BlockStaging(Holder(cache.rows), cache.device)
        num_bytes = 0
        for piece in pieces(len(ours), staging.num_blocks):
            if is_source:
                staging.gather(theirs[piece], 0)
                staging.send(len(theirs[piece]), group)
            else:
                staging.receive(len(ours[piece]), group)
                num_bytes += staging.scatter(ours[piece], 0)
        arrived.wait(60)
        group.close()
        return num_bytes

    with ThreadPoolExecutor(2) as pool:
        _, num_bytes = pool.map(run, (source, target), (True, False))
    assert torch.equal(target.rows._words.cpu().view(expected.shape), expected)
    assert num_bytes == 5 * target.rows.block_bytes


@pytest.fixture
def ranks():
    started = []

    def start(kind=LocalRank, *arguments, **keywords):
        started.append(kind(*arguments, **keywords))
        return started[-1]

    yield start
    for rank in started:
        rank.close()


@pytest.mark.parametrize("devices", DEVICES)
def test_a_sequence_goes_on_from_blocks_that_another_group_computed(devices, ranks, make_llama, monkeypatch):
    monkeypatch.setattr(block_copy, "_STAGING_BYTES", 20_000)  # of blocks of 8 * 2 * 2 * 32 float32: two at a time
    path = make_llama(eos_token_id=None)
    source, target = ranks(LocalRank, devices[0]), ranks(LocalRank, devices[1])
    source.configure(path, epoch=1)
    target.configure(path, epoch=2)
    steps, others = source.steps(1), target.steps(2)
    undisturbed = steps.begin(PROMPT, range(20)) + steps.decode(60)
    alone = others.begin(PROMPT[::-1], range(20, 40), slot=1)
    steps.step(leave_slots=b"\0\0", decode_slots_changed=True)
    found = steps.begin(PROMPT, range(20))
    with ThreadPoolExecutor(1) as pool:
        copying = pool.submit(target.receive_blocks, source, [(i, 50 + i) for i in range(6)], 2, 1)
        found += steps.decode(30)  # both go on meanwhile
        alone += others.decode(30, [1])
        answer = copying.result()
    assert (answer.failure, answer.num_bytes) == ("", 6 * 8 * 2 * 2 * 32 * 4)
    assert answer.duration_us > 0
    # With what was copied as computed, and two tokens to compute.
    others.step(leave_slots=b"\1\0", decode_slots_changed=True)
    there = others.begin(PROMPT, [*range(50, 56), *range(8)], num_computed=48) + others.decode(60)
    assert there == undisturbed
    assert found == undisturbed[:31]
    # Over the same two: nothing is opened anew.
    assert target.receive_blocks(source, [(0, 63)], 2, 1).failure == ""
    steps.end()
    others.end()
    undisturbed_alone = ranks(LocalRank, devices[1])
    undisturbed_alone.configure(path, epoch=1)
    steps = undisturbed_alone.steps(1)
    assert steps.begin(PROMPT[::-1], range(20, 40), slot=1) + steps.decode(30, [1]) == alone
    steps.end()


@pytest.mark.parametrize(
    ("pairs", "epoch", "source_epoch", "why"),
    [
        ([(0, 0)], 2, 7, "does not serve in epoch 7"),
        ([(0, 0)], 7, 1, "does not serve in epoch 7"),
        ([(64, 0)], 2, 1, r"a block id is not in [0, 64)"),
        ([(0, 64)], 2, 1, r"a block id is not in [0, 64)"),
        ([(0, 1), (2, 1)], 2, 1, "two blocks are moved to the same one"),
    ],
)
def test_what_makes_no_sense_is_refused_and_the_next_goes_well(pairs, epoch, source_epoch, why, ranks, make_llama):
    path = make_llama(eos_token_id=None)
    source, target = ranks(), ranks()
    source.configure(path, epoch=1)
    target.configure(path, epoch=2)
    assert why in target.receive_blocks(source, pairs, epoch, source_epoch).failure
    assert target.receive_blocks(source, [(0, 0)], 2, 1).failure == ""


@pytest.mark.parametrize("change", [{"block_size": 16}, {"dtype": "bfloat16"}])
def test_blocks_of_another_kind_are_refused(change, ranks, make_llama):
    path = make_llama(eos_token_id=None)
    source, target = ranks(), ranks()
    source.configure(path, epoch=1, **change)
    target.configure(path, epoch=2)
    assert "of another kind" in target.receive_blocks(source, [(0, 0)], 2, 1).failure


def test_another_epoch_of_either_ends_what_was_open(ranks, make_llama):
    path = make_llama(eos_token_id=None)
    source, target = ranks(), ranks()
    source.configure(path, epoch=1)
    target.configure(path, epoch=2)
    assert target.receive_blocks(source, [(0, 0)], 2, 1).failure == ""
    source.configure(path, epoch=3)
    assert target.receive_blocks(source, [(0, 0)], 2, 1).failure
    assert target.receive_blocks(source, [(0, 0)], 2, 3).failure == ""
    target.configure(path, epoch=4)
    assert "epoch 2" in target.receive_blocks(source, [(0, 0)], 2, 3).failure
    assert target.receive_blocks(source, [(0, 0)], 4, 3).failure == ""
    # In the other direction, over another pair.
    assert source.receive_blocks(target, [(0, 0)], 3, 4).failure == ""


def test_a_rank_that_is_behind_waits_for_its_own_step(ranks, make_llama, monkeypatch):
    path = make_llama(eos_token_id=None)
    source, target = ranks(), ranks()
    source.configure(path, epoch=1)
    target.configure(path, epoch=2)
    steps, others = source.steps(1), target.steps(2)
    found = steps.begin(PROMPT, range(20))
    others.begin(PROMPT[::-1], range(20))
    pairs = [(i, 50 + i) for i in range(6)]
    with ThreadPoolExecutor(1) as pool:
        copying = pool.submit(target.receive_blocks, source, pairs, 2, 1, after_step=3, source_after_step=2)
        found += steps.decode(1)
        others.decode(1)
        time.sleep(0.2)
        assert not copying.done()
        others.decode(1)
        assert copying.result().failure == ""
    others.step(leave_slots=b"\0\0", decode_slots_changed=True)
    assert others.begin(PROMPT, [*range(50, 56), 1], num_computed=48) + others.decode(1) == found
    monkeypatch.setattr(block_copy, "_BEHIND_S", 0.1)
    assert "step 9 has not come" in target.receive_blocks(source, pairs, 2, 1, source_after_step=9).failure
    assert "step 9 has not come" in target.receive_blocks(source, pairs, 2, 1, after_step=9).failure
    steps.end()
    others.end()


def test_both_directions_at_once(ranks, make_llama):
    path = make_llama(eos_token_id=None)
    one, other = ranks(), ranks()
    one.configure(path, epoch=1)
    other.configure(path, epoch=2)
    with ThreadPoolExecutor(4) as pool:
        there = [pool.submit(other.receive_blocks, one, [(i, i)], 2, 1) for i in range(10)]
        back = [pool.submit(one.receive_blocks, other, [(i, i)], 1, 2) for i in range(10)]
        assert [call.result().failure for call in (*there, *back)] == [""] * 20


def _at_the_second_piece(action) -> None:
    send, count = BlockStaging.send, iter(range(1000))

    def stop_there(self, num_blocks, group):
        if next(count) == 1:
            action()
        send(self, num_blocks, group)

    BlockStaging.send = stop_there
    block_copy._STAGING_BYTES = 20_000


def die_sending() -> None:
    _at_the_second_piece(lambda: os._exit(1))


def fail_sending() -> None:
    def fail():
        raise RuntimeError("a fault of ours")

    _at_the_second_piece(fail)


def hang_sending() -> None:
    _at_the_second_piece(lambda: time.sleep(600))


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("prepare", [die_sending, fail_sending, hang_sending])
def test_a_source_that_is_lost_on_the_way_is_a_failure_and_no_more(prepare, devices, ranks, make_llama, monkeypatch):
    monkeypatch.setattr("octavo.workers.copies.BLOCKS_PATIENCE_S", {"cpu": 2.0, "cuda": 2.0})
    monkeypatch.setattr(block_copy, "_STAGING_BYTES", 20_000)
    path = make_llama(eos_token_id=None)
    source, target, healthy = ranks(RankProcess, prepare, devices[0]), ranks(LocalRank, devices[1]), None
    source.configure(path, epoch=1)
    target.configure(path, epoch=2)
    steps = target.steps(2)
    found = steps.begin(PROMPT, range(20))
    failure = target.receive_blocks(source, [(i, 50 + i) for i in range(6)], 2, 1).failure
    assert failure
    found += steps.decode(20)
    if devices[0] == "cpu":
        healthy = ranks()
        healthy.configure(path, epoch=3)
        assert target.receive_blocks(healthy, [(0, 50)], 2, 3).failure == ""
    if prepare is fail_sending:  # it lives, and a new link to it is as good as the first
        assert target.receive_blocks(source, [(0, 50)], 2, 1).failure == ""
    steps.end()
    target.configure(path, epoch=5)
    steps = target.steps(5)
    assert steps.begin(PROMPT, range(20)) + steps.decode(20) == found
    steps.end()
