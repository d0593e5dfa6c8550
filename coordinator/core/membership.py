"""Which worker groups there are, in which incarnation, and whether requests may hope for one. Pure.

    (none) -> STARTING -> READY -> FAILED -> REBUILDING -> READY
                  |         |         ^           |
                  v         v         +-----------+
               (none)   DRAINING -> (none)

A group is started and rebuilt by one call, `begin`, which gives it a new epoch: what the ranks of an older one still
say or compute counts for nothing. One that served under an earlier coordinator begins as REBUILDING. One that drains is
to leave: it is gone when nothing of it is left, or when it fails; and it stays if it is all that there is.
"""

import itertools
from dataclasses import dataclass, field
from enum import Enum

from ...errors import FailedPreconditionError, NotFoundError

# More than one coordinator gives out, so that all of the next one's are higher, as ranks demand. The millions of an
# epoch thus tell the incarnation.
_EPOCHS_OF_A_COORDINATOR = 1_000_000


class GroupState(Enum):
    """Values are those of octavo.v1.GroupState."""

    STARTING = 1
    READY = 2
    FAILED = 3
    REBUILDING = 4
    DRAINING = 5


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

    def __init__(self, rebuilds: bool, incarnation: int = 0) -> None:
        """`rebuilds`: whether somebody rebuilds groups that fail. `incarnation`: how many coordinators this one
        follows."""
        self._rebuilds = rebuilds
        self._epochs = itertools.count(incarnation * _EPOCHS_OF_A_COORDINATOR + 1)
        self.groups: dict[int, GroupMember] = {}

    @property
    def has_prospects(self) -> bool:
        """Whether a request may still be served: by a group that is there to stay, or by one that may come back."""
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

    def begin(self, group_id: int, has_served: bool = False) -> GroupMember:
        """A new group starts, or one that failed is rebuilt. Raises FailedPreconditionError for one that is there.

        `has_served`: a group that is new here has served under an earlier coordinator.
        """
        group = self.groups.get(group_id)
        if group is None:
            first = GroupState.REBUILDING if has_served else GroupState.STARTING
            group = self.groups[group_id] = GroupMember(group_id, next(self._epochs), first)
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
        """A rank of it died, hangs or failed; `is_explained`: by a request that has ended. A group that never was ready
        is forgotten, and may be tried again; one that was to leave is gone."""
        group = self.groups[group_id]
        if group.state in (GroupState.STARTING, GroupState.DRAINING):
            del self.groups[group_id]
            return
        group.become(GroupState.FAILED, GroupState.READY, GroupState.REBUILDING)
        group.failure, group.is_explained = why, is_explained

    def drain(self, group_id: int) -> None:
        """It is to leave. Raises FailedPreconditionError for one that does not serve, and for the last that does;
        NotFoundError for one that there is not."""
        group = self._of(group_id)
        if group.state is not GroupState.READY:
            raise FailedPreconditionError(f"group {group_id} does not serve: it is {group.state.name.lower()}")
        if not any(other.state is GroupState.READY for other in self.groups.values() if other is not group):
            raise FailedPreconditionError(f"group {group_id} is the last one that serves")
        group.become(GroupState.DRAINING, GroupState.READY)

    def cancel_drains(self) -> list[int]:
        """Those that were to leave serve on, since they are all that there is; which ones."""
        kept = [group for group in self.groups.values() if group.state is GroupState.DRAINING]
        for group in kept:
            group.become(GroupState.READY, GroupState.DRAINING)
        return [group.group_id for group in kept]

    def remove(self, group_id: int) -> None:
        """Nothing of it is left: of one that drained, or that failed and that nobody rebuilds now."""
        assert self.groups[group_id].state in (GroupState.DRAINING, GroupState.FAILED)
        del self.groups[group_id]

    def state(self, group_id: int) -> GroupState:
        """Raises NotFoundError for a group that there is not."""
        return self._of(group_id).state

    def _of(self, group_id: int) -> GroupMember:
        if group_id not in self.groups:
            raise NotFoundError(f"there is no group {group_id}")
        return self.groups[group_id]

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
