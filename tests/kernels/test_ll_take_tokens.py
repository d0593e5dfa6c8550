"""Tokens of the greatest key of all ranks, all ranks in this process: memory that they share is any memory.

One rank's kernel runs after another's. So a call is run twice: with no patience a rank sends what it has and gives up,
its count of calls is put back, and the second time all words are there.
"""

import pytest
import torch
from octavo.kernels.ll_take_tokens import KeyInbox, ll_take_tokens
from octavo.kernels.peer_wait import PeerWait

_MAX_ROWS = 5
_VOCAB = 1000


class _Ranks:
    """The inboxes of all ranks."""

    def __init__(self, device, world_size: int, num_calls: int = 0) -> None:
        shape = KeyInbox.words_shape(_MAX_ROWS, world_size)
        words = tuple(torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(world_size))
        self.inboxes = [
            KeyInbox(
                rank,
                words,
                torch.full((_MAX_ROWS,), num_calls, dtype=torch.int64, device=device),
                PeerWait.on(device, max_polls=0),
            )
            for rank in range(world_size)
        ]

    def take(self, keys, table=None, cells=None):
        """What each rank gets of keys [world_size, num_rows, num_parts]."""
        counts = [inbox.num_calls.clone() for inbox in self.inboxes]
        self._one_pass(keys, table, cells)
        for inbox, count in zip(self.inboxes, counts, strict=True):
            inbox.num_calls.copy_(count)
            inbox.wait.failed.zero_()
            inbox.wait.host_failed.zero_()
        results = self._one_pass(keys, table, cells)
        assert not self.gave_up()
        return results

    def gave_up(self) -> bool:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return any(inbox.wait.has_failed() for inbox in self.inboxes)

    def _one_pass(self, keys, table, cells):
        outs = [torch.full((keys.shape[1],), -1, dtype=torch.int32, device=keys.device) for _ in self.inboxes]
        for own, inbox, out in zip(keys, self.inboxes, outs, strict=True):
            ll_take_tokens(own.contiguous(), _VOCAB, inbox, out, table, cells)
        return outs


def _keys(device, world_size, num_rows, num_parts, seed=0):
    """Keys whose tokens mostly exist; scores of both signs and, in the first row, equal ones."""
    generator = torch.Generator().manual_seed(seed)
    shape = world_size, num_rows, num_parts
    scores = torch.randint(-0x7F800000, 0x7F7FFFFF, shape, generator=generator)  # of finite floats, as integers
    scores[:, 0] = -7
    tokens = torch.randint(0, _VOCAB + 3, shape, generator=generator)
    return (scores << 32 | (0xFFFFFFFF - tokens)).to(device)


def _expected(keys):
    return (0xFFFFFFFF - (keys.amax(dim=(0, 2)) & 0xFFFFFFFF)).clamp(max=_VOCAB - 1).tolist()


@pytest.mark.parametrize(("world_size", "num_rows", "num_parts"), [(2, 1, 1), (2, 5, 3), (4, 3, 130), (8, 2, 7)])
def test_every_rank_takes_the_greatest_keys_token(world_size, num_rows, num_parts, device):
    keys = _keys(device, world_size, num_rows, num_parts)
    for out in _Ranks(device, world_size).take(keys):
        assert out.tolist() == _expected(keys)


def test_tokens_go_to_their_cells_of_the_table(device):
    keys = _keys(device, 2, 3, 2)
    table, cells = torch.full((9,), -1, dtype=torch.int32, device=device), torch.tensor([8, 2, 4], device=device)
    _Ranks(device, 2).take(keys, table, cells)
    assert table[cells].tolist() == _expected(keys)
    assert table[[0, 1, 3, 5, 6, 7]].tolist() == [-1] * 6


@pytest.mark.parametrize("num_calls", [0, 2**32 - 3])
def test_calls_of_all_sizes_follow_one_another(num_calls, device):
    """Buffers alternate, rows count their own calls, and epochs wrap round."""
    ranks = _Ranks(device, 2, num_calls)
    for seed, num_rows in enumerate([1, 5, 2, 5, 1]):
        keys = _keys(device, 2, num_rows, 3, seed)
        for out in ranks.take(keys):
            assert out.tolist() == _expected(keys)
    assert (ranks.inboxes[0].num_calls - num_calls).tolist() == [5, 3, 2, 2, 2]


def test_keys_of_an_earlier_call_are_not_taken(device):
    """After two calls the buffer that the third uses is full of the first's words."""
    ranks = _Ranks(device, 2)
    for seed in range(2):
        ranks.take(_keys(device, 2, 1, 1, seed))
    out = torch.empty(1, dtype=torch.int32, device=device)
    ll_take_tokens(_keys(device, 1, 1, 1)[0], _VOCAB, ranks.inboxes[0], out)
    assert ranks.gave_up()


@pytest.mark.parametrize(
    "keys",
    [
        torch.ones(_MAX_ROWS + 1, 1, dtype=torch.int64),
        torch.ones(0, 1, dtype=torch.int64),
        torch.ones(1, 1, dtype=torch.int32),
        torch.ones(2, 3, dtype=torch.int64).t(),
    ],
)
def test_keys_that_do_not_fit_are_refused(keys, device):
    inbox = _Ranks(device, 2).inboxes[0]
    assert not inbox.takes(keys)
    with pytest.raises(ValueError, match="do not fit"):
        ll_take_tokens(keys, _VOCAB, inbox, torch.empty(len(keys), dtype=torch.int32))


def test_three_ranks_are_refused(device):
    assert not _Ranks(device, 3).inboxes[0].takes(torch.ones(1, 1, dtype=torch.int64))
