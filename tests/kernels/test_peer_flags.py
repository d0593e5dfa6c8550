"""Flags between two ranks, both in this process: a rank's memory is any memory."""

import threading
from dataclasses import replace

import pytest
import torch
import triton.language as tl
from octavo.kernels import peer_wait
from octavo.kernels.peer_flags import PeerFlag
from octavo.kernels.peer_wait import MAX_POLLS, PeerWait


def _pair(device, num_calls: int = 0, max_polls: int = 0) -> list[PeerFlag]:
    flags = torch.full((2, 1), num_calls, dtype=torch.int32, device=device)
    addresses = torch.tensor([[flags[1 - rank].data_ptr()] for rank in range(2)], device=device)
    calls = torch.full((2, 2, 1), num_calls, dtype=torch.int32, device=device)
    return [
        PeerFlag(flags[rank], addresses[rank], calls[rank, 0], calls[rank, 1], PeerWait.on(device, max_polls))
        for rank in range(2)
    ]


def _has_failed(flag: PeerFlag) -> bool:
    if flag.mine.is_cuda:
        torch.cuda.synchronize()
    return flag.wait.has_failed()


@pytest.mark.parametrize("num_calls", [0, 2**31 - 2])
def test_each_call_is_met_by_one_of_the_peer(device, num_calls):
    mine, peers = _pair(device, num_calls)
    for _ in range(3):  # over the end of 32 bits
        mine.raise_for_peer()
        peers.raise_for_peer()
        mine.hold_until_raised()
        peers.hold_until_raised()
    assert not _has_failed(mine)
    assert not _has_failed(peers)


def test_what_was_raised_once_is_not_met_twice(device):
    mine, peers = _pair(device)
    peers.raise_for_peer()
    mine.hold_until_raised()
    assert not _has_failed(mine)
    mine.hold_until_raised()
    assert _has_failed(mine)


def test_ones_own_flag_is_not_the_peers(device):
    mine, _ = _pair(device)
    mine.raise_for_peer()
    mine.hold_until_raised()
    assert _has_failed(mine)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the flag comes from another stream there")
def test_a_flag_that_comes_late_is_waited_for(device):
    mine, peers = _pair(device, max_polls=1_000_000)
    late = threading.Timer(0.1, lambda: mine.mine.fill_(1))
    late.start()
    mine.hold_until_raised()
    late.join()
    assert not _has_failed(mine)
    assert not _has_failed(peers)


def test_the_host_ends_the_wait(device, monkeypatch):
    if device.type == "cpu":
        monkeypatch.setattr(peer_wait, "_LOOK_POLLS", tl.constexpr(64))
    mine, _ = _pair(device)
    mine = replace(mine, wait=replace(mine.wait, max_polls=MAX_POLLS))
    later = threading.Timer(0.3, mine.wait.abandon)
    later.start()
    mine.hold_until_raised()
    assert _has_failed(mine)
    later.join()
    assert mine.wait.failed.item() == 1  # so that no later kernel begins to wait
