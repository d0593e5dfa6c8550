"""The greatest of all ranks' sampled candidates, exchanged in words that need no barrier, and its token handed out.

A candidate is an int64 key, as kernels/sampling.py makes them. Each rank stores its greatest key of a row into every
rank's inbox as two words (kernels/ll_words.py), reads all ranks' keys from its own, and takes the maximum: one kernel,
one program a row, and the same token on every rank.

Rows count their own calls, and call e uses buffer e mod 2. That two buffers are enough, and that nothing locks up, is
for the reasons that kernels/ll_all_reduce.py gives.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .ll_words import await_words, make_words
from .pdl import starts_early, wait_for_earlier_kernels
from .peer_wait import PeerWait, polls_allowed
from .sampling import TAKE_BLOCK, greatest_key, hand_out_token

_KEY_WORDS = 2  # the low half, the high half


@dataclass(frozen=True, slots=True)
class KeyInbox:
    """One rank's side of the exchange. What is in it belongs to the kernel."""

    rank: int
    # Every rank's words [2, max_rows, world_size, 2] int64, symmetric, in rank order; all zero at first.
    words: tuple[torch.Tensor, ...]
    num_calls: torch.Tensor  # [max_rows] int64: a row's calls so far
    wait: PeerWait

    @staticmethod
    def words_shape(max_rows: int, world_size: int) -> tuple[int, ...]:
        """Of each rank's words."""
        return 2, max_rows, world_size, _KEY_WORDS

    def takes(self, keys: torch.Tensor) -> bool:
        """Whether keys [num_rows, num_parts] fit."""
        return (
            keys.dtype == torch.int64
            and keys.dim() == 2
            and keys.is_contiguous()
            and len(self.words).bit_count() == 1  # programs count ranks in powers of two
            and 0 < len(keys) <= len(self.num_calls)
            and keys.shape[1] > 0
        )


@triton.jit(do_not_specialize=["num_parts"])
def _ll_take_kernel(
    keys_ptr: tl.tensor,  # [num_rows, num_parts] int64
    token_ids_ptr: tl.tensor,  # [num_rows] int32 or int64
    token_table_ptr: tl.tensor,  # [num_cells] int32, if there is one
    cells_ptr: tl.tensor,  # [num_rows] int64
    inboxes: tl.tuple,  # of every rank: [2, max_rows, world_size, 2] int64
    inbox_ptr: tl.tensor,  # this rank's
    num_calls_ptr: tl.tensor,  # [max_rows] int64
    failed_ptr: tl.tensor,
    host_failed_ptr: tl.tensor,
    max_polls: tl.tensor,
    vocab_size: tl.tensor,
    num_parts: tl.tensor,
    has_table: tl.constexpr,
    block: tl.constexpr,
    rank: tl.constexpr,
    world_size: tl.constexpr,
    max_rows: tl.constexpr,
    pdl: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    wait_for_earlier_kernels(pdl)
    num_calls = tl.load(num_calls_ptr + row)
    max_polls = polls_allowed(failed_ptr, max_polls)
    best = greatest_key(keys_ptr + row * num_parts, num_parts, block)

    # Send.
    epoch = (num_calls + 1).to(tl.int32)
    halves = tl.arange(0, 2)
    words = make_words(tl.where(halves == 0, best & 0xFFFFFFFF, best >> 32).to(tl.int32), epoch)
    buffer = ((num_calls & 1) * max_rows + row) * (2 * world_size)
    for distance in tl.static_range(1, world_size + 1):
        # Written through: an ordinary store of the same width, but one whose order and size nobody may change.
        place = inboxes[(rank + distance) % world_size] + buffer + 2 * rank
        tl.store(place + halves, words, cache_modifier=".wt")

    # Receive.
    columns = 2 * tl.arange(0, world_size)[:, None] + halves[None, :]
    places, mask = inbox_ptr + buffer + columns, columns >= 0
    data = await_words(places, mask, epoch, failed_ptr, host_failed_ptr, max_polls).to(tl.int64)
    keys = tl.sum(tl.where(halves[None, :] == 0, data & 0xFFFFFFFF, data << 32), axis=1)
    hand_out_token(tl.max(keys, axis=0), row, token_ids_ptr, token_table_ptr, cells_ptr, vocab_size, has_table)
    tl.store(num_calls_ptr + row, num_calls + 1)


def ll_take_tokens(
    keys: torch.Tensor,
    vocab_size: int,
    inbox: KeyInbox,
    out: torch.Tensor,
    token_table: torch.Tensor | None = None,
    cells: torch.Tensor | None = None,
) -> None:
    """Writes the token of each row's greatest key of all ranks to `out`, and to `token_table` where one is given.

    As kernels/sampling.py's take_tokens, with this rank's keys [num_rows, num_parts], which `inbox` takes. All ranks
    call it in the same order with as many rows. Raises ValueError for keys that do not fit.
    """
    if not inbox.takes(keys):
        raise ValueError(f"ll_take_tokens: keys [{list(keys.shape)}, {keys.dtype}, {keys.stride()}] do not fit")
    num_rows, num_parts = keys.shape
    _, max_rows, world_size, _ = inbox.words[0].shape
    pdl = starts_early(keys.device, num_rows)
    _ll_take_kernel[(num_rows,)](
        keys,
        out,
        out if token_table is None else token_table,
        keys if cells is None else cells,
        inbox.words,
        inbox.words[inbox.rank],
        inbox.num_calls,
        inbox.wait.failed,
        inbox.wait.host_failed,
        inbox.wait.max_polls,
        vocab_size,
        num_parts,
        has_table=token_table is not None,
        block=TAKE_BLOCK,
        rank=inbox.rank,
        world_size=world_size,
        max_rows=max_rows,
        pdl=pdl,
        num_warps=1,
        launch_pdl=pdl,
    )
