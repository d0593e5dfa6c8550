"""Ray: the cluster that the ranks run in. Only this module, launch/ray_places.py and launch/rank_*.py import ray.

Ray places and starts the ranks; what they say to each other and to the coordinator goes over gRPC and NCCL or gloo.
"""

import atexit
import contextlib
import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from ..errors import OctavoError, UnavailableError
from .rank_actor import RankEndpoint, rank_variables
from .rank_group import RankGroup, SpareRank, await_endpoints, cause
from .rank_probe import RankLoss, find_lost_ranks
from .rank_spares import SpareRanks, SpareSettings
from .ray_places import bundle_of, num_that_fit, place, require_room
from .ray_processes import RayProcesses

# Read by a Ray that starts here. Its workers would run at nice 15, and wait for every other process of the machine.
# It would start one for each core beforehand, and ranks may be fewer.
_RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_prestart_worker_first_driver": "0",
}
_OBJECT_STORE_BYTES = 80 * 1024 * 1024  # about Ray's minimum; nothing of ours goes through it
_FREED_S = 3.0  # in which places that a group has just left are free
_ACTOR_STOP_TIMEOUT_S = 3.0
# An orderly end takes one to three seconds; a Ray that is broken would wait for a minute.
_SHUTDOWN_TIMEOUT_S = 10.0
_POLL_S = 0.1


class RayCluster:
    """A Ray that this process started, or joined; and the actors that it placed there, by worker group. Groups may be
    started, ended and mended by several threads at once, each by one."""

    def __init__(self, address: str | None, num_ranks: int, device: str, temp_dir: Path) -> None:
        """Joins the cluster at `address`; starts a local one with room for `num_ranks` if there is none.

        A local one keeps its files under `temp_dir`. Raises UnavailableError if the cluster does not answer.
        """
        self.is_local = address is None
        self._placements: list[PlacementGroup] = []  # in which no group has begun yet
        self._groups: dict[int, RankGroup] = {}
        self._lock = threading.Lock()  # of these two, and of what begins to run
        self._is_stopping = False
        self._freed_at = -_FREED_S  # when a group ended last
        self._spares: SpareRanks[SpareRank] | None = None
        self._processes = RayProcesses()
        self._is_ending = False  # Ray ends its processes
        self._is_ended = False
        # A Ray that the program around us uses already is not ours to shut down.
        self._owns_connection = not ray.is_initialized()
        if not self._owns_connection:
            self.is_local = False
            return
        with _own_sigterm_handler(), _environment(_RAY_SETTINGS), _cleaned_up_on_failure(self._processes):
            if address is None:
                # Workers inherit it. Asked by each actor, Ray would start a Python process for it that imports Ray
                # and then starts the worker: half a second for each rank.
                with _environment(rank_variables(device)):
                    self._start_local(num_ranks, device, temp_dir)
            else:
                self._join(address)
            self._processes.note_started()

    def _start_local(self, num_ranks: int, device: str, temp_dir: Path) -> None:
        try:
            ray.init(
                address="local",
                num_cpus=max(num_ranks, len(os.sched_getaffinity(0))),  # groups may come
                num_gpus=0 if device == "cpu" else None,
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=True,
                object_store_memory=_OBJECT_STORE_BYTES,
                _temp_dir=str(temp_dir),
            )
        except (RayError, RuntimeError, OSError) as error:
            raise UnavailableError(f"Ray did not start: {cause(error)}") from error

    def _join(self, address: str) -> None:
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=True)
        except (RayError, RuntimeError, OSError, ValueError) as error:
            raise UnavailableError(
                f"could not join the Ray cluster at {address}: {cause(error)}; check --ray-address, set "
                "RAY_AUTH_MODE=token if the cluster wants its token, or leave the option out to start a local one"
            ) from error

    @property
    def num_free_gpus(self) -> int:
        return int(ray.available_resources().get("GPU", 0))

    def num_free_ranks(self, device: str, wanted: int) -> int:
        """More that Ray has room for. Where that is less than `wanted`, places that a group has just left may still
        become free: that is waited for."""
        while (num_free := num_that_fit(bundle_of(device))) < wanted and time.monotonic() < self._freed_at + _FREED_S:
            time.sleep(_POLL_S)
        return num_free

    def start_groups(self, group_ids: Sequence[int], num_ranks: int, device: str) -> None:
        """Places and starts `num_ranks` ranks for each group. Nothing is left of them where one does not start.

        Raises FailedPreconditionError if the cluster has no room, UnavailableError if a rank's process does not start.
        """
        require_room(bundle_of(device), len(group_ids) * num_ranks)
        spares: list[SpareRank] = []

        def take_spare(node_id: str) -> SpareRank | None:
            if spare := self._take_spare(node_id):
                spares.append(spare)
            return spare

        try:
            self._start_groups(group_ids, num_ranks, device, take_spare)
        except UnavailableError:
            self.require_alive()
            if not spares:
                raise
            self._start_groups(group_ids, num_ranks, device, lambda node_id: None)

    def _start_groups(
        self, group_ids: Sequence[int], num_ranks: int, device: str, take_spare: Callable[[str], SpareRank | None]
    ) -> None:
        try:
            for _ in group_ids:
                self._placements.append(place(bundle_of(device), num_ranks))
            groups = self._begin_groups(group_ids, device, take_spare)
            started = await_endpoints([start for group in groups for start in group.starts], self.require_alive)
        except OctavoError:
            self._forget_start(group_ids)
            raise
        for index, group in enumerate(groups):
            group.endpoints = started[index * num_ranks :][:num_ranks]
        self._processes.note_descendants()

    def _begin_groups(
        self, group_ids: Sequence[int], device: str, take_spare: Callable[[str], SpareRank | None]
    ) -> list[RankGroup]:
        """In the places that were found. Raises UnavailableError when the server is ending."""
        nodes = [placement_group_table(placement)["bundles_to_node_id"] for placement in self._placements]
        spares = [[take_spare(group[rank]) for rank in range(len(group))] for group in nodes]
        num_on_node = self._num_ranks_on_nodes()
        num_on_node.update(node for group in nodes for node in group.values())
        with self._lock:
            self._require_going_on()
            for index, (group_id, group) in enumerate(zip(group_ids, nodes, strict=True)):
                num_beside = [num_on_node[group[rank]] for rank in range(len(group))]
                placement = self._placements.pop(0)
                self._groups[group_id] = RankGroup(placement, device, num_beside, self.is_local, spares[index])
            return [self._groups[group_id] for group_id in group_ids]

    def _num_ranks_on_nodes(self) -> Counter[str]:
        with self._lock:
            return Counter(endpoint.node_id for group in self._groups.values() for endpoint in group.endpoints)

    def _forget_start(self, group_ids: Sequence[int]) -> None:
        for group_id in group_ids:
            self.end_group(group_id)
        while self._placements:
            remove_placement_group(self._placements.pop())

    def end_group(self, group_id: int) -> None:
        """Ends a group's ranks and frees their places. There need not be such a group."""
        with self._lock:
            group = self._groups.pop(group_id, None)
            is_stopping = self._is_stopping
        if group is not None and not is_stopping:
            group.end_orderly(_ACTOR_STOP_TIMEOUT_S)
            self._freed_at = time.monotonic()

    def _require_going_on(self) -> None:
        """An actor that begins after Ray has ended would start another Ray."""
        if self._is_stopping:
            raise UnavailableError("the server is ending")

    def endpoints(self, group_id: int) -> Sequence[RankEndpoint]:
        """Where the ranks of a group listen now."""
        return list(self._groups[group_id].endpoints)

    def find_lost(self, group_id: int) -> dict[int, RankLoss]:
        """The group's ranks that give no sign of life."""
        return find_lost_ranks([endpoint.address for endpoint in self.endpoints(group_id)])

    def all_of(self, group_id: int) -> dict[int, RankLoss]:
        """All ranks of the group, to be replaced whether they live or not."""
        return dict.fromkeys(range(len(self.endpoints(group_id))), RankLoss.HANGS)

    def replace(self, group_id: int, lost: Mapping[int, RankLoss]) -> None:
        """Has new processes take the places of a group's lost ranks. Raises UnavailableError if one does not start."""
        self._require_going_on()
        self._groups[group_id].replace(lost, self.require_alive, self._take_spare)
        self._processes.note_descendants()

    # Spares

    def keep_spares(self, settings: SpareSettings, device: str, say: Callable[[str], None]) -> None:
        """Has processes ready, from now until `stop_spares`, that `start_groups` and
        `replace` then use. `say` shows a line."""
        self._spares = SpareRanks(settings, self._num_ranks_on_nodes, lambda node: self._start_spare(node, device), say)
        self._spares.start()

    def stop_spares(self) -> None:
        """Starts no more."""
        if self._spares is not None:
            self._spares.stop()

    def _start_spare(self, node_id: str, device: str) -> SpareRank:
        with self._lock:
            self.require_alive()
            return SpareRank(node_id, device, self.is_local)

    def _take_spare(self, node_id: str) -> SpareRank | None:
        return self._spares.take(node_id) if self._spares is not None else None

    def require_alive(self) -> None:
        """Raises UnavailableError if a process of the Ray that we started has ended, or ends: its calls would only
        wait."""
        self._require_going_on()
        self._processes.require_alive()

    def find_dead_rank(self) -> str | None:
        """Which rank's process has ended, and why, in one line; None if all answer."""
        for group_id, group in list(self._groups.items()):
            if dead := group.find_dead_rank():
                rank, how = dead
                return f"rank {rank} of group {group_id} {how}"
        return None

    def shut_down(self, hurry: threading.Event) -> None:
        """Stops the actors, then what of Ray is ours. `hurry` skips the ranks' own goodbye.

        What a broken Ray leaves is killed: never waits longer than a few seconds.
        """
        with self._lock:
            self._is_stopping = True
        orderly = threading.Thread(target=self._shut_down_orderly, args=(hurry,), name="ray shutdown", daemon=True)
        deadline = time.monotonic() + _SHUTDOWN_TIMEOUT_S
        if self._processes.is_intact:
            orderly.start()
        while orderly.is_alive() and time.monotonic() < deadline and (self._is_ending or self._processes.is_intact):
            orderly.join(_POLL_S)
        if not self._is_ended:
            atexit.unregister(ray.shutdown)  # would wait for the dead
        self._processes.kill()

    def _shut_down_orderly(self, hurry: threading.Event) -> None:
        if self._spares is not None:
            self._spares.end_all()
        groups = list(self._groups.values())
        actors = [actor for group in groups for actor in group.actors]
        if actors and not hurry.is_set():
            stops = [actor.stop.remote() for actor in actors]
            ray.wait(stops, num_returns=len(stops), timeout=_ACTOR_STOP_TIMEOUT_S)
        for group in groups:
            group.end()
        for placement in list(self._placements):
            remove_placement_group(placement)
        self._groups.clear()
        self._placements.clear()
        self._is_ending = True
        if self._owns_connection:
            ray.shutdown()
        self._is_ended = True


@contextlib.contextmanager
def _own_sigterm_handler() -> Iterator[None]:
    """Ray takes over SIGTERM when it starts; the program's own handler comes back, and gets what came meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    is_terminated = False
    try:
        yield
    except SystemExit:  # Ray's handler
        is_terminated = True
    finally:
        signal.signal(signal.SIGTERM, handler)
    if is_terminated:
        signal.raise_signal(signal.SIGTERM)


@contextlib.contextmanager
def _cleaned_up_on_failure(processes: RayProcesses) -> Iterator[None]:
    """A start that fails or is interrupted leaves processes that Ray itself forgets; they are ended here."""
    try:
        yield
    except BaseException:
        processes.note_started()
        ray.shutdown()
        processes.kill()
        raise


@contextlib.contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Sets variables that Ray reads when it starts, but for those that the user has set."""
    ours = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]
