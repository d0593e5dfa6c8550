"""This rank's paged KV cache, and how many blocks of it fit the device."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import FailedPreconditionError, ResourceExhaustedError
from .block_rows import BlockRows
from .device_memory import DeviceMemory, mib
from .plan import BlockMoves

FP8 = torch.float8_e4m3fn
_MIB = 1024 * 1024
_MAX_CPU_BYTES = 4096 * _MIB


class KVCache:
    """Keys and values of all layers: for each, [num_layers, num_blocks, block_size, num_kv_heads, head_dim].

    In FP8 (kernels/fp8_cache.py) the scales of as many layers as fit lie in further rows of a block, as if there were
    more layers: whatever moves `rows` moves them along.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`num_kv_heads` counts this rank's heads. The memory is zeroed: attention reads, and masks, what lies in the
        unwritten rest of a block, and a NaN there would not be masked."""
        self.num_layers, self.num_blocks, self.block_size = num_layers, num_blocks, block_size
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.dtype, self.device = dtype, device
        num_groups = 2 * num_layers + _num_scale_groups(num_layers, head_dim, dtype)
        cells = _zeros((num_groups, num_blocks, block_size, num_kv_heads, head_dim), dtype, device)
        self.keys, self.values, scales = cells.tensor_split((num_layers, 2 * num_layers))
        self.rows = BlockRows(cells.view(num_groups, num_blocks, -1))
        self.num_bytes = cells.nbytes
        # Of each layer keys and values, each [num_blocks, block_size, num_kv_heads, head_dim], and in FP8 their scales,
        # [num_blocks, num_kv_heads, block_size] int32.
        self.layers: list[tuple[torch.Tensor, ...]] = list(zip(self.keys.unbind(), self.values.unbind(), strict=True))
        if len(scales):
            self.layers = [(*layer, self._scales(scales, i)) for i, layer in enumerate(self.layers)]

    @property
    def bytes_per_key(self) -> int:
        """Of a token's key and value in one layer, their scales included."""
        return self.num_bytes // (self.num_layers * self.num_blocks * self.block_size)

    def _scales(self, groups: torch.Tensor, layer: int) -> torch.Tensor:
        """Those of one layer, out of [num_groups, num_blocks, block_size, num_kv_heads, head_dim]."""
        group, place = divmod(layer, _scales_per_group(self.head_dim))
        num_words = self.num_kv_heads * self.block_size
        words = groups[group].flatten(1).view(torch.int32)[:, place * num_words :][:, :num_words]
        return words.view(len(words), self.num_kv_heads, self.block_size)

    def copy(self, copies: BlockMoves) -> None:
        """Queues copies of blocks in all layers. Raises FailedPreconditionError for ids that are not there, and for a
        block that is both copied from and to."""
        copies.check(self.num_blocks, self.num_blocks)
        if not set(copies.targets.tolist()).isdisjoint(copies.sources.tolist()):
            raise FailedPreconditionError("a block is copied from and to in one plan")
        self.rows.copy(copies)

    @staticmethod
    def bytes_per_block(
        *, num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        """Memory of one block of this rank: keys and values of all layers, and their scales."""
        num_groups = 2 * num_layers + _num_scale_groups(num_layers, head_dim, dtype)
        return num_groups * block_size * num_kv_heads * head_dim * dtype.itemsize


def _scales_per_group(head_dim: int) -> int:
    """Layers whose scales, of four bytes a head, lie in the place of a layer's keys in FP8."""
    return head_dim // torch.int32.itemsize


def _num_scale_groups(num_layers: int, head_dim: int, dtype: torch.dtype) -> int:
    return -(-num_layers // _scales_per_group(head_dim)) if dtype == FP8 else 0


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On a CPU, pages that the system zeroes when they are first touched; torch.zeros would write them all at once."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(pages).view(dtype).view(shape)


@dataclass(frozen=True, slots=True)
class BlockBudget:
    """How much of a device the KV cache may take."""

    bytes_per_block: int
    block_size: int
    max_num_seqs: int
    max_model_len: int
    gpu_memory_utilization: float  # share of the device's memory that Octavo may use in all, weights included
    num_blocks_override: int = 0  # 0: as many as fit
    activation_bytes: int = 0  # kept free for the steps themselves
    num_ranks_on_device: int = 1  # a host's memory is shared by its CPU ranks


def num_blocks_that_fit(device: torch.device, budget: BlockBudget, memory: DeviceMemory | None = None) -> int:
    """Blocks that this rank can hold, at least 1, or the override if that fits.

    On a CPU at most 4 GiB for all ranks, and no more than max_num_seqs sequences of max_model_len can use: the host has
    other uses for its memory. The override is the way to more.
    Raises ResourceExhaustedError naming what is needed, what there is, and the remedy.
    """
    memory = memory or DeviceMemory.of(device)
    used_bytes = memory.total_bytes - memory.free_bytes
    usable_bytes = int(memory.total_bytes * budget.gpu_memory_utilization) - used_bytes - budget.activation_bytes
    num_blocks = max(usable_bytes, 0) // budget.num_ranks_on_device // budget.bytes_per_block
    if budget.num_blocks_override:
        return _check_override(device, budget, memory)
    if num_blocks < 1:
        raise ResourceExhaustedError(
            f"too little memory on {device} for one KV block: it takes {mib(budget.bytes_per_block)}, and "
            f"{mib(max(usable_bytes, 0))} are left of {mib(memory.total_bytes)} at gpu_memory_utilization "
            f"{budget.gpu_memory_utilization}; raise --gpu-memory-utilization, lower --block-size, or use more ranks"
        )
    if device.type == "cpu":
        enough = budget.max_num_seqs * -(-budget.max_model_len // budget.block_size)
        modest = max(1, _MAX_CPU_BYTES // budget.num_ranks_on_device // budget.bytes_per_block)
        num_blocks = min(num_blocks, enough, modest)
    return num_blocks


def _check_override(device: torch.device, budget: BlockBudget, memory: DeviceMemory) -> int:
    needed_bytes = budget.num_blocks_override * budget.bytes_per_block
    if needed_bytes * budget.num_ranks_on_device > memory.free_bytes:
        raise ResourceExhaustedError(
            f"{budget.num_blocks_override} KV blocks take {mib(needed_bytes)}, and {device} has "
            f"{mib(memory.free_bytes)} free for {budget.num_ranks_on_device} rank(s); "
            "lower --num-gpu-blocks-override, or leave it out to use what fits"
        )
    return budget.num_blocks_override
