"""Sequences kept in serving order: by (priority, arrival)."""

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from .chunk_budget import counted_tokens
from .sequence import Sequence

_ORDER = attrgetter("order")


class OrderedSequences:
    """A sorted list. A preempted sequence keeps its arrival, so it comes back before younger ones."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def __contains__(self, sequence: Sequence) -> bool:
        index = bisect_left(self._sequences, sequence.order, key=_ORDER)
        return index < len(self._sequences) and self._sequences[index] is sequence

    def add(self, sequence: Sequence) -> None:
        insort(self._sequences, sequence, key=_ORDER)

    def remove(self, sequence: Sequence) -> None:
        index = bisect_left(self._sequences, sequence.order, key=_ORDER)
        assert self._sequences[index] is sequence, f"{sequence.request.key} is not here: {sequence.history}"
        del self._sequences[index]

    def first(self) -> Sequence:
        """Next to be served. There must be one."""
        return self._sequences[0]

    def last(self) -> Sequence:
        """First to be preempted. There must be one."""
        return self._sequences[-1]


class WaitingQueue(OrderedSequences):
    """Sequences that wait, and what they know that counts as backlog: while one waits, it learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.num_counted_tokens = 0

    def add(self, sequence: Sequence) -> None:
        super().add(sequence)
        self.num_counted_tokens += counted_tokens(sequence.num_tokens)

    def remove(self, sequence: Sequence) -> None:
        super().remove(sequence)
        self.num_counted_tokens -= counted_tokens(sequence.num_tokens)
