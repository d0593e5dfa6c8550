"""Named blocks of one group on their way into another group's prefix cache, beside the steps of both. Pure.

A copy is an owner of all its blocks, so no later plan writes to them. Plans in flight are waited for: on one side they
compute what is to be read, on the other they may still write to blocks that were freed behind them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .copy_costs import CopyCosts
from .worker_group import WorkerGroup


@dataclass(frozen=True, slots=True, eq=False)
class BlockCopy:
    """What goes where, in the order of the prefix; and the steps that must have ended before it begins."""

    source: WorkerGroup
    target: WorkerGroup
    names: list[bytes]
    source_blocks: list[int]  # beside names
    target_blocks: list[int]  # likewise
    kept_blocks: list[int]  # blocks of the same prefix that the target has: they stay
    source_step: int
    target_step: int


class BlockCopies:
    """Decides on copies, begins and ends them. A group that is lost takes its part of a copy with it."""

    def __init__(self, groups: Mapping[int, WorkerGroup]) -> None:
        """`groups`: those that serve, as the scheduler has them."""
        self._groups = groups
        self.costs = CopyCosts()

    def begin(
        self, names: Sequence[bytes], source: WorkerGroup, target: WorkerGroup, in_abundance: bool = False
    ) -> BlockCopy | None:
        """Of the blocks of a prefix those that `source` has and `target` lacks, as far as there is room for them beside
        what runs there; None if there are none, or computing them again is cheaper. `in_abundance`: all or none, and
        only where as many stay free for what runs there."""
        kept, missing = self._compare(names, source, target)
        num_free_kept = target.blocks.pool.count_free(kept)
        room = target.blocks.num_free_blocks - target.num_spare_blocks - num_free_kept
        if in_abundance and 2 * len(missing) > room:
            return None
        missing = missing[: max(0, room)]
        if not missing or not self.costs.pays(source, target, len(missing)):
            return None
        source_blocks = [block_id for _, block_id in missing]
        source.blocks.hold(source_blocks)
        target.blocks.hold(kept)  # first: what is taken next is not to be of them
        return BlockCopy(
            source,
            target,
            [name for name, _ in missing],
            source_blocks,
            target.blocks.take_unnamed(len(missing)),
            kept,
            source.num_sent_steps,
            target.num_sent_steps,
        )

    @staticmethod
    def _compare(
        names: Sequence[bytes], source: WorkerGroup, target: WorkerGroup
    ) -> tuple[list[int], list[tuple[bytes, int]]]:
        """Of the run of blocks that one of the two has: the target's blocks, and names and source's blocks of the
        rest."""
        kept, missing = [], []
        for name in names:
            if (block_id := target.blocks.cache.find(name)) is not None:
                kept.append(block_id)
            elif (block_id := source.blocks.find_computed(name)) is not None:
                missing.append((name, block_id))
            else:
                break
        return kept, missing

    def is_over(self, copy: BlockCopy) -> bool:
        """Whether one of its groups is lost."""
        return not (self._is_here(copy.source) and self._is_here(copy.target))

    @staticmethod
    def is_ready(copy: BlockCopy) -> bool:
        """Whether the blocks may be copied: no plan in flight touches them."""
        is_computed = copy.source.num_finished_steps >= copy.source_step
        return is_computed and copy.target.num_finished_steps >= copy.target_step

    def finish(self, copy: BlockCopy, duration_ms: float) -> int:
        """All ranks have copied, in `duration_ms`; returns how many blocks can be found in the target now."""
        self.costs.observe(copy.source, copy.target, len(copy.names), duration_ms)
        num_received = 0
        if self._is_here(copy.target):
            for name, source_block, target_block in zip(
                copy.names, copy.source_blocks, copy.target_blocks, strict=True
            ):
                if self._is_valid(copy, name, source_block):
                    copy.target.blocks.receive(name, target_block)
                    num_received += 1
        self.drop(copy)
        return num_received

    def _is_valid(self, copy: BlockCopy, name: bytes, source_block: int) -> bool:
        """What the source has meanwhile forgotten, since nothing could be sampled behind it, is not to spread."""
        return not self._is_here(copy.source) or copy.source.blocks.cache.find(name) == source_block

    @staticmethod
    def drop(copy: BlockCopy) -> None:
        """It is over, whatever came of it: no rank reads or writes the blocks any more."""
        copy.source.blocks.let_go(copy.source_blocks)
        copy.target.blocks.let_go([*copy.kept_blocks, *copy.target_blocks])

    @staticmethod
    def abandon(copy: BlockCopy) -> None:
        """A rank of the target gave no answer, and may still write. Nobody else gets those blocks, as long as the group
        is there."""
        copy.source.blocks.let_go(copy.source_blocks)
        copy.target.blocks.let_go(copy.kept_blocks)

    def _is_here(self, group: WorkerGroup) -> bool:
        return self._groups.get(group.group_id) is group
