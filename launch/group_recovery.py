"""The attempts to rebuild one worker group, one after another, on a thread of its own."""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

from ..errors import OctavoError, UnavailableError
from ..proto import engine_pb2
from .engine_control import GroupBlocks
from .rank_probe import RankLoss
from .restart_policy import WINDOW_S, RestartPolicy
from .stage_times import StageTimes


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


class GroupRecovery:
    """One group's attempts. Recovery calls it, under its lock but for `wait`."""

    def __init__(
        self,
        group_id: int,
        ranks: Ranks,
        control: Control,
        make_request: Callable[[int], engine_pb2.AddGroupRequest],
        say: Callable[[str], None],
        policy: RestartPolicy,
        on_given_up: Callable[[int, str], None],
        is_joining: bool,
    ) -> None:
        self.epoch = 0  # of the last failure taken
        self.is_joining = is_joining  # it has not served yet
        self._on_given_up = on_given_up
        self._group_id = group_id
        self._ranks, self._control, self._make_request, self._say = ranks, control, make_request, say
        self._policy = policy
        self._is_given_up = False
        self._has_failed_to_rebuild = False  # since it last served
        self._num_coordinators = 1  # what was begun for an earlier one ends
        self._serves_under = 0 if is_joining else 1  # which of them
        self._stopping = threading.Event()
        self._fault: Exception | None = None
        self._thread = ThreadPoolExecutor(1, f"recovery of group {group_id}")

    def note_joined(self) -> None:
        self.is_joining = False
        self._serves_under = self._num_coordinators

    def take(self, failure: engine_pb2.GroupFailure) -> None:
        self.epoch = failure.epoch
        what = f"failed: {failure.reason} (last heard of {failure.silent_s:.2f} s before)"
        at = time.monotonic() - failure.age_s
        cause = _Cause(what, failure.reason, at, is_failure=True, is_explained=failure.is_explained)
        self._thread.submit(self._recover, cause, self._num_coordinators)

    def restore(self, wait_until_up: Callable[[], None]) -> Future[None]:
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
        times, began_at = StageTimes(), time.monotonic()
        try:
            replaced = self._replace_lost()
            times.note("ranks", time.monotonic() - began_at)
        except OctavoError as error:
            self._note_failed_attempt(str(error), coordinator)
            return str(error)
        if self._is_over(coordinator):
            return ""
        try:
            wait_until_up()
        except UnavailableError:
            return ""  # that coordinator has died too
        if self._is_over(coordinator):
            return ""
        try:
            request = self._make_request(self._group_id)  # asks the coordinator, too
            request.has_served = True
            self._control.add_group(request, times.note)
        except OctavoError as error:
            self._note_failed_attempt(str(error), coordinator)
            return ""
        self._note_service(cause, replaced, times, coordinator)
        return ""

    def _note_service(self, cause: _Cause, replaced: Sequence[int], times: StageTimes, coordinator: int) -> None:
        self._has_failed_to_rebuild = False
        self._serves_under = coordinator
        if cause.is_failure or replaced:  # otherwise it lives on, and the line about the coordinator says so
            self._policy.serves(time.monotonic())
            self._say(self._describe(cause, replaced, times, time.monotonic() - cause.at))

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

    def _describe(self, cause: _Cause, replaced: Sequence[int], times: StageTimes, duration_s: float) -> str:
        ranks = f"started rank {', '.join(map(str, replaced))} anew" if replaced else "kept all ranks"
        return f"group {self._group_id} {cause.what}; {ranks}, serves again after {duration_s:.1f} s ({times})"
