"""Which worker groups there are, in which incarnation, and whether requests may hope for one. Pure.

    (none) -> STARTING -> READY -> FAILED -> REBUILDING -> READY
                  |                   ^           |
                  v                   +-----------+
               (none)

A group is started and rebuilt by one call, `begin`, which gives it a new epoch: what the ranks of an older one still
say or compute counts for nothing.
"""

import itertools
from dataclasses import dataclass, field
from enum import Enum

from ...errors import FailedPreconditionError


class GroupState(Enum):
    """Values are those of octavo.v1.GroupState."""

    STARTING = 1
    READY = 2
    FAILED = 3
    REBUILDING = 4


@dataclass(slots=True)
class GroupMember:
    """One group, in its present incarnation. Only Membership changes it."""

    group_id: int
    epoch: int
    state: GroupState = GroupState.STARTING
    failure: str = ""  # why it failed last; empty while it serves
    is_explained: bool = False  # whether a request was the cause, which has ended
    num_restarts: int = 0
    is_abandoned: bool = False  # failed, and will not come back
    history: list[str] = field(default_factory=list)

    def become(self, state: GroupState, *from_states: GroupState) -> None:
        if self.state not in from_states:
            change = f"{self.state.name} to {state.name}"
            raise AssertionError(f"group {self.group_id} cannot go from {change}: {self.history}")
        self.history.append(f"{self.state.name} -> {state.name}, epoch {self.epoch}")
        self.state = state


class Membership:
    """Owner of the state and the epoch of every group."""

    def __init__(self, rebuilds: bool) -> None:
        """`rebuilds`: whether somebody rebuilds groups that fail."""
        self._rebuilds = rebuilds
        self._epochs = itertools.count(1)
        self.groups: dict[int, GroupMember] = {}

    @property
    def has_prospects(self) -> bool:
        """Whether a request may still be served: by a group that is there, or by one that may come back."""
        return any(self._may_serve(group) for group in self.groups.values())

    @property
    def is_settled(self) -> bool:
        """Whether no group may come beside those that serve."""
        return not any(
            group.state is GroupState.STARTING or (group.state is not GroupState.READY and self._may_serve(group))
            for group in self.groups.values()
        )

    def _may_serve(self, group: GroupMember) -> bool:
        if group.state is GroupState.READY:
            return True
        has_served = group.state in (GroupState.FAILED, GroupState.REBUILDING)
        return self._rebuilds and has_served and not group.is_abandoned

    @property
    def awaiting_rebuild(self) -> list[GroupMember]:
        """Groups that failed, and that nobody rebuilds yet."""
        return [group for group in self.groups.values() if group.state is GroupState.FAILED and not group.is_abandoned]

    def begin(self, group_id: int) -> GroupMember:
        """A new group starts, or one that failed is rebuilt. Raises FailedPreconditionError for one that is there."""
        group = self.groups.get(group_id)
        if group is None:
            group = self.groups[group_id] = GroupMember(group_id, next(self._epochs))
            return group
        if group.state is not GroupState.FAILED or group.is_abandoned:
            state = "abandoned" if group.is_abandoned else group.state.name.lower()
            raise FailedPreconditionError(f"group {group_id} exists already, and is {state}")
        group.become(GroupState.REBUILDING, GroupState.FAILED)
        group.epoch = next(self._epochs)
        return group

    def admit(self, group_id: int) -> None:
        """Its ranks are ready."""
        group = self.groups[group_id]
        group.num_restarts += group.state is GroupState.REBUILDING
        group.become(GroupState.READY, GroupState.STARTING, GroupState.REBUILDING)
        group.failure = ""

    def fail(self, group_id: int, why: str, is_explained: bool = False) -> None:
        """A rank of it died, hangs or failed; `is_explained`: by a request that has ended. A group that
        never was ready is forgotten, and may be tried again."""
        group = self.groups[group_id]
        if group.state is GroupState.STARTING:
            del self.groups[group_id]
            return
        group.become(GroupState.FAILED, GroupState.READY, GroupState.REBUILDING)
        group.failure, group.is_explained = why, is_explained

    def abandon(self, group_id: int) -> None:
        """It will not be rebuilt. Raises FailedPreconditionError for one that has not failed."""
        group = self.groups.get(group_id)
        if group is None or group.state is not GroupState.FAILED:
            raise FailedPreconditionError(f"group {group_id} has not failed")
        group.is_abandoned = True

    def check_invariants(self) -> None:
        """For tests: raises AssertionError if any state contradicts another."""
        epochs = [group.epoch for group in self.groups.values()]
        assert len(set(epochs)) == len(epochs), "two groups have one epoch"
        for group_id, group in self.groups.items():
            assert group.group_id == group_id
            assert not group.is_abandoned or group.state is GroupState.FAILED
            assert bool(group.failure) <= (group.state in (GroupState.FAILED, GroupState.REBUILDING))
