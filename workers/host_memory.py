"""Memory of the host for blocks that leave the device: whether there is enough, and pages that a GPU can copy."""

import mmap
from contextlib import suppress

import numpy as np
import torch

from ..errors import InvalidArgumentError, ResourceExhaustedError
from .device_memory import DeviceMemory, mib


def check_swap_space(num_bytes: int, num_ranks_on_host: int, memory: DeviceMemory | None = None) -> None:
    """Raises ResourceExhaustedError if `num_bytes` for each rank of this host are more than it has free."""
    if not num_bytes:
        return
    memory = memory or DeviceMemory.of(torch.device("cpu"))
    if num_bytes * num_ranks_on_host > memory.free_bytes:
        raise ResourceExhaustedError(
            f"the swap space takes {mib(num_bytes)} for each of {num_ranks_on_host} rank(s) on this host, and it has "
            f"{mib(memory.free_bytes)} of memory free; lower --swap-space"
        )


def num_host_blocks(swap_space_bytes: int, bytes_per_block: int) -> int:
    """Blocks that the swap space holds; 0 without one. Raises InvalidArgumentError if it is there and holds none."""
    num_blocks = swap_space_bytes // bytes_per_block
    if swap_space_bytes and not num_blocks:
        raise InvalidArgumentError(
            f"a swap space of {mib(swap_space_bytes)} holds no KV block, which takes {mib(bytes_per_block)}; raise "
            "--swap-space, or leave it out",
            "swap_space",
        )
    return num_blocks


def host_memory(num_bytes: int, device: torch.device) -> torch.Tensor:
    """[num_bytes] uint8, zeroed; pinned if it is for a GPU, until `unpin`. Raises ResourceExhaustedError."""
    if device.type != "cuda":
        return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8))
    # Not torch's own pinned memory: that is rounded up to a power of two.
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # huge pages are pinned sooner, where the system has any
        pages.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    error = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), num_bytes, 0))
    if error:
        raise ResourceExhaustedError(
            f"cannot pin {mib(num_bytes)} of host memory for the swap space (CUDA error {error}); lower --swap-space"
        )
    return memory


def unpin(memory: torch.Tensor, device: torch.device) -> None:
    """Of memory that was pinned for `device`, and that nothing is copied from or to any more."""
    with torch.cuda.device(device):
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
