"""How much memory a device has, and whether the weights fit before anything is allocated."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import psutil
import torch

from ..errors import ResourceExhaustedError

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What the sizing needs to know of a device, in bytes."""

    total_bytes: int
    free_bytes: int

    @classmethod
    def of(cls, device: torch.device) -> "DeviceMemory":
        """The present state of `device`; of the host for the CPU."""
        if device.type == "cuda":
            free_bytes, total_bytes = torch.cuda.mem_get_info(device)
            cached_bytes = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            return cls(total_bytes, free_bytes + cached_bytes)
        memory = psutil.virtual_memory()
        return cls(memory.total, memory.available)


def check_weights_fit(
    shapes: Iterable[tuple[int, ...]],
    dtype: torch.dtype,
    num_ranks: int,
    device: torch.device,
    memory: DeviceMemory | None = None,
) -> None:
    """Raises ResourceExhaustedError if a rank's even share of tensors of `shapes` is over what `device` has free."""
    memory = memory or DeviceMemory.of(device)
    num_bytes = sum(map(math.prod, shapes)) * dtype.itemsize // num_ranks
    if num_bytes > memory.free_bytes:
        raise ResourceExhaustedError(
            f"the weights take {mib(num_bytes)} on each of {num_ranks} rank(s), and {device} has "
            f"{mib(memory.free_bytes)} free of {mib(memory.total_bytes)}; use more ranks (--tensor-parallel-size), "
            "or end what else uses it"
        )


def mib(num_bytes: int) -> str:
    """For people: in MiB."""
    return f"{num_bytes / _MIB:,.1f} MiB"
