"""A small sum over ranks, the residual added and normed, in one kernel without a barrier ("LL", as NCCL calls its
low-latency protocol). Or the sum alone.

    sum = round(residual + x_0 + x_1 + ...);  normed = sum / sqrt(mean(sum^2) + eps) * weight

Each rank stores its row x_r into every rank's inbox as words (kernels/ll_words.py) of one float32 or two bfloat16, and
the call's number, the epoch. A receiver polls the words themselves: one trip over NVLink, nothing to fence. Every rank,
the sender too, reads its own inbox, so all add the same numbers in the same order and get the same bits.

A row is split over programs, which tell each other their sums of squares in the same kind of words.

**Why two buffers are enough.** Each row counts its own calls, and call e uses buffer e mod 2. Let rank A be about to
send call e + 2 into the buffer where rank B reads call e. A's kernel of e + 1 has ended, so it has had B's words of
e + 1; B sends those only when its kernel of e has ended, by the order of its stream (`gdc_wait` keeps it under
programmatic launch). So B reads no more. For the same reason a word that is awaited at e last held e - 2, and epochs
may wrap round: they are compared for equality alone. (Words beyond the end of narrower rows may be older, and would
have to be left alone for 2^32 calls to look new.)

**Why it cannot lock up.** Programs start in the order of their ids and send before they wait. The first row that is not
yet done anywhere is therefore running on every rank.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .ll_words import await_words, make_words
from .norm import check_residual
from .pdl import has_pdl, wait_for_earlier_kernels
from .peer_wait import PeerWait, polls_allowed

_DTYPES = (torch.float32, torch.bfloat16)
_WORD_BYTES = 4  # of data
MAX_SPLITS = 8  # programs of one row
_DEFAULT_SPLITS = 4
# Words of a thread: 16 bytes of every rank.
_THREAD_WORDS = 2
# Said so that the compiler does not save registers by loading what one rank sent only after another's has come.
_NUM_REGISTERS = 128


@dataclass(frozen=True, slots=True)
class LLInbox:
    """One rank's side of the exchange. What is in it belongs to the kernel."""

    rank: int
    # Every rank's words [2, max_rows, world_size, max_words] int64, symmetric, in rank order; all zero at first.
    words: tuple[torch.Tensor, ...]
    num_calls: torch.Tensor  # [max_rows, MAX_SPLITS] int64: a row's calls so far, once for each program that asks
    squares: torch.Tensor  # [max_rows, MAX_SPLITS] int64: words of the sums of squares; zero at first
    wait: PeerWait

    def takes(self, x: torch.Tensor) -> bool:
        """Whether rows [num_rows, width] fit."""
        _, max_rows, _, max_words = self.words[0].shape
        row_bytes = x.shape[-1] * x.itemsize
        return (
            x.dtype in _DTYPES
            and x.dim() == 2
            and x.is_contiguous()
            and len(self.words).bit_count() == 1  # programs count ranks in powers of two
            and 0 < len(x) <= max_rows
            and row_bytes % _WORD_BYTES == 0
            and 0 < row_bytes <= max_words * _WORD_BYTES
        )


@triton.jit
def _unpack(data: tl.tensor, paired: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The two numbers of a word's int32 of data, as float32. One float32 has a 0 beside it."""
    if paired:
        return (data << 16).to(tl.float32, bitcast=True), (data & -65536).to(tl.float32, bitcast=True)
    first = data.to(tl.float32, bitcast=True)
    return first, tl.zeros_like(first)


@triton.jit
def _pack(first: tl.tensor, second: tl.tensor, paired: tl.constexpr) -> tl.tensor:
    """The inverse, rounding to bfloat16."""
    if paired:
        low = first.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
        high = second.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
        return (high << 16 | low).to(tl.int32, bitcast=True)
    return first.to(tl.int32, bitcast=True)


@triton.jit
def _ll_add_rms_norm_kernel(
    x_ptr: tl.tensor,  # [num_rows, num_words] int32, and so all the next but the weight
    residual_ptr: tl.tensor,  # if there is one
    weight_ptr: tl.tensor,  # [num_words] int32, if there is a norm
    normed_ptr: tl.tensor,  # likewise
    sum_ptr: tl.tensor,
    inboxes: tl.tuple,  # of every rank: [2, max_rows, world_size, max_words] int64
    inbox_ptr: tl.tensor,  # this rank's
    num_calls_ptr: tl.tensor,  # [max_rows, max_splits] int64
    squares_ptr: tl.tensor,  # [max_rows, max_splits] int64
    failed_ptr: tl.tensor,
    host_failed_ptr: tl.tensor,
    max_polls: tl.tensor,
    eps: tl.tensor,
    rank: tl.constexpr,
    world_size: tl.constexpr,
    num_words: tl.constexpr,
    part_words: tl.constexpr,  # a power of two
    splits: tl.constexpr,
    paired: tl.constexpr,
    has_residual: tl.constexpr,
    has_norm: tl.constexpr,
    max_rows: tl.constexpr,
    max_words: tl.constexpr,
    max_splits: tl.constexpr,
    pdl: tl.constexpr,
) -> None:
    row = tl.program_id(0) // splits
    part = tl.program_id(0) % splits
    columns = part * part_words + tl.arange(0, part_words)
    mask = columns < num_words
    weight_first, weight_second = _unpack(tl.load(weight_ptr + columns, mask & has_norm, other=0), paired)
    wait_for_earlier_kernels(pdl)

    # Send.
    cells = row * num_words + columns
    num_calls = tl.load(num_calls_ptr + row * max_splits + part)
    x = tl.load(x_ptr + cells, mask, other=0)
    residual = tl.load(residual_ptr + cells, mask & has_residual, other=0)
    residual_first, residual_second = _unpack(residual, paired)
    max_polls = polls_allowed(failed_ptr, max_polls)
    epoch = (num_calls + 1).to(tl.int32)
    words = make_words(x, epoch)
    buffer = ((num_calls & 1) * max_rows + row) * (world_size * max_words)
    for distance in tl.static_range(1, world_size + 1):
        # From the next rank round to this one, so that not all send to one at once.
        inbox = inboxes[(rank + distance) % world_size] + buffer + rank * max_words
        # Written through: an ordinary store of the same width, but one whose order and size nobody may change.
        tl.store(inbox + columns, words, mask, cache_modifier=".wt")

    # Receive.
    senders = tl.arange(0, world_size)[:, None] * max_words
    places = inbox_ptr + buffer + senders + columns[None, :]
    data = await_words(places, mask[None, :], epoch, failed_ptr, host_failed_ptr, max_polls)
    first, second = _unpack(data, paired)
    total = _pack(tl.sum(first, axis=0) + residual_first, tl.sum(second, axis=0) + residual_second, paired)
    tl.store(sum_ptr + cells, total, mask)

    if has_norm:
        # Norm: what the next layer adds to is what is normed.
        first, second = _unpack(total, paired)
        squares = tl.sum(first * first + second * second)
        if splits > 1:
            parts = squares_ptr + row * max_splits + tl.arange(0, splits)
            word = make_words(squares.to(tl.int32, bitcast=True), epoch)
            tl.store(squares_ptr + row * max_splits + part, word, cache_modifier=".wt")
            data = await_words(parts, tl.arange(0, splits) < splits, epoch, failed_ptr, host_failed_ptr, max_polls)
            squares = tl.sum(data.to(tl.float32, bitcast=True))
        width: tl.constexpr = num_words * (2 if paired else 1)
        scale = tl.rsqrt(squares / width + eps)
        normed = _pack(first * scale * weight_first, second * scale * weight_second, paired)
        tl.store(normed_ptr + cells, normed, mask)
    # Together a row's programs count in every column, each where no other does: the next call may be split otherwise.
    for column in tl.static_range(0, max_splits, splits):
        tl.store(num_calls_ptr + row * max_splits + column + part, num_calls + 1)


def ll_add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    inbox: LLInbox,
    splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of the ranks' x and the residual added up, and that sum rounded to x's dtype: new tensors.

    x, residual: [num_rows, width] contiguous, of which `inbox` takes x; residual may be None, for zeros; weight:
    [width]. All ranks call it in the same order with the same shapes, residual and weight, and get the same bits.
    `splits`: programs of a row, a power of two up to MAX_SPLITS. Raises ValueError for tensors that the kernel does not
    take.
    """
    _check(x, residual, weight, inbox)
    normed, total = torch.empty_like(x), torch.empty_like(x)
    _launch(x, residual, weight, normed, total, eps, inbox, splits)
    return normed, total


def ll_sum(x: torch.Tensor, inbox: LLInbox, splits: int | None = None) -> torch.Tensor:
    """The ranks' x added up, rounded to x's dtype: a new tensor.

    As ll_add_rms_norm without residual and norm.
    """
    _check_rows("ll_sum", x, inbox)
    total = torch.empty_like(x)
    _launch(x, None, None, None, total, 0.0, inbox, splits)
    return total


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    normed: torch.Tensor | None,
    total: torch.Tensor,
    eps: float,
    inbox: LLInbox,
    splits: int | None,
) -> None:
    _, max_rows, world_size, max_words = inbox.words[0].shape
    num_words = x.shape[1] * x.itemsize // _WORD_BYTES
    block = triton.next_power_of_2(num_words)
    splits = min(splits or _DEFAULT_SPLITS, block)
    pdl = has_pdl(x.device)
    tensors = (x, residual, weight, normed, total)
    _ll_add_rms_norm_kernel[(len(x) * splits,)](
        *((x if tensor is None else tensor).view(torch.int32) for tensor in tensors),
        inbox.words,
        inbox.words[inbox.rank],
        inbox.num_calls,
        inbox.squares,
        inbox.wait.failed,
        inbox.wait.host_failed,
        inbox.wait.max_polls,
        eps,
        rank=inbox.rank,
        world_size=world_size,
        num_words=num_words,
        part_words=block // splits,
        splits=splits,
        paired=x.itemsize < _WORD_BYTES,
        has_residual=residual is not None,
        has_norm=normed is not None,
        max_rows=max_rows,
        max_words=max_words,
        max_splits=MAX_SPLITS,
        pdl=pdl,
        num_warps=min(max(block // splits // (32 * _THREAD_WORDS), 1), 16),
        maxnreg=_NUM_REGISTERS,
        launch_pdl=pdl,
    )


def _check(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, inbox: LLInbox) -> None:
    _check_rows("ll_add_rms_norm", x, inbox)
    check_residual("ll_add_rms_norm", x, residual)
    if weight.shape != x.shape[1:] or weight.dtype != x.dtype or not weight.is_contiguous():
        raise ValueError(f"ll_add_rms_norm: the weight {list(weight.shape)}, {weight.dtype} does not fit x")


def _check_rows(what: str, x: torch.Tensor, inbox: LLInbox) -> None:
    if not inbox.takes(x):
        raise ValueError(f"{what}: rows [{list(x.shape)}, {x.dtype}, strides {x.stride()}] do not fit")
