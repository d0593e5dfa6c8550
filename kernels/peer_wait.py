"""Waiting for another GPU's words without waiting for ever.

A kernel that polls for what a dead rank will never send would keep its GPU busy, and its process from ending. Polls are
counted instead: at the limit a kernel says so, gives up, and from then on no kernel waits at all. The host may end all
waits too (`abandon`): it sets a word of its own memory, and kernels that have waited for long look at that. What a
kernel that gave up returns is worthless; whoever uses results asks `has_failed` first.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# A poll takes 0.5-1 us: about half a minute. Ranks may fall apart by what one compiles and another has cached.
MAX_POLLS = 1 << 26
# Polls from one look at the host's word to the next, a power of two: some 3 ms. A look crosses PCIe, 1-2 us, and no sum
# that goes well waits for as long as the first.
_LOOK_POLLS = tl.constexpr(4096)


@dataclass(frozen=True, slots=True)
class PeerWait:
    """The patience of one rank's kernels. One for each device, at one place: graphs know it."""

    failed: torch.Tensor  # [1] int32, on the device: what kernels read before they wait
    host_failed: torch.Tensor  # [1] int32, pinned host memory: kernels write it, and read it while they wait for long
    max_polls: int = MAX_POLLS

    @classmethod
    def on(cls, device: torch.device, max_polls: int = MAX_POLLS) -> "PeerWait":
        """For kernels that run on `device`."""
        pinned = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        return cls(torch.zeros(1, dtype=torch.int32, device=device), pinned, max_polls)

    def has_failed(self) -> bool:
        """Whether a wait was given up. Does not wait for the device."""
        return bool(self.host_failed.item())

    def abandon(self) -> None:
        """Ends all waits, within some milliseconds. For any thread: nothing is asked of the device."""
        self.host_failed.fill_(1)


@triton.jit
def polls_allowed(failed_ptr: tl.tensor, max_polls: tl.tensor) -> tl.tensor:
    """None once a wait has failed."""
    return tl.where(tl.load(failed_ptr) == 0, max_polls, 0)


@triton.jit
def wait_state(
    is_missing: tl.tensor, polls_left: tl.tensor, host_failed_ptr: tl.tensor, looks: tl.constexpr
) -> tl.tensor:
    """Of a block of words or flags: 0 if nothing is missing; 1 if something is, and is given up; 2 if it is awaited.

    `looks`: whether the host may be asked. The answer is part of the reduction, so that all threads go on alike.
    """
    awaited = 2
    if looks:
        is_turn = (polls_left & (_LOOK_POLLS - 1)) == 0
        awaited = tl.where(tl.load(host_failed_ptr, is_turn, other=0, volatile=True) == 0, 2, 1)
    return tl.max(tl.where(is_missing, awaited, 0))


@triton.jit
def report_missing(state: tl.tensor, failed_ptr: tl.tensor, host_failed_ptr: tl.tensor) -> None:
    """Says that a wait has failed, if it ended with anything missing."""
    if state > 0:
        tl.store(failed_ptr, 1)
        tl.store(host_failed_ptr, 1)
