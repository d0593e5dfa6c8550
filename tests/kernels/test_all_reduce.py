"""Sums over ranks with residual and norm, all ranks in this process: memory that they share is any memory.

One rank's kernel runs after another's, and the interpreter runs one program after another, so a kernel that waits for
others is run in passes: with no patience it sends what it has and gives up, its count of calls is put back, and so on
until a pass finds everything there.
"""

import threading
from dataclasses import replace

import pytest
import torch
import triton.language as tl
from octavo.kernels import peer_wait, reference
from octavo.kernels.ll_all_reduce import MAX_SPLITS, LLInbox, ll_add_rms_norm, ll_sum
from octavo.kernels.peer_wait import MAX_POLLS, PeerWait
from octavo.kernels.two_shot import TwoShotBuffers, two_shot_add_rms_norm

_EPS = 1e-5
_MAX_ROWS = 4
_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}  # a few roundings of the sum; one of the norm's output


def _gave_up(sides):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return any(side.wait.has_failed() for side in sides)


class _LLRanks:
    """The inboxes of all ranks."""

    def __init__(self, device, world_size: int, max_words: int, num_calls: int = 0) -> None:
        words = tuple(
            torch.zeros(2, _MAX_ROWS, world_size, max_words, dtype=torch.int64, device=device)
            for _ in range(world_size)
        )
        self.inboxes = [
            LLInbox(
                rank,
                words,
                torch.full((_MAX_ROWS, MAX_SPLITS), num_calls, device=device),
                torch.zeros(_MAX_ROWS, MAX_SPLITS, dtype=torch.int64, device=device),
                PeerWait.on(device, max_polls=0),
            )
            for rank in range(world_size)
        ]

    def add_rms_norm(self, partials, residual, weight, splits):
        """What each rank gets."""
        passes = "words", "sums of squares"
        return self._in_passes(
            passes, partials, lambda x, inbox: ll_add_rms_norm(x, residual, weight, _EPS, inbox, splits)
        )

    def sum(self, partials, splits):
        """What each rank gets."""
        return self._in_passes(("words",), partials, lambda x, inbox: ll_sum(x, inbox, splits))

    def _in_passes(self, passes, partials, call):
        for _ in passes:
            counts = [inbox.num_calls.clone() for inbox in self.inboxes]
            self._one_pass(partials, call)
            for inbox, count in zip(self.inboxes, counts, strict=True):
                inbox.num_calls.copy_(count)
                inbox.wait.failed.zero_()
                inbox.wait.host_failed.zero_()
        results = self._one_pass(partials, call)
        assert not _gave_up(self.inboxes)
        return results

    def _one_pass(self, partials, call):
        return [call(partial, inbox) for partial, inbox in zip(partials, self.inboxes, strict=True)]


def _inputs(device, world_size, num_rows, width, dtype):
    *partials, residual = (torch.randn(num_rows, width).to(device, dtype) for _ in range(world_size + 1))
    return partials, residual, torch.randn(width).to(device, dtype)


def _check(results, partials, residual, weight):
    exact = sum(partial.double() for partial in partials)
    normed, total = reference.add_rms_norm(exact, residual.double(), weight.double(), _EPS)
    tolerance = _TOLERANCE[residual.dtype]
    for result in results:
        torch.testing.assert_close(result[1].double(), total, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(result[0].double(), normed, atol=tolerance, rtol=tolerance)
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[1], results[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("world_size", "num_rows", "width", "splits"),
    [(2, 1, 64, 1), (2, 3, 100, 2), (4, 1, 96, 4), (2, 1, 130, 8), (8, 1, 34, 1)],
)
def test_ll_sum_equals_the_reference_with_the_same_bits_on_every_rank(
    world_size, num_rows, width, splits, dtype, device
):
    torch.manual_seed(0)
    inputs = _inputs(device, world_size, num_rows, width, dtype)
    _check(_LLRanks(device, world_size, 160).add_rms_norm(*inputs, splits), *inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_residual_is_one_of_zeros(dtype, device):
    torch.manual_seed(0)
    partials, residual, weight = _inputs(device, 2, 3, 64, dtype)
    residual.zero_()
    pushed = _LLRanks(device, 2, 64).add_rms_norm(partials, None, weight, 2)
    _check(pushed, partials, residual, weight)
    dealt = _TwoShotRanks(device, 2, 2, 4096).add_rms_norm(partials, [None] * 2, weight)
    for (normed, _), (expected, _) in zip(dealt, pushed, strict=True):
        torch.testing.assert_close(normed, expected, atol=_TOLERANCE[dtype], rtol=_TOLERANCE[dtype])


def test_ll_calls_of_all_shapes_follow_one_another(device):
    """Buffers alternate, rows count their own calls, and the number of programs may change."""
    torch.manual_seed(0)
    ranks = _LLRanks(device, 2, 64)
    for num_rows, width, splits in [(1, 64, 4), (3, 64, 1), (1, 32, 2), (2, 60, 8), (3, 64, 4)]:
        inputs = _inputs(device, 2, num_rows, width, torch.float32)
        _check(ranks.add_rms_norm(*inputs, splits), *inputs)
    assert ranks.inboxes[0].num_calls[:, 0].tolist() == [5, 3, 2, 0]
    assert torch.equal(ranks.inboxes[0].num_calls, ranks.inboxes[0].num_calls[:, :1].expand(-1, MAX_SPLITS))


def test_ll_epochs_wrap_round(device):
    torch.manual_seed(0)
    ranks = _LLRanks(device, 2, 64, num_calls=2**32 - 3)
    for _ in range(5):
        inputs = _inputs(device, 2, 1, 64, torch.float32)
        _check(ranks.add_rms_norm(*inputs, 2), *inputs)


def test_a_peer_that_never_sends_is_given_up_and_reported(device):
    inbox = _LLRanks(device, 2, 64).inboxes[0]
    assert not _gave_up([inbox])
    x = torch.ones(1, 64, device=device)
    ll_add_rms_norm(x, x, x[0], _EPS, inbox)
    assert _gave_up([inbox])


def _patient(side):
    return replace(side, wait=replace(side.wait, max_polls=1_000_000))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the words come from another stream there")
def test_ll_waits_for_words_that_come_late(device):
    torch.manual_seed(0)
    ranks = _LLRanks(device, 2, 64)
    partials, residual, weight = _inputs(device, 2, 1, 64, torch.float32)
    ll_add_rms_norm(partials[1], residual, weight, _EPS, ranks.inboxes[1], 1)
    inbox = ranks.inboxes[0].words[0]
    words = inbox.clone()
    inbox.zero_()
    late = threading.Timer(0.1, lambda: inbox[:, :, 1].copy_(words[:, :, 1]))
    late.start()
    result = ll_add_rms_norm(partials[0], residual, weight, _EPS, _patient(ranks.inboxes[0]), 1)
    late.join()
    assert not _gave_up([ranks.inboxes[0]])
    _check([result], partials, residual, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("world_size", "num_rows", "width", "splits"), [(2, 4, 100, 4), (4, 3, 2, None), (2, 1, 8, 1)])
def test_ll_sum_alone_follows_sums_with_norms(world_size, num_rows, width, splits, dtype, device):
    """Both count a row's calls, so either may come next."""
    torch.manual_seed(0)
    ranks = _LLRanks(device, world_size, 64 if width < 100 else 100)
    for _ in range(2):
        partials, residual, weight = _inputs(device, world_size, num_rows, width, dtype)
        _check(ranks.add_rms_norm(partials, residual, weight, 2), partials, residual, weight)
        totals = ranks.sum(partials, splits)
        expected = sum(partial.float() for partial in partials).to(dtype)
        for total in totals:
            torch.testing.assert_close(total, expected, atol=_TOLERANCE[dtype], rtol=_TOLERANCE[dtype])
            assert torch.equal(total, totals[0])


def test_ll_sum_of_whole_numbers_is_exact(device):
    """A histogram's; one number a row too."""
    counts = [torch.arange(4.0, device=device).view(4, 1) * 4_000_001 + rank for rank in range(2)]
    for total in _LLRanks(device, 2, 64).sum(counts, None):
        assert torch.equal(total, counts[0] + counts[1])


def test_ll_sum_refuses_rows_that_do_not_fit(device):
    with pytest.raises(ValueError, match=r"ll_sum: rows .* do not fit"):
        ll_sum(torch.ones(_MAX_ROWS + 1, 64), _LLRanks(device, 2, 64).inboxes[0])


@pytest.fixture
def soon_asks_the_host(device, monkeypatch):
    """In the interpreter the thousands of polls between two looks at the host's word would take ten seconds."""
    if device.type == "cpu":
        monkeypatch.setattr(peer_wait, "_LOOK_POLLS", tl.constexpr(64))


def _abandon_while(wait, call):
    """Runs what waits for a peer that never comes, and has the host end that."""
    later = threading.Timer(0.3, wait.abandon)
    later.start()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    later.join()
    assert wait.has_failed()
    assert wait.failed.item() == 1  # so that no later kernel begins to wait


def test_the_host_ends_a_wait_for_words(device, soon_asks_the_host):
    """The kernel's own patience would not end within the test."""
    ranks = _LLRanks(device, 2, 64)
    inbox = replace(ranks.inboxes[0], wait=replace(ranks.inboxes[0].wait, max_polls=MAX_POLLS))
    x = torch.ones(1, 64, device=device)
    _abandon_while(inbox.wait, lambda: ll_add_rms_norm(x, x, x[0], _EPS, inbox, 1))


def test_the_host_ends_a_wait_for_flags(device, soon_asks_the_host):
    ranks = _TwoShotRanks(device, 2, 1, 4096)  # which owns memory that the kernel knows by address
    mine = replace(ranks.buffers[0], wait=replace(ranks.buffers[0].wait, max_polls=MAX_POLLS))
    x = torch.ones(1, 64, device=device)
    _abandon_while(mine.wait, lambda: two_shot_add_rms_norm(x, x, x[0], _EPS, mine))


def test_three_ranks_are_refused(device):
    assert not _LLRanks(device, 3, 64).inboxes[0].takes(torch.ones(1, 64))
    assert not _TwoShotRanks(device, 3, 2, 4096).buffers[0].takes(torch.ones(1, 64))


def test_words_of_an_earlier_call_are_not_taken(device):
    """After two calls the buffer that the third uses is full of the first's words."""
    torch.manual_seed(0)
    ranks = _LLRanks(device, 2, 64)
    for _ in range(2):
        inputs = _inputs(device, 2, 1, 64, torch.float32)
        ranks.add_rms_norm(*inputs, 1)
    partials, residual, weight = inputs
    ll_add_rms_norm(partials[0], residual, weight, _EPS, ranks.inboxes[0], 1)
    assert _gave_up([ranks.inboxes[0]])


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(_MAX_ROWS + 1, 64),
        torch.ones(1, 65),
        torch.ones(1, 63, dtype=torch.bfloat16),
        torch.ones(1, 64, dtype=torch.float16),
        torch.ones(2, 64).T,
    ],
)
def test_ll_refuses_rows_that_do_not_fit(x, device):
    inbox = _LLRanks(device, 2, 64).inboxes[0]
    assert not inbox.takes(x)
    with pytest.raises(ValueError, match="do not fit"):
        ll_add_rms_norm(x, x, x[0], _EPS, inbox)


class _TwoShotRanks:
    """The buffers of all ranks."""

    def __init__(self, device, world_size: int, num_programs: int, num_bytes: int, num_calls: int = 0) -> None:
        inputs, self.normed = (
            tuple(torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(world_size)) for _ in range(2)
        )
        flags = [torch.zeros(num_programs, 2, world_size, dtype=torch.int32, device=device) for _ in range(world_size)]
        addresses = torch.tensor([rank.data_ptr() for rank in flags], device=device)
        self.buffers = [
            TwoShotBuffers(
                rank,
                inputs,
                self.normed,
                flags[rank],
                addresses,
                torch.full((num_programs,), num_calls, dtype=torch.int32, device=device),
                PeerWait.on(device, max_polls=0),
            )
            for rank in range(world_size)
        ]

    def add_rms_norm(self, partials, residuals, weight):
        """What each rank gets; sums that it need not have are NaN."""
        for partial, buffers in zip(partials, self.buffers, strict=True):
            buffers.input_like(partial).copy_(partial)
        counts = [buffers.num_calls.clone() for buffers in self.buffers]
        self._one_pass(partials, residuals, weight)
        for rank, buffers in enumerate(self.buffers):
            self.normed[rank].fill_(255)  # NaN
            buffers.num_calls.copy_(counts[rank])
            buffers.wait.failed.zero_()
            buffers.wait.host_failed.zero_()
        results = self._one_pass(partials, residuals, weight)
        assert not _gave_up(self.buffers)
        for rank, (_, own) in enumerate(results):
            is_elsewhere = torch.arange(len(own), device=own.device) % len(results) != rank
            own[is_elsewhere] = torch.nan
        return results

    def _one_pass(self, partials, residuals, weight):
        return [
            two_shot_add_rms_norm(partial, residual, weight, _EPS, buffers)
            for partial, residual, buffers in zip(partials, residuals, self.buffers, strict=True)
        ]


def _with_whole_sums(results):
    """As if each rank had the sums of all."""
    whole = torch.stack([own for _, own in results]).nan_to_num(0.0).sum(0)
    return [(normed, whole) for normed, _ in results]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("world_size", "num_rows", "width"), [(2, 1, 64), (2, 5, 104), (4, 6, 64), (8, 11, 72)])
def test_two_shot_sum_equals_the_reference_with_the_same_bits_on_every_rank(world_size, num_rows, width, dtype, device):
    torch.manual_seed(0)
    partials, residual, weight = _inputs(device, world_size, num_rows, width, dtype)
    ranks = _TwoShotRanks(device, world_size, 3, 8192)
    results = ranks.add_rms_norm(partials, [residual] * world_size, weight)
    _check(_with_whole_sums(results), partials, residual, weight)


def test_two_shot_takes_its_last_sum_as_the_residual_and_epochs_wrap_round(device):
    torch.manual_seed(0)
    ranks = _TwoShotRanks(device, 2, 2, 4096, num_calls=2**31 - 3)
    partials, residual, weight = _inputs(device, 2, 3, 64, torch.float32)
    residuals, expected = [residual, residual], residual
    for _ in range(5):
        partials, _, weight = _inputs(device, 2, 3, 64, torch.float32)
        results = ranks.add_rms_norm(partials, residuals, weight)
        _check(_with_whole_sums(results), partials, expected, weight)
        residuals = [own for _, own in results]
        expected = _with_whole_sums(results)[0][1]


def test_two_shot_calls_of_all_shapes_follow_one_another(device):
    torch.manual_seed(0)
    ranks = _TwoShotRanks(device, 2, 3, 4096)
    for num_rows, width in [(6, 64), (1, 64), (5, 32), (2, 128)]:
        partials, residual, weight = _inputs(device, 2, num_rows, width, torch.float32)
        results = ranks.add_rms_norm(partials, [residual] * 2, weight)
        _check(_with_whole_sums(results), partials, residual, weight)
    assert ranks.buffers[0].num_calls.tolist() == [4, 2, 2]


def test_two_shot_gives_up_a_peer_that_never_comes(device):
    ranks = _TwoShotRanks(device, 2, 1, 4096)
    x = torch.ones(1, 64, device=device)
    two_shot_add_rms_norm(x, x, x[0], _EPS, ranks.buffers[0])
    assert _gave_up([ranks.buffers[0]])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the flags come from another stream there")
def test_two_shot_waits_for_flags_that_come_late(device):
    torch.manual_seed(0)
    ranks = _TwoShotRanks(device, 2, 1, 4096)
    partials, residual, weight = _inputs(device, 2, 1, 64, torch.float32)
    mine, peer = ranks.buffers
    mine.input_like(partials[0]).copy_(partials[0])
    flags = mine.flags[0, :, 1]

    def come() -> None:
        peer.input_like(partials[1]).copy_(partials[1])
        flags[0] = 1
        flags[1] = 1

    late = threading.Timer(0.1, come)
    late.start()
    result = two_shot_add_rms_norm(partials[0], residual, weight, _EPS, _patient(mine))
    late.join()
    assert not _gave_up([mine])
    _check([result], partials, residual, weight)


def test_two_shot_waits_for_every_input_and_every_result(device):
    """A rank whose peer has only said that its input is whole still waits for results."""
    ranks = _TwoShotRanks(device, 2, 1, 4096)
    x = torch.ones(2, 64, device=device)
    mine = ranks.buffers[0]
    mine.flags[0, 0, 1] = 1
    two_shot_add_rms_norm(x, x, x[0], _EPS, mine)
    assert _gave_up([mine])


@pytest.mark.parametrize(
    "x", [torch.ones(5, 64), torch.ones(1, 66), torch.ones(2, 4096), torch.ones(1, 64).half(), torch.ones(8, 2).T]
)
def test_two_shot_refuses_rows_that_do_not_fit(x, device):
    buffers = _TwoShotRanks(device, 2, 2, 4096).buffers[0]
    assert not buffers.takes(x)
    with pytest.raises(ValueError, match="do not fit"):
        two_shot_add_rms_norm(x, x, x[0], _EPS, buffers)
