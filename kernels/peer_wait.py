"""Waiting for another GPU's words without waiting for ever.

A kernel that polls for what a dead rank will never send would keep its GPU busy, and its process from ending. Polls are
counted instead: at the limit a kernel says so, gives up, and from then on no kernel waits at all. What it returns by
then is worthless; whoever uses results asks `has_failed` first.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# A poll takes 0.5-1 us: about half a minute. Ranks may fall apart by what one compiles and another has cached.
MAX_POLLS = 1 << 26


@dataclass(frozen=True, slots=True)
class PeerWait:
    """The patience of one rank's kernels. One for each device."""

    failed: torch.Tensor  # [1] int32, on the device: what the kernels read
    seen_by_host: torch.Tensor  # [1] int32, pinned host memory that the kernels write to
    max_polls: int = MAX_POLLS

    @classmethod
    def on(cls, device: torch.device, max_polls: int = MAX_POLLS) -> "PeerWait":
        """For kernels that run on `device`."""
        pinned = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        return cls(torch.zeros(1, dtype=torch.int32, device=device), pinned, max_polls)

    def has_failed(self) -> bool:
        """Whether a peer kept a kernel waiting beyond the limit. Does not wait for the device."""
        return bool(self.seen_by_host.item())


@triton.jit
def polls_allowed(failed_ptr: tl.tensor, max_polls: tl.tensor) -> tl.tensor:
    """None once a wait has failed."""
    return tl.where(tl.load(failed_ptr) == 0, max_polls, 0)


@triton.jit
def report_missing(num_missing: tl.tensor, failed_ptr: tl.tensor, seen_by_host_ptr: tl.tensor) -> None:
    """Says that a wait has failed, if it ended with anything missing."""
    if num_missing > 0:
        tl.store(failed_ptr, 1)
        tl.store(seen_by_host_ptr, 1)
