"""A medium sum over ranks, the residual added and normed, each row by one rank and then handed to all ("two-shot").

    sum = round(residual + x_0 + x_1 + ...);  normed = sum / sqrt(mean(sum^2) + eps) * weight

Rows are dealt to the ranks like cards. A rank reads its rows from every rank's input buffer, in rank order, and writes
their norm into every rank's output buffer: all ranks have the same bits, because one rank made them. The sum it keeps:
it is the residual of the same rows in the next call. Program p of
each rank exchanges two flags with program p of every other, and waits for no other program: "my input is whole" before
it reads, "my results are with you" before it ends. A flag is the program's own count of calls, so nothing is reset.

**When buffers may be written again.** A rank's kernel ends when every program has had "my results are with you" from
all peers, who have then read its input: the next product may write there. A peer writes results of the next call only
after this rank's "my input is whole" of that call, which follows in the stream on whatever read the last results.

**Why it cannot lock up.** Programs start in the order of their ids, so the first one not yet done anywhere is running
on every rank.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .norm import check_residual
from .peer_flags import await_flags, release
from .peer_wait import PeerWait, polls_allowed

_DTYPES = (torch.float32, torch.bfloat16)
_VECTOR_BYTES = 16
# Said so that the compiler does not save registers by reading one peer's memory only after another's.
_NUM_REGISTERS = 64


@dataclass(frozen=True, slots=True)
class TwoShotBuffers:
    """One rank's side of the exchange. Tuples have every rank's symmetric memory, in rank order."""

    rank: int
    inputs: tuple[torch.Tensor, ...]  # [max_bytes] uint8 each
    normed: tuple[torch.Tensor, ...]  # [max_bytes] uint8
    flags: torch.Tensor  # [max_programs, 2, world_size] int32, this rank's: input whole, results there; zero at first
    flag_addresses: torch.Tensor  # [world_size] int64: of every rank's flags
    num_calls: torch.Tensor  # [max_programs] int32: calls in which a program took part
    wait: PeerWait

    def takes(self, x: torch.Tensor) -> bool:
        """Whether rows [num_rows, width] fit."""
        return (
            x.dtype in _DTYPES
            and x.dim() == 2
            and x.is_contiguous()
            and len(self.inputs).bit_count() == 1  # programs count ranks in powers of two
            and 0 < x.nbytes <= len(self.inputs[0])
            and triton.cdiv(len(x), len(self.inputs)) <= len(self.num_calls)
            and x.shape[1] * x.itemsize % _VECTOR_BYTES == 0
        )

    def input_like(self, x: torch.Tensor) -> torch.Tensor:
        """The part of this rank's input buffer that holds a tensor like x. Products may write to it."""
        return _view(self.inputs[self.rank], x)


def _view(buffer: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return buffer[: like.nbytes].view(like.dtype).view(like.shape)


@triton.jit(do_not_specialize=["num_rows"])
def _two_shot_add_rms_norm_kernel(
    residual_ptr: tl.tensor,  # [num_rows, width], if there is one
    weight_ptr: tl.tensor,  # [width]
    inputs: tl.tuple,  # of every rank: [num_rows, width]
    normed: tl.tuple,
    sum_ptr: tl.tensor,  # [num_rows, width]
    own_flags_ptr: tl.tensor,  # [max_programs, 2, world_size] int32
    flag_addresses_ptr: tl.tensor,  # [world_size] int64
    num_calls_ptr: tl.tensor,  # [max_programs] int32
    failed_ptr: tl.tensor,
    host_failed_ptr: tl.tensor,
    max_polls: tl.tensor,
    num_rows: tl.tensor,
    eps: tl.tensor,
    rank: tl.constexpr,
    world_size: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,  # the power of two that holds a row
    has_residual: tl.constexpr,
    on_gpu: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    row = program * world_size + rank
    columns = tl.arange(0, block)
    mask = (columns < width) & (row < num_rows)
    cells = row * width + columns
    ranks = tl.arange(0, world_size)
    start = program * 2 * world_size
    own_flags = own_flags_ptr + start + ranks
    peer_flags = tl.load(flag_addresses_ptr + ranks).to(tl.pointer_type(tl.int32)) + start + rank

    count = (tl.load(num_calls_ptr + program).to(tl.int64) + 1).to(tl.int32)  # wraps round, which numpy warns of
    max_polls = polls_allowed(failed_ptr, max_polls)
    # The input was whole before this kernel began. Flags are written through: they are not to wait for anything.
    tl.store(peer_flags, count, cache_modifier=".wt")
    weight = tl.load(weight_ptr + columns, columns < width, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + cells, mask & has_residual, other=0.0).to(tl.float32)
    await_flags(own_flags, count, failed_ptr, host_failed_ptr, max_polls, on_gpu)

    total = tl.zeros([block], tl.float32)
    for peer in tl.static_range(world_size):
        total += tl.load(inputs[peer] + cells, mask, other=0.0).to(tl.float32)
    rounded = (total + residual).to(residual_ptr.dtype.element_ty)
    # What the next layer adds to is what is normed.
    x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / width + eps)
    result = (x * scale * weight).to(residual_ptr.dtype.element_ty)
    for distance in tl.static_range(1, world_size + 1):
        # From the next rank round to this one, so that not all write to one at once.
        tl.store(normed[(rank + distance) % world_size] + cells, result, mask)
    # The next call's residual: nobody else needs it.
    tl.store(sum_ptr + cells, rounded, mask)

    release(on_gpu)
    tl.store(peer_flags + world_size, count, cache_modifier=".wt")
    await_flags(own_flags + world_size, count, failed_ptr, host_failed_ptr, max_polls, on_gpu)
    tl.store(num_calls_ptr + program, count)


def two_shot_add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    buffers: TwoShotBuffers,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of the ranks' x and the residual added up, in `buffers`, and that sum rounded to x's dtype.

    x, residual: [num_rows, width] contiguous, of which `buffers` takes x; residual may be None, for zeros; weight:
    [width]. x is copied unless it is `buffers.input_like(x)`. All ranks call it in the same order with the same shapes,
    residual and weight, and get the same bits. The next call with these buffers overwrites the norm.
    Each rank has the sums of its own rows alone (row i is rank i % world_size's), which is all that the next call with
    as many rows reads of its residual. Raises ValueError for tensors that the kernel does not take.
    """
    _check(x, residual, weight, buffers)
    mine = buffers.input_like(x)
    if mine.data_ptr() != x.data_ptr():
        mine.copy_(x)
    world_size, width = len(buffers.inputs), x.shape[1]
    total = torch.empty_like(x)
    block = triton.next_power_of_2(width)
    _two_shot_add_rms_norm_kernel[(triton.cdiv(len(x), world_size),)](
        x if residual is None else residual,
        weight,
        *(tuple(_view(rank, x) for rank in ranks) for ranks in (buffers.inputs, buffers.normed)),
        total,
        buffers.flags,
        buffers.flag_addresses,
        buffers.num_calls,
        buffers.wait.failed,
        buffers.wait.host_failed,
        buffers.wait.max_polls,
        len(x),
        eps,
        rank=buffers.rank,
        world_size=world_size,
        width=width,
        block=block,
        has_residual=residual is not None,
        on_gpu=x.is_cuda,
        num_warps=min(max(block * x.itemsize // (32 * _VECTOR_BYTES), 1), 32),
        maxnreg=_NUM_REGISTERS,
    )
    return _view(buffers.normed[buffers.rank], x), total


def _check(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, buffers: TwoShotBuffers) -> None:
    if not buffers.takes(x):
        raise ValueError(f"two_shot_add_rms_norm: rows [{list(x.shape)}, {x.dtype}, strides {x.stride()}] do not fit")
    check_residual("two_shot_add_rms_norm", x, residual)
    if weight.shape != x.shape[1:] or weight.dtype != x.dtype or not weight.is_contiguous():
        raise ValueError(f"two_shot_add_rms_norm: the weight {list(weight.shape)}, {weight.dtype} does not fit x")
