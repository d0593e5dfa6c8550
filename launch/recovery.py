"""Rebuilds worker groups that fail: replaces the ranks that are lost, and has all join under a new epoch.

The coordinator notices a failure, ends the group's epoch and keeps its requests; see docs/architecture.md. Here each
group is rebuilt on a thread of its own, so that one that does not come back holds up nothing else. A coordinator that
follows one that died is told of all groups in the same way; but not of one that is to leave, which has left then, and
of one that has not served yet by who has it join.
"""

import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from ..errors import UnavailableError
from ..proto import engine_pb2
from .engine_control import CoordinatorLostError, GroupBlocks
from .group_recovery import Control, GroupRecovery, Ranks
from .restart_policy import RestartPolicy
from .succession import Succession


@dataclass(slots=True)
class _Leaving:
    """A group that is to leave, and may stay after all."""

    coordinator: int  # who was told, or would have been
    failure: engine_pb2.GroupFailure | None = None  # after that one had it stay


class Recovery:
    """Owner of the attempts to rebuild groups. One thread at a time calls `take`, `restore` and `check`; nothing blocks
    it. Any other may add and remove groups meanwhile."""

    def __init__(
        self,
        ranks: Ranks,
        control: Control,
        make_request: Callable[[int], engine_pb2.AddGroupRequest],
        say: Callable[[str], None],
        max_restarts: int,
    ) -> None:
        """`make_request(group_id)` is for the ranks as they are now. `say` shows a line; any thread calls it."""
        self._ranks, self._control, self._make_request, self._say = ranks, control, make_request, say
        self._max_restarts = max_restarts
        self._lock = threading.Lock()  # of what follows
        self._groups: dict[int, GroupRecovery] = {}
        self._leaving: dict[int, _Leaving] = {}
        self._succession = Succession()
        self._is_stopping = False
        self._given_up: dict[int, str] = {}  # why, in the order of time
        self._unsaid: list[int] = []  # of those
        self._restores: list[Future[None]] = []
        self._strays: set[int] = set()  # epochs of groups that were removed before they failed

    def add(self, group_id: int) -> None:
        """Has a group that serves rebuilt when it fails."""
        with self._lock:
            self._groups[group_id] = self._new(group_id)

    def _new(self, group_id: int, is_joining: bool = False) -> GroupRecovery:
        policy = RestartPolicy(self._max_restarts)
        group = GroupRecovery(
            group_id, self._ranks, self._control, self._make_request, self._say, policy, self._note_given_up, is_joining
        )
        if self._is_stopping:
            group.stop()
        return group

    def join(self, group_id: int, build: Callable[[], GroupBlocks]) -> GroupBlocks:
        """Has a group that never served begin to, and be rebuilt from then on. `build` asks the coordinator, and is
        called again if that one dies before it has answered and another follows.

        Raises UnavailableError if a coordinator says that it cannot be, or none will follow: then it is not known here.
        """
        with self._lock:
            group = self._groups[group_id] = self._new(group_id, is_joining=True)
        try:
            while (blocks := self._build(group_id, group, build)) is None:
                pass
            return blocks
        except BaseException:
            self.remove(group_id)
            raise

    def _build(self, group_id: int, group: GroupRecovery, build: Callable[[], GroupBlocks]) -> GroupBlocks | None:
        """Nothing, if another coordinator is to be asked."""
        number = self._succession.number
        try:
            blocks = build()
        except CoordinatorLostError:
            self._succession.await_next(number)
            self._ranks.replace(group_id, self._ranks.find_lost(group_id))
            return None
        with self._lock:  # from here on another coordinator hears of it as of all groups
            if self._succession.number != number:
                return None
            group.note_joined()
        return blocks

    def release(self, group_id: int) -> None:
        """It is to leave: it is not rebuilt, and another coordinator does not hear of it. An attempt that runs is
        waited for. Then comes `remove` or `keep`."""
        with self._lock:
            group = self._groups.pop(group_id)
            self._given_up.pop(group_id, None)
            self._leaving[group_id] = _Leaving(self._succession.number)
        group.stop()
        group.wait()

    def keep(self, group_id: int, is_known: bool = True) -> None:
        """It stays, and is rebuilt as before; a coordinator that does not know it takes it over."""
        with self._lock:
            leaving = self._leaving.pop(group_id)
            group = self._groups[group_id] = self._new(group_id)
            if leaving.coordinator != self._succession.number or not is_known:
                self._restores = [*self._restores, group.restore(self._succession.wait_until_up)]
            elif leaving.failure is not None:
                group.take(leaving.failure)

    def remove(self, group_id: int) -> None:
        """It has left. An attempt that runs is waited for."""
        with self._lock:
            self._leaving.pop(group_id, None)
            group = self._groups.pop(group_id, None)
            self._given_up.pop(group_id, None)
        if group is not None:
            group.stop()
            group.wait()

    def has_others(self, group_id: int) -> bool:
        """Whether a group beside that one is to stay, and serves or is rebuilt."""
        with self._lock:
            return any(
                other != group_id and other not in self._given_up and not group.is_joining
                for other, group in self._groups.items()
            )

    @property
    def given_up(self) -> Collection[int]:
        """Groups that are given up, and not removed since."""
        with self._lock:
            return list(self._given_up)

    @property
    def known_epochs(self) -> Collection[int]:
        """Of the failures that were taken, the last of each group."""
        with self._lock:
            return [*(group.epoch for group in self._groups.values()), *self._strays]

    def take(self, failures: Sequence[engine_pb2.GroupFailure]) -> None:
        """Has each group rebuilt."""
        with self._lock:
            for failure in failures:
                if group := self._groups.get(failure.group_id):
                    group.take(failure)
                    continue
                self._strays.add(failure.epoch)
                if leaving := self._leaving.get(failure.group_id):
                    leaving.failure = failure

    def restore(self, wait_until_up: Callable[[], None]) -> None:
        """Has another coordinator take over every group that has served, is not given up and is not to leave, with the
        ranks that it has; attempts that were for the one before end.

        `wait_until_up` returns when the coordinator answers, and raises UnavailableError if it never will.
        """
        with self._lock:
            self._succession.follow(wait_until_up)
            self._restores = [group.restore(wait_until_up) for group in self._groups.values() if not group.is_joining]

    @property
    def is_restored(self) -> bool:
        """Whether the coordinator has heard of every group, and one of them serves under it."""
        with self._lock:
            groups = list(self._groups.values())
        return all(restore.done() for restore in self._restores) and any(group.serves for group in groups)

    def check(self) -> None:
        """Raises UnavailableError when every group is given up, or if an attempt failed by a fault of ours."""
        with self._lock:
            for group in self._groups.values():
                group.check()
            may_stay = bool(self._leaving)  # where all others are given up, one that is to leave has to
            if self._given_up and len(self._given_up) == len(self._groups) and not may_stay:
                raise UnavailableError(list(self._given_up.values())[-1])
            unsaid = [self._given_up[group_id] for group_id in self._unsaid if group_id in self._given_up]
            self._unsaid.clear()
        for why in unsaid:
            self._say(f"{why}; the other groups go on")

    def _note_given_up(self, group_id: int, why: str) -> None:
        with self._lock:
            if group_id in self._groups:
                self._given_up[group_id] = why
                self._unsaid.append(group_id)

    def stop(self) -> None:
        """Begins nothing more; what runs is not waited for. Who has a group join hears that the server is ending."""
        self._succession.end()
        with self._lock:
            self._is_stopping = True
            for group in self._groups.values():
                group.stop()
