"""Rebuilds worker groups that fail: replaces the ranks that are lost, and has all join under a new epoch.

The coordinator notices a failure, ends the group's epoch and keeps its requests; see docs/architecture.md. Here each
group is rebuilt on a thread of its own, so that one that does not come back holds up nothing else.
"""

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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


class Recovery:
    """Owner of the attempts to rebuild groups. One thread at a time calls `take` and `check`; nothing blocks it."""

    def __init__(
        self,
        ranks: Ranks,
        control: Control,
        make_request: Callable[[int], engine_pb2.AddGroupRequest],
        say: Callable[[str], None],
        group_ids: Sequence[int],
        max_restarts: int,
    ) -> None:
        """`make_request(group_id)` is for the ranks as they are now. `say` shows a line; any thread calls it."""
        self._say = say
        self._num_given_up = 0
        self._groups = {
            group_id: _GroupRecovery(group_id, ranks, control, make_request, say, RestartPolicy(max_restarts))
            for group_id in group_ids
        }

    @property
    def known_epochs(self) -> Collection[int]:
        """Of the failures that were taken, the last of each group."""
        return [group.epoch for group in self._groups.values()]

    def take(self, failures: Sequence[engine_pb2.GroupFailure]) -> None:
        """Has each group rebuilt."""
        for failure in failures:
            self._groups[failure.group_id].take(failure)

    def check(self) -> None:
        """Raises UnavailableError when every group is given up, or if an attempt failed by a fault of ours."""
        for group in self._groups.values():
            group.check()
        given_up = [group.given_up for group in self._groups.values() if group.given_up]
        if len(given_up) == len(self._groups):
            raise UnavailableError(given_up[-1])
        for why in given_up[self._num_given_up :]:
            self._say(f"{why}; the other groups go on")
        self._num_given_up = len(given_up)

    def stop(self) -> None:
        """Begins nothing more; what runs is not waited for."""
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
    ) -> None:
        self.epoch = 0  # of the last failure taken
        self.given_up = ""  # why, once it is
        self._group_id = group_id
        self._ranks, self._control, self._make_request, self._say = ranks, control, make_request, say
        self._policy = policy
        self._has_failed_to_rebuild = False  # since it last served
        self._stopping = threading.Event()
        self._fault: Exception | None = None
        self._thread = ThreadPoolExecutor(1, f"recovery of group {group_id}")

    def take(self, failure: engine_pb2.GroupFailure) -> None:
        self.epoch = failure.epoch
        self._thread.submit(self._recover, failure, time.monotonic() - failure.age_s)

    def check(self) -> None:
        if self._fault is not None:
            raise self._fault

    def stop(self) -> None:
        self._stopping.set()

    def _recover(self, failure: engine_pb2.GroupFailure, failed_at: float) -> None:
        try:
            reason = failure.reason
            if failure.is_explained:
                self._policy.forgive()
            while (why := self._attempt(failure, failed_at, reason)) and not self._stopping.is_set():
                reason = why
        except Exception as error:
            self._fault = error

    def _attempt(self, failure: engine_pb2.GroupFailure, failed_at: float, reason: str) -> str:
        """One attempt; why it must be made again, or nothing. One that the coordinator saw fail is a failure of the
        group, and comes back by `take`."""
        delay_s = self._policy.delay_s(time.monotonic())
        if delay_s is None:
            self._give_up(reason)
            return ""
        if self._stopping.wait(delay_s):
            return ""
        try:
            replaced = self._replace_lost()
        except OctavoError as error:
            self._note_failed_attempt(str(error))
            return str(error)
        try:
            self._control.add_group(self._make_request(self._group_id), lambda stage, duration_s: None)
        except OctavoError as error:
            self._note_failed_attempt(str(error))
            return ""
        self._has_failed_to_rebuild = False
        self._policy.serves(time.monotonic())
        self._say(self._describe(failure, replaced, time.monotonic() - failed_at))
        return ""

    def _replace_lost(self) -> Sequence[int]:
        """Only what is lost, so that the others keep their weights; all, where nothing is and that did not help."""
        lost = self._ranks.find_lost(self._group_id)
        if self._stopping.is_set():
            raise UnavailableError("the server is ending")
        if not lost and self._has_failed_to_rebuild:
            lost = self._ranks.all_of(self._group_id)
        self._ranks.replace(self._group_id, lost)
        return list(lost)

    def _note_failed_attempt(self, why: str) -> None:
        if self._stopping.is_set():
            return
        self._has_failed_to_rebuild = True
        self._say(f"group {self._group_id}: rebuilding it failed: {why}")

    def _give_up(self, reason: str) -> None:
        within = f"{self._policy.num_failures} time(s) within {WINDOW_S / 60:.0f} minutes"
        why = f"worker group {self._group_id} failed {within} and is given up; the last time: {reason}"
        self._control.abandon_group(self._group_id)
        self.given_up = why

    def _describe(self, failure: engine_pb2.GroupFailure, replaced: Sequence[int], duration_s: float) -> str:
        ranks = f"started rank {', '.join(map(str, replaced))} anew" if replaced else "kept all ranks"
        found = f"{failure.reason} (last heard of {failure.silent_s:.2f} s before)"
        return f"group {self._group_id} failed: {found}; {ranks}, serves again after {duration_s:.1f} s"
