"""Words that ranks store into each other's memory without a flag or a fence beside them.

A word has 8 bytes: 4 of data and 4 of the call's number, the epoch. A store of 8 aligned bytes arrives whole, so a word
with the right epoch has its data, and whoever awaits it polls the word itself.
"""

import triton
import triton.language as tl

from .peer_wait import report_missing, wait_state


@triton.jit
def make_words(data: tl.tensor, epoch: tl.tensor) -> tl.tensor:
    """Int64 words of int32 data and the int32 epoch."""
    return epoch.to(tl.int64) << 32 | (data.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def _is_missing(words: tl.tensor, mask: tl.tensor, epoch: tl.tensor) -> tl.tensor:
    return ((words >> 32).to(tl.int32) != epoch) & mask


@triton.jit
def await_words(
    places: tl.tensor,
    mask: tl.tensor,
    epoch: tl.tensor,
    failed_ptr: tl.tensor,
    host_failed_ptr: tl.tensor,
    max_polls: tl.tensor,
) -> tl.tensor:
    """The data, int32, of words that others store at `places`, when all are there."""
    # Volatile loads of 64-bit elements read each word whole, two in an instruction.
    words = tl.load(places, mask, other=0, volatile=True)
    state = wait_state(_is_missing(words, mask, epoch), max_polls, host_failed_ptr, looks=False)
    while (state > 1) & (max_polls > 0):
        words = tl.load(places, mask, other=0, volatile=True)
        max_polls -= 1
        state = wait_state(_is_missing(words, mask, epoch), max_polls, host_failed_ptr, looks=True)
    report_missing(state, failed_ptr, host_failed_ptr)
    return words.to(tl.int32)
