"""Where the ranks of one epoch meet: a store that all reach, and waits that end when the epoch is over.

A rank may die while the others wait for it here. Torch's own waits would then last for minutes, and hold the device
thread; these are told.
"""

import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from ..errors import UnavailableError

TIMEOUT = timedelta(minutes=10)  # also when one rank loads its weights more slowly than another
_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Meeting:
    """One rank's part in it."""

    store: dist.Store  # of all epochs
    epoch: int
    rank: int
    size: int
    is_over: threading.Event = field(default_factory=threading.Event)  # set by whoever ends the epoch, on any thread

    def own_store(self, purpose: str) -> dist.Store:
        """The epoch's part of the store, for one purpose."""
        return dist.PrefixStore(f"epoch-{self.epoch}/{purpose}", self.store)

    def await_all(self) -> None:
        """Until every rank has come here. Raises UnavailableError if one does not, or the epoch is over."""
        store = self.own_store("meeting")
        store.set(f"rank-{self.rank}", "here")
        await_keys(store, [f"rank-{rank}" for rank in range(self.size)], TIMEOUT, self.is_over)


def await_keys(store: dist.Store, keys: Sequence[str], timeout: timedelta, is_over: threading.Event) -> None:
    """Until `store` has all of them. Raises UnavailableError if they do not come, or the epoch is over."""
    deadline = time.monotonic() + timeout.total_seconds()
    while not store.check(list(keys)):
        if is_over.wait(_POLL_S):
            raise UnavailableError("the epoch is over: a rank of the group was lost while it was built")
        if time.monotonic() > deadline:
            raise UnavailableError(f"a rank of the group did not come within {timeout.total_seconds():.0f} s")


# A key of an exchange: who exchanges, how many exchanges the process has made before, and the rest.
_COUNTED_KEY = re.compile(r"(.*?/)(\d+)(/.*|)")


class ExchangeStore(dist.Store):
    """A store in which torch's exchanges of addresses are counted from the group's first.

    Torch counts them from the process's first, and has the count in the keys (c10d's StoreExchange): a rank that lives
    on and one that was started anew would wait for each other under different keys.
    """

    def __init__(self, meeting: Meeting) -> None:
        super().__init__()
        self._store, self._is_over = meeting.own_store("exchange"), meeting.is_over
        self._first: dict[str, int] = {}  # count of the group's first exchange, by who exchanges

    def _own(self, key: str) -> str:
        match = _COUNTED_KEY.fullmatch(key)
        if match is None:
            return key
        who, count, rest = match.groups()
        first = self._first.setdefault(who, int(count))
        return f"{who}{int(count) - first}{rest}"

    # What c10d calls.

    def set(self, key: str, value: str) -> None:
        """`value`: bytes in truth, which torch's stores take; its types know text alone."""
        self._store.set(self._own(key), value)

    def get(self, key: str) -> bytes:
        return self.multi_get([key])[0]

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        self.wait(keys)
        found: list[bytes] = self._store.multi_get([self._own(key) for key in keys])
        return found

    def add(self, key: str, amount: int) -> int:
        total: int = self._store.add(self._own(key), amount)
        return total

    def check(self, keys: Sequence[str]) -> bool:
        are_there: bool = self._store.check([self._own(key) for key in keys])
        return are_there

    def wait(self, keys: Sequence[str], timeout: timedelta = TIMEOUT) -> None:
        await_keys(self._store, [self._own(key) for key in keys], timeout, self._is_over)
