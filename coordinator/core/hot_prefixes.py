"""Prefixes that request after request begins with, and the groups that had better have them too.

Placement sends a request where its prefix is, until that group has too much to do; then another group would compute the
prefix once more. So what was found several times is copied, beside the steps of both, to groups that lack it and have
less to do: the next request that comes there finds it. Whether a copy pays, and whether there is room for it, is
decided when it begins (core/block_copies.py).
"""

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .worker_group import WorkerGroup

_LEAST_TOKENS = 256  # less is computed in a fraction of a step
_MAX_COPIES = 2  # to each group at once: what is to move there comes behind them
_MAX_KNOWN = 1024  # prefixes whose finds are counted, those that were found last


@dataclass(frozen=True, slots=True)
class WantedPrefix:
    """Blocks of one group, by name from the start of a prompt, that another is to have as well."""

    names: tuple[bytes, ...]
    source_id: int
    target_id: int


class HotPrefixes:
    """Owner of what is known of prefixes that were found, and of the copies of them that were asked for."""

    def __init__(self, copies_blocks: bool) -> None:
        """Without `copies_blocks` none is wanted."""
        self._copies_blocks = copies_blocks
        self._num_found: OrderedDict[bytes, int] = OrderedDict()  # by the name of the last block that was found
        self._wanted: list[WantedPrefix] = []  # that nobody has heard of yet
        self._copying: set[WantedPrefix] = set()  # those included

    def note(self, names: Sequence[bytes], group: WorkerGroup, groups: Collection[WorkerGroup]) -> None:
        """A new request begins in `group`, which had the blocks of these names."""
        if not self._copies_blocks or len(names) * group.blocks.block_size < _LEAST_TOKENS or len(groups) < 2:
            return
        if not self._is_due(names[-1]):
            return
        for other in groups:
            if other.is_draining or len(other.running) >= len(group.running):
                continue
            wanted = WantedPrefix(tuple(names), group.group_id, other.group_id)
            if sum(copy.target_id == other.group_id for copy in self._copying) >= _MAX_COPIES:
                continue
            if other.blocks.cache.find(names[-1]) is None and wanted not in self._copying:
                self._copying.add(wanted)
                self._wanted.append(wanted)

    def start_anew(self) -> None:
        """There is a group that has nothing yet: every prefix is soon due again."""
        self._num_found.clear()

    def _is_due(self, name: bytes) -> bool:
        """Counts a find. Due are the second, the fourth, the eighth ...: what others cannot take is not asked of them
        with each request."""
        count = self._num_found.pop(name, 0) + 1
        self._num_found[name] = count
        if len(self._num_found) > _MAX_KNOWN:
            self._num_found.popitem(last=False)
        return count > 1 and count & (count - 1) == 0

    @property
    def has_wanted(self) -> bool:
        return bool(self._wanted)

    def take_wanted(self) -> list[WantedPrefix]:
        """Copies to be made. Of each `end` is to be told, whatever becomes of it."""
        wanted, self._wanted = self._wanted, []
        return wanted

    def end(self, copy: WantedPrefix) -> None:
        """It is over, whatever became of it."""
        self._copying.remove(copy)

    def touches(self, group_id: int) -> bool:
        """Whether blocks are on their way from that group, or to it."""
        return any(group_id in (copy.source_id, copy.target_id) for copy in self._copying)

    def check_invariants(self) -> None:
        """For tests: raises AssertionError if any state contradicts another."""
        assert self._copying.issuperset(self._wanted)
        assert len(self._num_found) <= _MAX_KNOWN
