"""The tensor-parallel group of one worker: its rank and its collectives."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ..errors import UnavailableError

if TYPE_CHECKING:
    from .symmetric_memory import SymmetricMemory


# Measured on 4 H200s, a layer of 8,192 tokens: 2.26 ms with its sums between the products and 2.01 in halves (8B), 6.97
# and 6.48 (70B); of 2,048 tokens nothing is gained. Not below what symmetric memory sums: a residual that it leaves to
# the owners of rows cannot be cut in two.
_HALVES_BYTES = 32 * 1024 * 1024


@dataclass(slots=True, eq=False)
class TensorParallel:
    """Rank and size of a group, and the collectives over it. With one rank every collective is the identity.

    A model and all its layers share one of these, so what `leave` and `rejoin` change holds for all of them.
    """

    rank: int
    size: int
    device: torch.device
    process_group: "dist.ProcessGroup | None" = None
    symmetric_memory: "SymmetricMemory | None" = None  # of GPUs that reach each other's memory
    meets_others: bool = True  # otherwise collectives give back what is here

    @property
    def is_alone(self) -> bool:
        """Whether every collective is the identity."""
        return self.size == 1 or not self.meets_others

    def for_compiling(self) -> "TensorParallel":
        """The same place among the ranks, for steps of which only launches matter, and those only compile: a rank that
        has its kernels makes no such steps, and must not be waited for."""
        return replace(self, meets_others=False)

    def abandon(self) -> None:
        """The epoch is over: frees the device of kernels that wait for other ranks. For any thread but the device's,
        which may be waiting for those kernels. NCCL's take until the graphs that they are part of are gone; gloo's
        waits nobody can end: they end with the peer.
        """
        if self.symmetric_memory is not None:
            self.symmetric_memory.abandon()
        if self.process_group is not None and self.device.type == "cuda":
            self.process_group.abort()

    def leave(self) -> None:
        """Drops what the group is made of: it is over."""
        self.process_group = self.symmetric_memory = None

    def rejoin(self, joined: "TensorParallel") -> None:
        """Goes on in a group of another epoch, at the same rank of as many."""
        assert (self.rank, self.size, self.device) == (joined.rank, joined.size, joined.device)
        self.process_group, self.symmetric_memory = joined.process_group, joined.symmetric_memory

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of `tensor` over the ranks. Its own memory may be what holds the sum."""
        if self.symmetric_memory is not None and self.symmetric_memory.takes(tensor):
            return self.symmetric_memory.all_reduce(tensor)
        if not self.is_alone:
            dist.all_reduce(tensor, group=self.process_group)
        return tensor

    def sums_in_halves(self, tensor: torch.Tensor) -> bool:
        """Whether work on a tensor like this is faster in two halves, each summed beside the other's products."""
        return self.size > 1 and tensor.nbytes > _HALVES_BYTES

    def least_num_rows_in_halves(self, row_bytes: int) -> int | None:
        """Rows of the smallest tensor that `sums_in_halves`; None if there is none."""
        return _HALVES_BYTES // row_bytes + 1 if self.size > 1 else None

    def start_all_reduce(self, tensor: torch.Tensor, larger: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
        """Begins to sum `tensor` over the ranks beside what is queued next; its memory may come to hold the sum.
        Calling what is returned gives tensors that add up to the sum, to what is queued after that.

        The sums of two halves take turns, each of what that half's last sum gave. `larger`: a tensor like the larger
        half, so that both go the same way.
        """
        memory = self.symmetric_memory
        if memory is not None and memory.exchanges(larger):
            return memory.start_exchange(tensor, only_compiles=not self.meets_others)
        if self.is_alone:
            return lambda: (tensor,)
        work = dist.all_reduce(tensor, group=self.process_group, async_op=True)

        def finish() -> tuple[torch.Tensor, ...]:
            work.wait()
            return (tensor,)

        return finish

    def all_reduce_max(self, tensor: torch.Tensor) -> torch.Tensor:
        """Elementwise maximum over the ranks, in place."""
        if not self.is_alone:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.process_group)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[n, *shape] on each rank to [size, n, *shape], in rank order."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        # Gloo wants the ranks' tensors one behind the other, not stacked.
        gathered = tensor.new_empty((self.size * len(tensor), *tensor.shape[1:]))
        if not self.is_alone:
            dist.all_gather_into_tensor(gathered, tensor.contiguous(), group=self.process_group)
        return gathered.view(self.size, *tensor.shape)

    def check(self) -> None:
        """Raises UnavailableError if a rank has waited for another beyond reason: sums mean nothing from then on. Waits
        for nothing: what a finished step summed is well if this passes behind it."""
        if self.symmetric_memory is not None and self.symmetric_memory.has_failed():
            raise UnavailableError("a rank of the group does not answer the others")

    def min_int(self, value: int) -> int:
        """The least of the ranks' values. Waits for the device."""
        if self.is_alone:
            return value
        tensor = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=self.process_group)
        return int(tensor.item())
