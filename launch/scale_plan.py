"""What a change of scale comes to: how many groups are to start, and which are to leave. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from ..errors import FailedPreconditionError, InvalidArgumentError


@dataclass(frozen=True, slots=True)
class Scale:
    """How many worker groups, and ranks of each."""

    num_groups: int
    tensor_parallel_size: int

    def __str__(self) -> str:
        return f"{self.num_groups} group(s) of {self.tensor_parallel_size} rank(s)"


@dataclass(frozen=True, slots=True)
class ScaleBounds:
    """How many groups there may be."""

    least: int = 1
    most: int = 1024
    is_autoscaling: bool = False

    def check(self, num_groups: int) -> None:
        """Raises InvalidArgumentError."""
        if not self.least <= num_groups <= self.most:
            why = ", as --min-num-groups and --max-num-groups say" if self.is_autoscaling else ""
            raise InvalidArgumentError(
                f"num_groups must be in [{self.least}, {self.most}]{why}, got {num_groups}", "num_groups"
            )


class GroupCondition(Enum):
    """Of a group that has ranks."""

    SERVES = "serves"
    MENDED = "is being rebuilt"
    GIVEN_UP = "is given up"


@dataclass(frozen=True, slots=True)
class GroupNow:
    """One that there is."""

    group_id: int
    tensor_parallel_size: int
    condition: GroupCondition
    num_running: int = 0


@dataclass(frozen=True, slots=True)
class Change:
    """Groups to bury, then groups to start, then groups to leave."""

    given_up: tuple[int, ...]
    num_new: int
    leaving: tuple[int, ...]


def plan_change(target: Scale, groups: Sequence[GroupNow]) -> Change:
    """Of groups of the right size the least loaded leave, of equals the newest; all of another size do.

    Raises FailedPreconditionError if one that would have to leave is being rebuilt, or none would be left that serves.
    """
    given_up = tuple(group.group_id for group in groups if group.condition is GroupCondition.GIVEN_UP)
    alive = [group for group in groups if group.condition is not GroupCondition.GIVEN_UP]
    right = [group for group in alive if group.tensor_parallel_size == target.tensor_parallel_size]
    wrong = [group for group in alive if group.tensor_parallel_size != target.tensor_parallel_size]
    num_new = max(0, target.num_groups - len(right))
    leaving = [*wrong, *_least_loaded(right, len(right) - target.num_groups)]
    _check_leaving(leaving, alive, num_new)
    return Change(given_up, num_new, tuple(group.group_id for group in leaving))


def _least_loaded(groups: Sequence[GroupNow], num_groups: int) -> list[GroupNow]:
    """Those that serve before those that do not: nothing may be done to these."""
    order = sorted(groups, key=lambda g: (g.condition is not GroupCondition.SERVES, g.num_running, -g.group_id))
    return order[: max(0, num_groups)]


def _check_leaving(leaving: Sequence[GroupNow], alive: Sequence[GroupNow], num_new: int) -> None:
    mended = [str(group.group_id) for group in leaving if group.condition is GroupCondition.MENDED]
    if mended:
        raise FailedPreconditionError(f"group {', '.join(mended)} is being rebuilt; try again when it serves")
    stay = [group for group in alive if group not in leaving]
    if not num_new and not any(group.condition is GroupCondition.SERVES for group in stay):
        rest = f"the {len(stay)} other(s) are being rebuilt" if stay else "there is no other"
        raise FailedPreconditionError(f"no group would be left that serves: {rest}; try again when one does")
