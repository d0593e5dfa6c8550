"""Which worker groups there are: their numbers, their sizes, and the requests that have the coordinator build them.

The start, Recovery and the Scaler all go through here. A number is never given twice, so that a late word of a group
that has left means nobody else.
"""

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from ..errors import UnavailableError
from ..proto import admin_pb2, engine_pb2
from .config import ServeConfig
from .engine_control import CoordinatorLostError, EngineControl, GroupBlocks
from .process_configs import add_group_request
from .resolve import Placement, ServedModel

if TYPE_CHECKING:
    from .ray_cluster import RayCluster

_WATCH_S = 0.5


@dataclass(frozen=True, slots=True)
class GroupSettings:
    """What all groups have in common."""

    config: ServeConfig
    model: ServedModel
    placement: Placement


class Located(Protocol):
    """Where one rank listens, and runs."""

    @property
    def address(self) -> str: ...

    @property
    def node_id(self) -> str: ...


class WorkerGroups:
    """Owner of the groups' numbers and sizes; any thread may call."""

    def __init__(self, cluster: "RayCluster", control: EngineControl, settings: GroupSettings) -> None:
        self._cluster, self._control, self._settings = cluster, control, settings
        self._ids = itertools.count()
        self._sizes: dict[int, int] = {}  # ranks, by group
        self._lock = threading.Lock()

    @property
    def sizes(self) -> Mapping[int, int]:
        """Ranks of each group that has any, by its number."""
        with self._lock:
            return dict(self._sizes)

    @property
    def device(self) -> str:
        return self._settings.placement.device

    def check_size(self, num_ranks: int) -> None:
        """Raises InvalidArgumentError if the model cannot be sharded over so many ranks."""
        self._settings.model.config.validate_tensor_parallel(num_ranks)

    def num_free_ranks(self, wanted: int) -> int:
        """More that the cluster has room for; see RayCluster."""
        return self._cluster.num_free_ranks(self.device, wanted)

    def start_ranks(self, num_groups: int, num_ranks: int) -> list[int]:
        """Has the processes of new groups started; their numbers. Nothing is left of them where one does not start.

        Raises FailedPreconditionError if the cluster has no room, UnavailableError if a rank's process does not start.
        """
        group_ids = list(itertools.islice(self._ids, num_groups))
        self._cluster.start_groups(group_ids, num_ranks, self.device)
        with self._lock:
            self._sizes |= dict.fromkeys(group_ids, num_ranks)
        return group_ids

    def end(self, group_id: int) -> None:
        """Ends a group's processes and frees their places; the coordinator knows it no more."""
        with self._lock:
            del self._sizes[group_id]
        self._cluster.end_group(group_id)

    def add(self, group_id: int, report: Callable[[str, float], None]) -> GroupBlocks:
        """Has the coordinator take it in; as EngineControl.add_group. A rank that died meanwhile is named."""
        try:
            return self._control.add_group(self.request(group_id), report)
        except CoordinatorLostError:
            raise
        except UnavailableError as error:
            raise self.named(error) from error

    def add_all(
        self, report: Callable[[int, str, float], None], require_alive: Callable[[], None]
    ) -> Sequence[GroupBlocks]:
        """All that have ranks, at once. Raises the first error, and what `require_alive` raises meanwhile."""
        pool = ThreadPoolExecutor(len(self.sizes), "add group")
        try:
            adding = [pool.submit(self.add, group_id, partial(report, group_id)) for group_id in self.sizes]
            while wait(adding, _WATCH_S, FIRST_EXCEPTION).not_done:
                require_alive()
                if any(future.done() and future.exception() for future in adding):
                    break
            return [future.result() for future in sorted(adding, key=lambda future: not future.done())]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def named(self, error: UnavailableError) -> UnavailableError:
        """`error`, or the death of a rank that is behind it."""
        self._cluster.require_alive()
        cause = self._cluster.find_dead_rank()
        return UnavailableError(cause) if cause else error

    def request(self, group_id: int) -> engine_pb2.AddGroupRequest:
        """For the group's ranks as they are now, with those that they may have their weights from."""
        settings, ranks = self._settings, self._cluster.endpoints(group_id)
        request = add_group_request(group_id, settings.config, settings.model, settings.placement, ranks)
        for worker, source in zip(request.workers, self._weight_sources(group_id), strict=False):
            worker.weight_source = source
        return request

    def _weight_sources(self, group_id: int) -> list[str]:
        """By rank; none where no other group of that size serves, or nobody says whether one does."""
        sizes = self.sizes
        alike = [other for other in sizes if other != group_id and sizes[other] == sizes.get(group_id)]
        if not alike:
            return []
        serving = self._serving()
        candidates = [self._cluster.endpoints(other) for other in alike if other in serving]
        return nearest_source(self._cluster.endpoints(group_id), candidates)

    def _serving(self) -> set[int]:
        """None while there is no coordinator: ranks then read their weights from the files."""
        try:
            groups = self._control.status().groups
        except UnavailableError:
            return set()
        return {group.group_id for group in groups if group.state == admin_pb2.GROUP_STATE_READY}


def nearest_source(ranks: Sequence[Located], candidates: Sequence[Sequence[Located]]) -> list[str]:
    """Addresses of the group of which most ranks run on the nodes of `ranks`; of equals the first."""
    if not candidates:
        return []
    best = max(candidates, key=lambda group: sum(a.node_id == b.node_id for a, b in zip(ranks, group, strict=True)))
    return [rank.address for rank in best]
