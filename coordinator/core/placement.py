"""Which group takes a waiting request: one that has room for it, where cached blocks and load together cost least."""

from collections.abc import Collection
from dataclasses import dataclass

from .block_manager import num_blocks_for
from .sequence import Sequence
from .sequence_group import SequenceGroup
from .worker_group import WorkerGroup

# What one more running sequence costs a group, in prompt tokens: each of some hundred steps takes as much longer as two
# prompt tokens do. So that many tokens found in its cache make up for a group's having one sequence more.
_TOKENS_PER_SEQUENCE = 256


@dataclass(frozen=True, slots=True)
class Queue:
    """What waits, and how much of it a step may take."""

    num_waiting: int
    max_num_batched_tokens: int


def belongs(sequence: Sequence, group: WorkerGroup, groups: Collection[WorkerGroup], queue: Queue) -> bool:
    """Whether `group` is to take `sequence`: of the groups with room for it, one with less than its share of all.

    A share, so that a group fills itself in one step while others are busy, and leaves as much to them. What a group's
    cache has of the sequence counts against its load. One of the groups with room always qualifies.
    """
    takers = [each for each in groups if takes(each, sequence, groups)]
    if group not in takers or not has_room(group, sequence):
        return False
    candidates = [each for each in takers if each is group or has_room(each, sequence)]
    if len(candidates) == 1:
        return True
    loads = {each.group_id: _load(each, sequence, queue.max_num_batched_tokens) for each in candidates}
    return loads[group.group_id] * len(candidates) < queue.num_waiting + sum(loads.values())


def _load(group: WorkerGroup, sequence: Sequence, max_num_batched_tokens: int) -> float:
    """In sequences; less by what need not be computed there, more by what must be before it: prompts beyond a step."""
    num_hit_tokens = len(group.find_prefix(sequence)) * group.blocks.block_size
    num_pending_tokens = sum(running.num_pending_tokens for running in group.running)
    backlog = max(0, num_pending_tokens - max_num_batched_tokens)
    return len(group.running) + (backlog - num_hit_tokens) / _TOKENS_PER_SEQUENCE


def takes(group: WorkerGroup, sequence: Sequence, groups: Collection[WorkerGroup]) -> bool:
    """Whether `sequence` may go to `group` at all: to one that is to leave only if no other could ever hold it."""
    return not group.is_draining or not any(
        could_hold(other, sequence.samples) for other in groups if not other.is_draining
    )


def has_room(group: WorkerGroup, sequence: Sequence) -> bool:
    """For all its known tokens, beside what those that run there will need; for beams, for all of them together."""
    beams = sequence.samples.beams
    if group.num_free_slots < (1 if beams is None else beams.num_beams):
        return False
    if not could_hold(group, sequence.samples):
        return False
    together = [sequence] if beams is None else sequence.samples.sequences
    num_free = group.blocks.num_free_blocks - group.num_spare_blocks
    if sum(num_blocks_for(each.num_tokens, group.blocks.block_size) for each in together) <= num_free:
        return True  # whatever is found of them
    # Of beams each is counted as if it were alone: how much they will share hangs on what is cached when they come.
    needed = sum(group.blocks.num_needed_blocks(group.find_prefix(each), each.num_tokens) for each in together)
    return needed <= num_free


def could_hold(group: WorkerGroup, samples: SequenceGroup) -> bool:
    """A sample, or all beams together, to the end, were the group empty: groups differ in size, and one that joined
    late may be too small for what was accepted before."""
    num_together = 1 if samples.beams is None else samples.beams.num_beams
    needed = num_together * num_blocks_for(samples.max_num_tokens - 1, group.blocks.block_size)
    return needed <= group.blocks.num_blocks
