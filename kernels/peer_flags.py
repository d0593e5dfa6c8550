"""Flags that ranks set in each other's memory: whoever has seen one sees what was written before it.

A flag is a count of calls, so nothing is reset. Whoever awaits one gives up as kernels/peer_wait.py says.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .peer_wait import PeerWait, polls_allowed, report_missing, wait_state


@dataclass(frozen=True, slots=True)
class PeerFlag:
    """One rank's side of a flag that each of two ranks has for the other. Kernels of their own raise and await it, so a
    stream may wait for what another stream of the peer's sends, by any means."""

    mine: torch.Tensor  # [1] int32, zero at first: what the peer raises
    peer_address: torch.Tensor  # [1] int64: of the peer's
    num_raised: torch.Tensor  # [1] int32: calls of `raise_for_peer`
    num_awaited: torch.Tensor  # [1] int32
    wait: PeerWait

    def raise_for_peer(self) -> None:
        """Behind all that is queued in the current stream."""
        _raise_flag_kernel[(1,)](self.peer_address, self.num_raised, on_gpu=self.mine.is_cuda, num_warps=1)

    def hold_until_raised(self) -> None:
        """Has the current stream wait until the peer has raised it as often as this was called. It must not raise it
        again before."""
        wait = self.wait
        _await_flag_kernel[(1,)](
            self.mine,
            self.num_awaited,
            wait.failed,
            wait.host_failed,
            wait.max_polls,
            on_gpu=self.mine.is_cuda,
            num_warps=1,
        )


@triton.jit
def _read_flags(flags: tl.tensor, on_gpu: tl.constexpr) -> tl.tensor:
    """What a peer wrote before it set a flag is seen by whoever has read the flag so."""
    if on_gpu:
        return tl.inline_asm_elementwise(
            "ld.acquire.sys.global.b32 $0, [$1];", "=r,l", [flags], dtype=tl.int32, is_pure=False, pack=1
        )
    return tl.load(flags)


@triton.jit
def await_flags(
    flags: tl.tensor,  # [world_size] pointers to this rank's memory
    value: tl.tensor,
    failed_ptr: tl.tensor,
    host_failed_ptr: tl.tensor,
    max_polls: tl.tensor,
    on_gpu: tl.constexpr,
) -> None:
    state = wait_state(_read_flags(flags, on_gpu) != value, max_polls, host_failed_ptr, looks=False)
    while (state > 1) & (max_polls > 0):
        max_polls -= 1
        state = wait_state(_read_flags(flags, on_gpu) != value, max_polls, host_failed_ptr, looks=True)
    report_missing(state, failed_ptr, host_failed_ptr)
    tl.debug_barrier()  # each thread goes on behind all flags


@triton.jit
def release(on_gpu: tl.constexpr) -> None:
    """Whoever sees what this program writes from here on sees what it wrote before."""
    if on_gpu:
        tl.inline_asm_elementwise("fence.acq_rel.sys; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


# Flags lie side by side: an address more or less aligned is no reason for another variant.
@triton.jit(do_not_specialize_on_alignment=["peer_address_ptr", "num_calls_ptr"])
def _raise_flag_kernel(
    peer_address_ptr: tl.tensor,  # [1] int64
    num_calls_ptr: tl.tensor,  # [1] int32
    on_gpu: tl.constexpr,
) -> None:
    count = (tl.load(num_calls_ptr).to(tl.int64) + 1).to(tl.int32)  # wraps round, which numpy warns of
    release(on_gpu)
    tl.store(tl.load(peer_address_ptr).to(tl.pointer_type(tl.int32)), count, cache_modifier=".wt")
    tl.store(num_calls_ptr, count)


@triton.jit(do_not_specialize_on_alignment=["flag_ptr", "num_calls_ptr"])
def _await_flag_kernel(
    flag_ptr: tl.tensor,  # [1] int32
    num_calls_ptr: tl.tensor,  # [1] int32
    failed_ptr: tl.tensor,
    host_failed_ptr: tl.tensor,
    max_polls: tl.tensor,
    on_gpu: tl.constexpr,
) -> None:
    count = (tl.load(num_calls_ptr).to(tl.int64) + 1).to(tl.int32)
    max_polls = polls_allowed(failed_ptr, max_polls)
    await_flags(flag_ptr + tl.arange(0, 1), count, failed_ptr, host_failed_ptr, max_polls, on_gpu)
    tl.store(num_calls_ptr, count)
