"""Blocks of a group that lie in host memory: content that left the device, and may come back."""

from collections import Counter, OrderedDict


class HostTier:
    """Owner of a group's host blocks. Host ids are 0 .. num_blocks - 1, the same on each rank.

    A cache: what was not used for longest gives way. A block that a transfer reads or writes is pinned meanwhile.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._hosts: OrderedDict[bytes, int] = OrderedDict()  # by name, the least recently used first
        self._pins: Counter[bytes] = Counter()

    @property
    def num_used(self) -> int:
        return len(self._hosts)

    def find(self, name: bytes) -> int | None:
        """The host block that holds, or is about to hold, the content of that name."""
        return self._hosts.get(name)

    def place(self, name: bytes) -> int | None:
        """A host block for content that is not here yet; None if all are pinned. It counts as there from now on."""
        assert name not in self._hosts
        if not self._free and not self._evict():
            return None
        self._hosts[name] = self._free.pop()
        return self._hosts[name]

    def touch(self, name: bytes) -> None:
        """It was of use, on the host or on the device."""
        if name in self._hosts:
            self._hosts.move_to_end(name)

    def forget(self, name: bytes) -> None:
        """Its content is of no use; what a transfer is at stays."""
        if name in self._hosts and name not in self._pins:
            self._free.append(self._hosts.pop(name))

    def pin(self, name: bytes) -> None:
        self._pins[name] += 1

    def unpin(self, name: bytes) -> None:
        self._pins[name] -= 1
        if not self._pins[name]:
            del self._pins[name]

    def _evict(self) -> bool:
        name = next((name for name in self._hosts if name not in self._pins), None)
        if name is None:
            return False
        self._free.append(self._hosts.pop(name))
        return True

    def check_invariants(self) -> None:
        assert sorted([*self._free, *self._hosts.values()]) == list(range(self.num_blocks)), "a host block leaked"
        assert set(self._pins) <= set(self._hosts), "a pinned host block was given away"
