"""The blocks of one worker group: how many owners each has, and in which order the free ones are taken again."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import islice


class BlockPool:
    """Owner of every `ref_count` of a group. Block ids are 0 .. num_blocks - 1, the same on each rank.

    A free block keeps its content until it is allocated: whoever knows what is in it may `retain` it before.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self.num_shared = 0  # blocks with more than one owner
        self._ref_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # the next to be taken first

    @property
    def num_free(self) -> int:
        return len(self._free)

    def count_free(self, block_ids: Iterable[int]) -> int:
        """How many of the blocks have no owner."""
        ref_counts = self._ref_counts
        return [ref_counts[block_id] for block_id in block_ids].count(0)

    def next_free(self, num_blocks: int) -> Iterator[int]:
        """The free blocks that will be taken next, at most so many."""
        return islice(self._free, num_blocks)

    def allocate(self, num_blocks: int) -> list[int]:
        """Takes `num_blocks` free blocks, each with one owner. The caller has checked `num_free`."""
        assert 0 <= num_blocks <= len(self._free), f"{num_blocks} blocks wanted, {len(self._free)} free"
        block_ids = [self._free.popitem(last=False)[0] for _ in range(num_blocks)]
        for block_id in block_ids:
            self._ref_counts[block_id] = 1
        return block_ids

    def retain(self, block_ids: Iterable[int]) -> None:
        """Adds an owner to each block, free or not."""
        ref_counts, free = self._ref_counts, self._free
        for block_id in block_ids:
            ref_counts[block_id] = ref_count = ref_counts[block_id] + 1
            if ref_count == 1:
                del free[block_id]
            elif ref_count == 2:
                self.num_shared += 1

    def release(self, block_ids: Iterable[int], reuse_first: Iterable[bool]) -> list[int]:
        """Takes one owner from each block, one after the other. With none left it is free, to be taken before all
        others or after them. Returns those that are."""
        ref_counts, free, freed = self._ref_counts, self._free, []
        for block_id, is_first in zip(block_ids, reuse_first, strict=True):
            ref_counts[block_id] = ref_count = ref_counts[block_id] - 1
            assert ref_count >= 0, f"block {block_id} released twice"
            if ref_count == 1:
                self.num_shared -= 1
            elif not ref_count:
                free[block_id] = None
                freed.append(block_id)
                if is_first:
                    free.move_to_end(block_id, last=False)
        return freed

    def ref_count(self, block_id: int) -> int:
        return self._ref_counts[block_id]

    def check_invariants(self) -> None:
        assert self.num_shared == sum(ref_count > 1 for ref_count in self._ref_counts)
        for block_id, ref_count in enumerate(self._ref_counts):
            is_free = block_id in self._free
            assert (ref_count == 0) == is_free, f"block {block_id}: ref_count {ref_count}, free: {is_free}"
