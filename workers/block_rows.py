"""The blocks of a KV cache as rows of words: gathered, scattered and copied by block id, whatever they hold."""

import numpy as np
import torch
from numpy.typing import NDArray

from .plan import BlockMoves
from .transfer import to_device

# What a copy takes beside the cache at a time. Less than the steps' own activations, and enough to keep a GPU busy.
_COPY_BYTES = 16 * 1024 * 1024
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


class BlockRows:
    """Rows [num_groups * num_blocks, words] of a cache in which a block has one row in each group: of a layer's keys,
    for instance. Operations are queued on the current stream."""

    def __init__(self, cells: torch.Tensor) -> None:
        """`cells` [num_groups, num_blocks, elements], whose memory the rows are."""
        self.num_groups, self.num_blocks, _ = cells.shape
        row_bytes = cells[0, 0].nbytes
        word = next(word for word in _WORDS if row_bytes % word.itemsize == 0)
        self._words = cells.view(self.num_groups * self.num_blocks, -1).view(word)
        self.block_bytes = self.num_groups * row_bytes

    def buffer(self, num_blocks: int) -> torch.Tensor:
        """Uninitialised memory [num_blocks, num_groups, words] for blocks outside the cache, on its device."""
        return self._words.new_empty((num_blocks, self.num_groups, self._words.shape[1]))

    def indices(self, block_ids: NDArray[np.int32]) -> torch.Tensor:
        """The blocks' rows on the device, [len(block_ids), num_groups] int64."""
        groups = np.arange(self.num_groups, dtype=np.int64) * self.num_blocks
        return to_device(block_ids.astype(np.int64)[:, None] + groups, self._words.device)

    def gather(self, indices: torch.Tensor, out: torch.Tensor) -> None:
        """Blocks of the cache to `out` [num_blocks, num_groups, words]."""
        torch.index_select(self._words, 0, indices.view(-1), out=out.view(-1, self._words.shape[1]))

    def scatter(self, indices: torch.Tensor, blocks: torch.Tensor) -> None:
        """`blocks` [num_blocks, num_groups, words] to the cache. The indices are distinct."""
        self._words.index_copy_(0, indices.view(-1), blocks.view(-1, self._words.shape[1]))

    def copy(self, moves: BlockMoves) -> None:
        """Copies blocks within the cache; none is both copied from and to."""
        sources, targets = self.indices(np.concatenate([moves.sources, moves.targets])).split(len(moves))
        piece = max(1, _COPY_BYTES // self.block_bytes)
        for start in range(0, len(moves), piece):
            rows = slice(start, start + piece)
            buffer = self.buffer(len(sources[rows]))
            self.gather(sources[rows], buffer)
            self.scatter(targets[rows], buffer)
