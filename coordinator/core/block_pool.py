"""The blocks of one worker group: which are free, and how many owners each used one has."""

from collections import deque


class BlockPool:
    """Owner of every `ref_count` of a group. Block ids are 0 .. num_blocks - 1, the same on each rank."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._free = deque(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, num_blocks: int) -> list[int]:
        """Takes `num_blocks` free blocks, each with one owner. The caller has checked `num_free`."""
        assert 0 <= num_blocks <= len(self._free), f"{num_blocks} blocks wanted, {len(self._free)} free"
        block_ids = [self._free.popleft() for _ in range(num_blocks)]
        for block_id in block_ids:
            self._ref_counts[block_id] = 1
        return block_ids

    def release(self, block_ids: list[int]) -> None:
        """Takes one owner from each block; those with none left are free, to be reused last."""
        for block_id in block_ids:
            assert self._ref_counts[block_id] > 0, f"block {block_id} released twice"
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._free.append(block_id)

    def check_invariants(self) -> None:
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        for block_id, ref_count in enumerate(self._ref_counts):
            is_free = block_id in free
            assert (ref_count == 0) == is_free, f"block {block_id}: ref_count {ref_count}, free: {is_free}"
