"""Changes how many worker groups there are, and how many ranks each has, while requests run.

New groups start beside those that serve, and those that leave do so when the new ones serve, so that no request fails.
One change at a time; it goes on without its caller, and under another coordinator if one dies meanwhile. The launcher
owns the target: it alone knows what Ray has room for, and it outlives a coordinator.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from ..errors import (
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    OctavoError,
    UnavailableError,
)
from ..proto import admin_pb2
from .engine_control import CoordinatorLostError, GroupBlocks
from .groups import WorkerGroups
from .scale_plan import Change, GroupCondition, GroupNow, Scale, ScaleBounds, plan_change
from .stage_times import StageTimes

_MAX_RANKS = 1024  # of a group
_SAY_S = 1.0  # between lines on how a group drains

Say = Callable[[str], None]
News = queue.SimpleQueue[admin_pb2.ScaleProgress | OctavoError | None]  # the last is an error, or nothing


class Control(Protocol):
    """The line to the coordinator."""

    def remove_group(self, group_id: int, report: Callable[[int], None]) -> None: ...

    def status(self) -> admin_pb2.GetStatusResponse: ...


class Keeper(Protocol):
    """Who rebuilds groups that fail, and has another coordinator take them over."""

    def join(self, group_id: int, build: Callable[[], GroupBlocks]) -> GroupBlocks: ...

    def release(self, group_id: int) -> None: ...

    def keep(self, group_id: int, is_known: bool = True) -> None: ...

    def remove(self, group_id: int) -> None: ...

    def has_others(self, group_id: int) -> bool: ...

    @property
    def given_up(self) -> Collection[int]: ...


class NoKeeper:
    """Nobody rebuilds: a group that fails ends the server."""

    given_up: Collection[int] = ()

    def join(self, group_id: int, build: Callable[[], GroupBlocks]) -> GroupBlocks:
        """No other coordinator would follow."""
        return build()

    def release(self, group_id: int) -> None:
        """Nothing was known."""

    def keep(self, group_id: int, is_known: bool = True) -> None:
        """Nothing is to be known."""

    def remove(self, group_id: int) -> None:
        """Nothing was known."""

    def has_others(self, group_id: int) -> bool:
        """Nobody would be there to take this one over."""
        return True


class Scaler:
    """Owner of the scale that the server is to have. Any thread may call."""

    def __init__(
        self, groups: WorkerGroups, control: Control, keeper: Keeper, target: Scale, bounds: ScaleBounds, show: Say
    ) -> None:
        """`target`: what there is now. `show` has the launcher say what happens."""
        self._groups, self._control, self._keeper = groups, control, keeper
        self._target, self._bounds, self._show = target, bounds, show
        self._lock = threading.Lock()  # of the next
        self._under_way: Scale | None = None
        self._is_stopping = False
        self._num_ready = 0  # groups, when the coordinator was heard of last

    @property
    def target(self) -> Scale:
        """What the server has, or is on its way to."""
        return self._under_way or self._target

    @property
    def is_settled(self) -> bool:
        """Whether no change is under way, and no group is being rebuilt. Raises UnavailableError as `status` does."""
        return self._under_way is None and all(g.condition is not GroupCondition.MENDED for g in self._groups_now())

    def stop(self) -> None:
        """Nothing more begins; a change that runs is left where it is."""
        self._is_stopping = True

    def scale(self, num_groups: int = 0, tensor_parallel_size: int = 0) -> Iterator[admin_pb2.ScaleProgress]:
        """Begins a change, and tells of it until it is done; 0 means as many as now. Who stops listening stops nothing.

        Raises InvalidArgumentError for a size that cannot be; FailedPreconditionError for one that there is no room
        for, and while another change is under way; UnavailableError if a group does not start, and then nothing has
        changed. What is refused at once has begun nothing.
        """
        target = self._checked(num_groups, tensor_parallel_size)
        self._claim(target)
        try:
            change = plan_change(target, self._groups_now())
            self._check_room(change, target)
            news: News = queue.SimpleQueue()
            threading.Thread(target=self._run, args=(change, target, news), name="scale", daemon=True).start()
        except BaseException:
            self._under_way = None
            raise
        return _listen(news)

    def _run(self, change: Change, target: Scale, news: News) -> None:
        def say(line: str) -> None:
            self._show(line)
            news.put(self._progress(line, target))

        started = time.monotonic()
        error = self._try(lambda: self._make(change, target, say))
        self._target = self._scale_now() or self._target
        self._under_way = None  # before the last word: who hears that may ask for the next change
        if error is None:
            say(f"there are {target} now, after {time.monotonic() - started:.1f} s")
        elif not self._is_stopping:
            self._show(f"the change of scale failed: {error}")
        news.put(error)

    def _checked(self, num_groups: int, tensor_parallel_size: int) -> Scale:
        if not num_groups and not tensor_parallel_size:
            raise InvalidArgumentError("give num_groups, tensor_parallel_size or both", "num_groups")
        target = Scale(num_groups or self._target.num_groups, tensor_parallel_size or self._target.tensor_parallel_size)
        self._bounds.check(target.num_groups)
        if not 1 <= target.tensor_parallel_size <= _MAX_RANKS:
            reason = f"must be in [1, {_MAX_RANKS}], got {target.tensor_parallel_size}"
            raise InvalidArgumentError(f"tensor_parallel_size {reason}", "tensor_parallel_size")
        self._groups.check_size(target.tensor_parallel_size)
        return target

    def _claim(self, target: Scale) -> None:
        with self._lock:
            if self._is_stopping:
                raise UnavailableError("the server is ending")
            if self._under_way is not None:
                raise FailedPreconditionError(f"another change is under way, to {self._under_way}; wait for its end")
            self._under_way = target

    def _groups_now(self) -> list[GroupNow]:
        status = {group.group_id: group for group in self._control.status().groups}
        given_up = self._keeper.given_up
        now = []
        for group_id, size in self._groups.sizes.items():
            known = status.get(group_id, admin_pb2.GroupStatus())
            condition = GroupCondition.SERVES if known.state == admin_pb2.GROUP_STATE_READY else GroupCondition.MENDED
            condition = GroupCondition.GIVEN_UP if group_id in given_up else condition
            now.append(GroupNow(group_id, size, condition, known.num_running))
        return now

    def _scale_now(self) -> Scale | None:
        """Nothing, while groups differ in size."""
        sizes = list(self._groups.sizes.values())
        return Scale(len(sizes), sizes[0]) if len(set(sizes)) == 1 else None

    def _check_room(self, change: Change, target: Scale) -> None:
        """Old and new ones need room beside each other."""
        wanted = change.num_new * target.tensor_parallel_size
        given_up = sum(self._groups.sizes[group_id] for group_id in change.given_up)  # their places become free
        free = given_up + (self._groups.num_free_ranks(max(0, wanted - given_up)) if wanted else 0)
        if free < wanted:
            have = self._scale_now() or f"groups of {list(self._groups.sizes.values())} ranks"
            raise FailedPreconditionError(
                f"Ray has no room for {target}: {change.num_new} more group(s) need {wanted} place(s), and {free} are "
                f"free beside the {have} that there are; scale to fewer, or add nodes"
            )

    def _try(self, make: Callable[[], None]) -> OctavoError | None:
        try:
            make()
            return None
        except OctavoError as error:
            return error
        except Exception as error:  # a fault of ours, unless the server is ending
            return InternalError(f"a fault of ours: {type(error).__name__}: {error}")

    # The change

    def _make(self, change: Change, target: Scale, say: Say) -> None:
        for group_id in change.given_up:
            self._remove(group_id, say)
        if change.num_new:
            self._start_new(Scale(change.num_new, target.tensor_parallel_size), say)
        _for_each(change.leaving, lambda group_id: self._remove(group_id, say))

    def _start_new(self, new: Scale, say: Say) -> None:
        """All of them, or none."""
        say(f"starting {new}")
        group_ids = self._groups.start_ranks(new.num_groups, new.tensor_parallel_size)
        errors = _for_each(group_ids, lambda group_id: self._add(group_id, say), raises=False)
        if errors:
            self._require_going_on()
            kept = self._undo([group_id for group_id in group_ids if group_id not in errors], errors)
            [(group_id, error), *_] = errors.items()
            and_now = f"group {', '.join(map(str, kept))} had to stay" if kept else "nothing has changed"
            raise UnavailableError(f"group {group_id} did not start, and {and_now}: {error}") from error

    def _add(self, group_id: int, say: Say) -> None:
        started, times = time.monotonic(), StageTimes()
        blocks = self._keeper.join(group_id, lambda: self._groups.add(group_id, times.note))
        took = f"its ranks took {time.monotonic() - started:.1f} s to load ({times})"
        say(f"group {group_id} serves, with {blocks.num_blocks} KV blocks; {took}")

    def _undo(self, started: Sequence[int], failed: Collection[int]) -> Collection[int]:
        """Those that cannot leave, since no other serves any more."""
        for group_id in failed:
            self._groups.end(group_id)
        return _for_each(started, lambda group_id: self._remove(group_id, self._show), raises=False)

    def _remove(self, group_id: int, say: Say) -> None:
        """Nobody may begin to rebuild it meanwhile, and no other coordinator hears of it: should one follow now, the
        group has left, and its requests go on elsewhere. One that must stay is kept as before."""
        said_at = -_SAY_S

        def report(num_running: int) -> None:
            nonlocal said_at
            if num_running and time.monotonic() - said_at >= _SAY_S:
                said_at = time.monotonic()
                say(f"group {group_id} drains: {num_running} sequence(s) left")

        self._keeper.release(group_id)
        how = "has left"
        try:
            self._control.remove_group(group_id, report)
        except (CoordinatorLostError, NotFoundError) as error:
            self._require_going_on()
            if not self._keeper.has_others(group_id):
                self._keeper.keep(group_id, is_known=not isinstance(error, NotFoundError))
                raise
            how = "has left with its coordinator: another is not told of it"
        except OctavoError:
            self._keeper.keep(group_id)
            raise
        self._keeper.remove(group_id)
        self._groups.end(group_id)
        say(f"group {group_id} {how}")

    def _require_going_on(self) -> None:
        """What is left of a server that ends is ended by who ends it."""
        if self._is_stopping:
            raise UnavailableError("the server is ending")

    def _progress(self, line: str, target: Scale) -> admin_pb2.ScaleProgress:
        with contextlib.suppress(UnavailableError):  # another coordinator may follow
            self._num_ready = sum(group.condition is GroupCondition.SERVES for group in self._groups_now())
        return admin_pb2.ScaleProgress(message=line, num_ready_groups=self._num_ready, num_groups=target.num_groups)


def _for_each(group_ids: Sequence[int], act: Callable[[int], None], raises: bool = True) -> dict[int, OctavoError]:
    """All at once, each to its end; the errors by group, of which the first is raised if `raises`."""
    if not group_ids:
        return {}
    with ThreadPoolExecutor(len(group_ids), "scale") as pool:
        acting = {group_id: pool.submit(act, group_id) for group_id in group_ids}
    errors: dict[int, OctavoError] = {}
    for group_id, done in acting.items():
        try:
            done.result()
        except OctavoError as error:
            if raises:
                raise
            errors[group_id] = error
    return errors


def _listen(news: News) -> Iterator[admin_pb2.ScaleProgress]:
    while (word := news.get()) is not None:
        if isinstance(word, OctavoError):
            raise word
        yield word
