"""Rebuilds worker groups that fail: replaces the ranks that are lost, and has all join under a new epoch.

The coordinator notices a failure, ends the group's epoch and keeps its requests; see docs/architecture.md. Here each
group is rebuilt on a thread of its own, so that one that does not come back holds up nothing else. A coordinator that
follows one that died is told of all groups in the same way.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

from ..errors import OctavoError, UnavailableError
from ..proto import engine_pb2
from .engine_control import GroupBlocks
from .rank_probe import RankLoss
from .restart_policy import WINDOW_S, RestartPolicy


class Ranks(Protocol):
    """The processes of the ranks."""

    def find_lost(self, group_id: int) -> Mapping[int, RankLoss]:
        """The group's ranks that are dead or do not answer."""
        ...

    def replace(self, group_id: int, lost: Mapping[int, RankLoss]) -> None:
        """Has new processes take their places. Raises UnavailableError if one does not start."""
        ...

    def all_of(self, group_id: int) -> Mapping[int, RankLoss]:
        """All of the group's ranks, as if they hung."""
        ...


class Control(Protocol):
    """The line to the coordinator."""

    def add_group(self, request: engine_pb2.AddGroupRequest, report: Callable[[str, float], None]) -> GroupBlocks: ...

    def abandon_group(self, group_id: int) -> None: ...


@dataclass(frozen=True, slots=True)
class _Cause:
    """Why a group is built again."""

    what: str  # in words, for the line that says that it serves
    reason: str
    at: float
    is_failure: bool  # of the group itself: not if only its coordinator is another
    is_explained: bool = False  # by a request that has ended: not the group's fault


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
        self._groups: dict[int, _GroupRecovery] = {}
        self._given_up: dict[int, str] = {}  # why, in the order of time
        self._unsaid: list[int] = []  # of those
        self._restores: list[Future[None]] = []
        self._strays: set[int] = set()  # epochs of groups that were removed before they failed

    def add(self, group_id: int) -> None:
        """Has a group rebuilt when it fails. Comes before the group serves, so that no failure comes before it."""
        policy = RestartPolicy(self._max_restarts)
        group = _GroupRecovery(
            group_id, self._ranks, self._control, self._make_request, self._say, policy, self._note_given_up
        )
        with self._lock:
            self._groups[group_id] = group

    def remove(self, group_id: int) -> None:
        """Has it rebuilt no more. An attempt that runs is waited for."""
        with self._lock:
            group = self._groups.pop(group_id)
            self._given_up.pop(group_id, None)
        group.stop()
        group.wait()

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
                else:
                    self._strays.add(failure.epoch)

    def restore(self, wait_until_up: Callable[[], None]) -> None:
        """Has another coordinator take over every group that is not given up, with the ranks that it has; attempts that
        were for the one before end.

        `wait_until_up` returns when the coordinator answers, and raises UnavailableError if it never will.
        """
        with self._lock:
            self._restores = [group.restore(wait_until_up) for group in self._groups.values()]

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
            if self._given_up and len(self._given_up) == len(self._groups):
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
        """Begins nothing more; what runs is not waited for."""
        with self._lock:
            for group in self._groups.values():
                group.stop()


class _GroupRecovery:
    """One group's attempts, one after another."""

    def __init__(
        self,
        group_id: int,
        ranks: Ranks,
        control: Control,
        make_request: Callable[[int], engine_pb2.AddGroupRequest],
        say: Callable[[str], None],
        policy: RestartPolicy,
        on_given_up: Callable[[int, str], None],
    ) -> None:
        self.epoch = 0  # of the last failure taken
        self._on_given_up = on_given_up
        self._group_id = group_id
        self._ranks, self._control, self._make_request, self._say = ranks, control, make_request, say
        self._policy = policy
        self._is_given_up = False
        self._has_failed_to_rebuild = False  # since it last served
        self._num_coordinators = 1  # what was begun for an earlier one ends
        self._serves_under = 1  # which of them
        self._stopping = threading.Event()
        self._fault: Exception | None = None
        self._thread = ThreadPoolExecutor(1, f"recovery of group {group_id}")

    def take(self, failure: engine_pb2.GroupFailure) -> None:
        self.epoch = failure.epoch
        what = f"failed: {failure.reason} (last heard of {failure.silent_s:.2f} s before)"
        at = time.monotonic() - failure.age_s
        cause = _Cause(what, failure.reason, at, is_failure=True, is_explained=failure.is_explained)
        self._thread.submit(self._recover, cause, self._num_coordinators)

    def restore(self, wait_until_up: Callable[[], None]) -> "Future[None]":
        self._num_coordinators += 1
        cause = _Cause("was taken over by another coordinator", "", time.monotonic(), is_failure=False)
        return self._thread.submit(self._restore, cause, self._num_coordinators, wait_until_up)

    def check(self) -> None:
        if self._fault is not None:
            raise self._fault

    def stop(self) -> None:
        self._stopping.set()

    def wait(self) -> None:
        """Until nothing of it runs."""
        self._thread.shutdown(wait=True)

    def _is_over(self, coordinator: int) -> bool:
        """Whether nobody waits any more for what was begun for that coordinator, the first or another of the server."""
        return self._stopping.is_set() or coordinator != self._num_coordinators

    def _recover(self, cause: _Cause, coordinator: int) -> None:
        try:
            reason = cause.reason
            if cause.is_explained:
                self._policy.forgive()
            while reason and not self._is_over(coordinator):
                delay_s = self._policy.delay_s(time.monotonic())
                if delay_s is None:
                    self._give_up(reason)
                    return
                if not self._stopping.wait(delay_s):
                    reason = self._attempt(cause, coordinator)
        except Exception as error:
            self._fault = error

    @property
    def serves(self) -> bool:
        """Whether it did at last, under the present coordinator."""
        return self._serves_under == self._num_coordinators

    def _restore(self, cause: _Cause, coordinator: int, wait_until_up: Callable[[], None]) -> None:
        """A group has not failed with its coordinator: the first attempt is for none of its own failures."""
        if self._is_given_up or self._is_over(coordinator):
            return
        self._has_failed_to_rebuild = False  # if it did, it may have been for want of the coordinator
        try:
            reason = self._attempt(cause, coordinator, wait_until_up)
        except Exception as error:
            self._fault = error
            return
        if reason:
            self._recover(replace(cause, reason=reason), coordinator)

    def _attempt(self, cause: _Cause, coordinator: int, wait_until_up: Callable[[], None] = lambda: None) -> str:
        """One attempt; why it must be made again, or nothing. One that the coordinator saw fail is a failure of the
        group, and comes back by `take`."""
        if self._is_over(coordinator):
            return ""
        try:
            replaced = self._replace_lost()
        except OctavoError as error:
            self._note_failed_attempt(str(error), coordinator)
            return str(error)
        if self._is_over(coordinator):
            return ""
        try:
            wait_until_up()
        except UnavailableError:
            return ""  # that coordinator has died too
        request = self._make_request(self._group_id)
        request.has_served = True
        try:
            self._control.add_group(request, lambda stage, duration_s: None)
        except OctavoError as error:
            self._note_failed_attempt(str(error), coordinator)
            return ""
        self._note_service(cause, replaced, coordinator)
        return ""

    def _note_service(self, cause: _Cause, replaced: Sequence[int], coordinator: int) -> None:
        self._has_failed_to_rebuild = False
        self._serves_under = coordinator
        if cause.is_failure or replaced:  # otherwise it lives on, and the line about the coordinator says so
            self._policy.serves(time.monotonic())
            self._say(self._describe(cause, replaced, time.monotonic() - cause.at))

    def _replace_lost(self) -> Sequence[int]:
        """Only what is lost, so that the others keep their weights; all, where nothing is and that did not help."""
        lost = self._ranks.find_lost(self._group_id)
        if self._stopping.is_set():
            raise UnavailableError("the server is ending")
        if not lost and self._has_failed_to_rebuild:
            lost = self._ranks.all_of(self._group_id)
        self._ranks.replace(self._group_id, lost)
        return list(lost)

    def _note_failed_attempt(self, why: str, coordinator: int) -> None:
        if self._is_over(coordinator):
            return
        self._has_failed_to_rebuild = True
        self._say(f"group {self._group_id}: rebuilding it failed: {why}")

    def _give_up(self, reason: str) -> None:
        within = f"{self._policy.num_failures} time(s) within {WINDOW_S / 60:.0f} minutes"
        why = f"worker group {self._group_id} failed {within} and is given up; the last time: {reason}"
        with contextlib.suppress(UnavailableError):  # the next coordinator is told nothing of the group
            self._control.abandon_group(self._group_id)
        self._is_given_up = True
        self._on_given_up(self._group_id, why)

    def _describe(self, cause: _Cause, replaced: Sequence[int], duration_s: float) -> str:
        ranks = f"started rank {', '.join(map(str, replaced))} anew" if replaced else "kept all ranks"
        return f"group {self._group_id} {cause.what}; {ranks}, serves again after {duration_s:.1f} s"
