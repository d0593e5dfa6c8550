"""Which running sequences leave a group that is to go, and when: each as soon as another group would take it at once.

The group that has room calls them, in the step in which it admits them, one after another: until its turn comes, and
where no room is, a sequence runs on where it is. So it does while its blocks are copied to where it is to go: the group
asks for that as soon as it would call the sequence, somebody else has it done, and tells when it is over.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from .placement import Queue, belongs, takes
from .sequence import Sequence
from .worker_group import WorkerGroup

# To each group at once: its ranks receive one after another, and the next is to be ready when one has come.
_MAX_COPIES = 2


@dataclass(frozen=True, slots=True)
class WantedCopy:
    """Of the blocks of a sequence, from the group in which it runs to the one in which it is to go on."""

    sequence: Sequence
    source_id: int
    target_id: int


class Moves:
    """Owner of what is known of the sequences that are to move: whose blocks are copied, and whose were."""

    def __init__(self, copies_blocks: bool) -> None:
        """Without `copies_blocks` what moves is computed again."""
        self._copies_blocks = copies_blocks
        self._wanted: list[WantedCopy] = []  # that nobody has heard of yet
        self._copying: dict[Sequence, WantedCopy] = {}  # those included
        self._copied: dict[Sequence, int] = {}  # to which group, or as good as that: it failed, or did not pay

    def ask(
        self, group: WorkerGroup, groups: Collection[WorkerGroup], first_waiting: Sequence | None, queue: Queue
    ) -> None:
        """Wants the blocks of those that `group` would call now, the first in order first."""
        if not self._copies_blocks or group.is_draining:
            return
        room = _MAX_COPIES - sum(copy.target_id == group.group_id for copy in self._copying.values())
        for sequence in _movers(groups) if room > 0 else ():
            if sequence in self._copying or self._is_ready(sequence, group):
                continue
            if _is_called(sequence, group, groups, first_waiting, queue):
                copy = self._copying[sequence] = WantedCopy(sequence, sequence.group_id, group.group_id)
                self._wanted.append(copy)
                room -= 1
                if not room:
                    return

    @property
    def has_wanted(self) -> bool:
        return bool(self._wanted)

    def take_wanted(self) -> list[WantedCopy]:
        """Copies to be made. Of each `end` is to be told, whatever becomes of it."""
        wanted, self._wanted = self._wanted, []
        return wanted

    def end(self, copy: WantedCopy) -> None:
        """It is over: its sequence may move, if it is still where it was."""
        del self._copying[copy.sequence]
        self._copied[copy.sequence] = copy.target_id

    def forget_others(self, groups: Collection[WorkerGroup]) -> None:
        """Remembers nothing of sequences that no longer run where they are to leave."""
        movers = set(_movers(groups))
        self._copied = {sequence: group_id for sequence, group_id in self._copied.items() if sequence in movers}

    def touches(self, group_id: int) -> bool:
        """Whether blocks are on their way from that group, or to it."""
        return any(group_id in (copy.source_id, copy.target_id) for copy in self._copying.values())

    def next(
        self, group: WorkerGroup, groups: Collection[WorkerGroup], first_waiting: Sequence | None, queue: Queue
    ) -> Sequence | None:
        """The sequence of a draining group that is to go on in `group` now; None if there is none. Of beams the first
        of those that run, in whose place all move.

        Nobody is overtaken: what waits in front of it has the room before.
        """
        if group.is_draining:
            return None
        for sequence in _movers(groups):
            if self._is_ready(sequence, group) and _is_called(sequence, group, groups, first_waiting, queue):
                return sequence
        return None

    def first(self, group: WorkerGroup, groups: Collection[WorkerGroup]) -> Sequence | None:
        """The first that may come to `group` one day, so that its step leaves tokens for it."""
        if group.is_draining:
            return None
        return next((sequence for sequence in _movers(groups) if self._is_ready(sequence, group)), None)

    def _is_ready(self, sequence: Sequence, group: WorkerGroup) -> bool:
        """Whether there is nothing to wait for: its blocks were copied, or are not to be."""
        if sequence in self._copying:
            return False
        has_blocks = sequence.num_sent_tokens >= group.blocks.block_size and sequence.reads_cache
        is_copied = self._copied.get(sequence) == group.group_id
        return is_copied or not (self._copies_blocks and has_blocks and sequence.samples.beams is None)

    def check_invariants(self) -> None:
        """For tests: raises AssertionError if any state contradicts another."""
        assert all(self._copying.get(copy.sequence) is copy for copy in self._wanted)
        targets = [copy.target_id for copy in self._copying.values()]
        assert all(targets.count(group_id) <= _MAX_COPIES for group_id in targets)


def is_drained(group: WorkerGroup, groups: Collection[WorkerGroup], waiting: Iterable[Sequence]) -> bool:
    """Whether nothing of a draining group is left, and nothing waits for it that fits no other."""
    return group.is_idle and not any(takes(group, sequence, groups) for sequence in waiting)


def _is_called(
    sequence: Sequence,
    group: WorkerGroup,
    groups: Collection[WorkerGroup],
    first_waiting: Sequence | None,
    queue: Queue,
) -> bool:
    """Whether it is its turn, and `group` has room for it."""
    if first_waiting is not None and first_waiting.order < sequence.order:
        return False
    num_moving = sum(len(each.running) for each in groups if each.is_draining)
    return belongs(sequence, group, groups, Queue(queue.num_waiting + num_moving, queue.max_num_batched_tokens))


def _movers(groups: Collection[WorkerGroup]) -> Iterator[Sequence]:
    """In order, group by group: samples go their own ways; of beams one stands for all."""
    seen = set()
    for group in groups:
        for sequence in group.running if group.is_draining else ():
            if sequence.samples.beams is None:
                yield sequence
            elif sequence.samples not in seen:
                seen.add(sequence.samples)
                yield sequence
