"""Which running sequences leave a group that is to go, and when: each as soon as another group would take it at once.

The group that has room calls them, in the step in which it admits them, one after another: until its turn comes, and
where no room is, a sequence runs on where it is.
"""

from collections.abc import Collection, Iterable, Iterator

from .placement import Queue, belongs, takes
from .sequence import Sequence
from .worker_group import WorkerGroup


def next_to_move(
    group: WorkerGroup, groups: Collection[WorkerGroup], first_waiting: Sequence | None, queue: Queue
) -> Sequence | None:
    """The sequence of a draining group that is to go on in `group` now; None if there is none. Of beams the first of
    those that run, in whose place all move.

    Nobody is overtaken: what waits in front of it has the room before.
    """
    if group.is_draining:
        return None
    queue = Queue(
        queue.num_waiting + sum(len(each.running) for each in _draining(groups)), queue.max_num_batched_tokens
    )
    for sequence in _first_of_each_request(groups):
        is_first = first_waiting is None or sequence.order < first_waiting.order
        if is_first and belongs(sequence, group, groups, queue):
            return sequence
    return None


def first_mover(group: WorkerGroup, groups: Collection[WorkerGroup]) -> Sequence | None:
    """The first that may come to `group` one day, so that its step leaves tokens for it."""
    return None if group.is_draining else next(_first_of_each_request(groups), None)


def is_drained(group: WorkerGroup, groups: Collection[WorkerGroup], waiting: Iterable[Sequence]) -> bool:
    """Whether nothing of a draining group is left, and nothing waits for it that fits no other."""
    return group.is_idle and not any(takes(group, sequence, groups) for sequence in waiting)


def _draining(groups: Collection[WorkerGroup]) -> Iterator[WorkerGroup]:
    return (group for group in groups if group.is_draining)


def _first_of_each_request(groups: Collection[WorkerGroup]) -> Iterator[Sequence]:
    """Samples go their own ways; of beams one stands for all."""
    seen = set()
    for group in _draining(groups):
        for sequence in group.running:
            if sequence.samples.beams is None:
                yield sequence
            elif sequence.samples not in seen:
                seen.add(sequence.samples)
                yield sequence
