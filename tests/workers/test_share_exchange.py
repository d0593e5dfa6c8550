"""Two ranks' exchanges, both in this process, on one device: each sends to memory that the other reads."""

import pytest
import torch
from octavo.kernels.peer_flags import PeerFlag
from octavo.kernels.peer_wait import PeerWait
from octavo.workers.share_exchange import NUM_PLACES, Place, ShareExchange

_MAX_BYTES = 1 << 16


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ]
)
def pair(request):
    """Both ranks' exchanges; and what says that one waited in vain."""
    device = torch.device(request.param)
    if device.type == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels are compiled for the GPU here")
    memory = torch.zeros(2, NUM_PLACES, _MAX_BYTES, dtype=torch.uint8, device=device)
    flags = torch.zeros(2, NUM_PLACES, 1, dtype=torch.int32, device=device)
    calls = torch.zeros(2, 2, NUM_PLACES, 1, dtype=torch.int32, device=device)
    wait = PeerWait.on(device, 1_000_000 if device.type == "cuda" else 0)

    def exchange(rank: int) -> ShareExchange:
        addresses = torch.tensor([[flag.data_ptr()] for flag in flags[1 - rank]], device=device)
        return ShareExchange(
            tuple(
                Place(
                    memory[rank, i],
                    memory[1 - rank, i],
                    PeerFlag(flags[rank, i], addresses[i], calls[rank, 0, i], calls[rank, 1, i], wait),
                )
                for i in range(NUM_PLACES)
            ),
            device,
        )

    return exchange(0), exchange(1), device, wait


def _shares(step: int, num_rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    first, second = torch.randn(2, num_rows, 100, generator=generator).to(device, torch.bfloat16)
    return first, second


def test_each_rank_gets_both_shares(pair):
    """Two at a time, as in halves of a step, more often than there are places, of other sizes each time."""
    first, second, device, wait = pair
    for step in range(0, 3 * NUM_PLACES, 2):
        sent, halves = [], (_shares(step, 7 + step, device), _shares(step + 1, 6 + step, device))
        for mine, peers in halves:
            sent.append((first.start(mine), second.start(peers)))
        for (mine, peers), (finish_first, finish_second) in zip(halves, sent, strict=True):
            for parts, expected in ((finish_first(), (mine, peers)), (finish_second(), (peers, mine))):
                assert all(torch.equal(*pair) for pair in zip(parts, expected, strict=True))
    assert not wait.has_failed()


def test_a_share_that_is_not_sent_is_not_taken_from_an_earlier_one(pair):
    first, second, device, wait = pair
    for step in range(NUM_PLACES):
        mine, peers = _shares(step, 3, device)
        finish, _ = first.start(mine), second.start(peers)
        finish()
    assert not wait.has_failed()
    finish = first.start(_shares(9, 3, device)[0])
    wait.abandon()  # or a GPU would wait for long
    finish()
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert wait.has_failed()


def test_what_only_compiles_sends_nothing_and_takes_no_place(pair):
    first, second, device, wait = pair
    wait.abandon()  # launches run here
    mine, _ = _shares(0, 3, device)
    assert [part.shape for part in first.compile_for(mine)()] == [mine.shape] * 2
    assert not second._places[0].mine.any()
    assert first._next == 0


@pytest.mark.parametrize(("num_rows", "is_taken"), [(1, True), (327, True), (328, False), (0, False)])
def test_shares_that_fit_are_taken(pair, num_rows, is_taken):
    first, _, device, _ = pair
    share = torch.empty(num_rows, 100, dtype=torch.bfloat16, device=device)
    assert first.takes(share) == is_taken
    if num_rows > 1:
        assert not first.takes(share.T)
