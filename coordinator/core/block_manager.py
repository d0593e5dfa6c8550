"""Block tables: which blocks of a group hold the KV of which sequence."""

from .block_pool import BlockPool
from .sequence import Sequence


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


class BlockManager:
    """Owner of the block tables of one worker group."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self._tables: dict[Sequence, list[int]] = {}

    @property
    def num_blocks(self) -> int:
        return self.pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        return self.pool.num_free

    def num_missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks that `sequence` lacks to hold `num_tokens` tokens."""
        held = len(self._tables.get(sequence, ()))
        return max(0, num_blocks_for(num_tokens, self.block_size) - held)

    def allocate(self, sequence: Sequence, num_tokens: int) -> list[int]:
        """Grows the table of `sequence` to hold `num_tokens`; returns the added ids. The caller checked the room."""
        added = self.pool.allocate(self.num_missing_blocks(sequence, num_tokens))
        self._tables.setdefault(sequence, []).extend(added)
        return added

    def free(self, sequence: Sequence) -> None:
        """Gives back all blocks of `sequence`, the last first: a later prefix wants the first ones longest."""
        self.pool.release(self._tables.pop(sequence)[::-1])

    def check_invariants(self) -> None:
        self.pool.check_invariants()
        held = [block_id for table in self._tables.values() for block_id in table]
        assert len(held) == len(set(held)), "a block is in two tables"
        assert len(held) + self.pool.num_free == self.pool.num_blocks, "a block leaked"
