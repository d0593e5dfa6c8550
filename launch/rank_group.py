"""The Ray actors of one worker group, in the places that Ray gave it."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..errors import UnavailableError
from .rank_actor import RankActor, RankEndpoint, actor_options, assigned_gpu, spare_options
from .rank_probe import RankLoss
from .rank_process import kill_rank
from .rank_spares import SpareCondition

_ACTOR_START_TIMEOUT_S = 300.0  # a first import of torch from a cold network disk takes minutes
_PING_TIMEOUT_S = 2.0
_KILL_TIMEOUT_S = 10.0
_WATCH_S = 0.5


class RankGroup:
    """Owner of a group's placement and of one actor for each of its ranks."""

    def __init__(
        self,
        placement: PlacementGroup,
        device: str,
        num_ranks_on_node: Sequence[int],
        is_local: bool,
        spares: Sequence["SpareRank | None"] = (),
    ) -> None:
        """Begins to start the actors. `num_ranks_on_node`: by rank, those of all groups beside it. `is_local`: whether
        they run in a Ray that this program started, on this machine. `spares`: by rank, a process on its node that
        becomes the rank."""
        self._placement, self._device, self._is_local = placement, device, is_local
        self._num_ranks_on_node = num_ranks_on_node
        self.endpoints: list[RankEndpoint] = []
        by_rank = dict(enumerate(spares))
        ranks = range(len(num_ranks_on_node))
        self.actors = [spare.actor if (spare := by_rank.get(rank)) else self._new_actor(rank) for rank in ranks]
        # For `await_endpoints`.
        self.starts = [
            self._start(rank, self._device_in_place(rank) if by_rank.get(rank) else device) for rank in ranks
        ]

    def _device_in_place(self, rank: int) -> Any:  # noqa: ANN401 (Ray's future, or a device)
        """For an actor that is not in the rank's place itself."""
        if self._device != "cuda":
            return self._device
        return ray.remote(assigned_gpu).options(**self._options(rank)).remote()

    def _new_actor(self, rank: int) -> Any:  # noqa: ANN401 (an actor handle)
        return _new_actor(self._options(rank))

    def _options(self, rank: int) -> dict[str, Any]:
        return actor_options(self._placement, rank, self._device, has_variables=self._is_local)

    def _start(self, rank: int, device: Any) -> Any:  # noqa: ANN401 (Ray's futures)
        return self.actors[rank].start.remote(rank, device, self._is_local, self._num_ranks_on_node[rank])

    def replace(
        self,
        lost: Mapping[int, RankLoss],
        require_alive: Callable[[], None],
        take_spare: Callable[[str], "SpareRank | None"],
    ) -> None:
        """Has other processes take the places of the lost ranks: spare ones of their nodes, by `take_spare(node_id)`,
        or new ones. Raises UnavailableError if one does not start."""
        spares = {rank: take_spare(self.endpoints[rank].node_id) for rank in lost}
        starts = [self._start_instead(rank, loss, spares[rank]) for rank, loss in lost.items()]
        try:
            started = await_endpoints(starts, require_alive)
        except UnavailableError:
            require_alive()
            if not any(spares.values()):
                raise
            self.replace(lost, require_alive, lambda node_id: None)
            return
        for rank, endpoint in zip(lost, started, strict=True):
            self.endpoints[rank] = endpoint

    def _start_instead(self, rank: int, loss: RankLoss, spare: "SpareRank | None") -> Any:  # noqa: ANN401 (Ray's future)
        lost = self.endpoints[rank]
        ray.kill(self.actors[rank])
        if spare is None and loss is RankLoss.HANGS:
            self._kill_process(lost)  # or Ray keeps its place for it
        self.actors[rank] = self._new_actor(rank) if spare is None else spare.actor
        # Ray counts the place of a rank that was a spare as free while that one still ends.
        self.actors[rank].succeed.remote(lost.process_id, lost.node_id)
        return self._start(rank, self._device if spare is None else lost.device)

    def _kill_process(self, endpoint: RankEndpoint) -> None:
        """Ray asks a process to end, which one that is stopped never hears."""
        if self._is_local:
            kill_rank(endpoint.process_id)
            return
        on_its_node = NodeAffinitySchedulingStrategy(endpoint.node_id, soft=False)
        kill = ray.remote(num_cpus=0)(kill_rank).options(scheduling_strategy=on_its_node)
        with contextlib.suppress(RayError):  # the node is gone, and the process with it
            ray.get(kill.remote(endpoint.process_id), timeout=_KILL_TIMEOUT_S)

    def find_dead_rank(self) -> tuple[int, str] | None:
        """Which rank's process has ended, and how; None if all answer."""
        for rank, actor in enumerate(self.actors):
            try:
                ray.get(actor.ping.remote(), timeout=_PING_TIMEOUT_S)
            except RayActorError as error:
                return rank, f"died: {cause(error)}"
            except GetTimeoutError:
                return rank, "does not answer"
        return None

    def end_orderly(self, timeout_s: float) -> None:
        """Lets the ranks end their own work; a process that does not is killed."""
        stops = [actor.stop.remote() for actor in self.actors]
        ended, _ = ray.wait(stops, num_returns=len(stops), timeout=timeout_s)
        self.end()
        for endpoint, stop in zip(self.endpoints, stops, strict=False):  # one that never started listens nowhere
            if stop not in ended:
                self._kill_process(endpoint)

    def end(self) -> None:
        """Without a goodbye."""
        for actor in self.actors:
            ray.kill(actor)
        remove_placement_group(self._placement)


def _new_actor(options: Mapping[str, Any]) -> Any:  # noqa: ANN401 (an actor handle)
    return ray.remote(RankActor).options(**options).remote()


class SpareRank:
    """A process that is no rank yet, on the node of ranks of ours."""

    def __init__(self, node_id: str, device: str, is_local: bool) -> None:
        """Begins to start it."""
        self.actor = _new_actor(spare_options(node_id, device, has_variables=is_local))
        self._prepared = self.actor.prepare.remote(device)

    def condition(self) -> SpareCondition:
        try:
            is_prepared, _ = ray.wait([self._prepared], timeout=0)
            if not is_prepared:
                return SpareCondition.BUSY
            ray.get([self._prepared, self.actor.ping.remote()], timeout=_PING_TIMEOUT_S)
        except GetTimeoutError:
            return SpareCondition.BUSY
        except RayError:
            return SpareCondition.DEAD
        return SpareCondition.READY

    def end(self) -> None:
        ray.kill(self.actor)


def await_endpoints(starts: Sequence[Any], require_alive: Callable[[], None]) -> list[RankEndpoint]:
    """Until the actors serve, by what their `start` gave; where they listen. Raises UnavailableError if one does not
    start, and what `require_alive` raises meanwhile."""
    pending = list(starts)
    deadline = time.monotonic() + _ACTOR_START_TIMEOUT_S
    try:
        while pending:
            done, pending = ray.wait(pending, timeout=_WATCH_S)
            ray.get(done)
            require_alive()
            if time.monotonic() > deadline:
                raise UnavailableError(f"the ranks did not start within {_ACTOR_START_TIMEOUT_S:.0f} s")
        return [RankEndpoint(*ray.get(start)) for start in starts]
    except RayError as error:
        raise UnavailableError(f"a rank did not start: {cause(error)}") from error


def cause(error: BaseException) -> str:
    """The line that says what happened: Ray appends the rank's own traceback, which ends with it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    detail = lines[-1].rpartition("Worker exit detail: ")[2]
    return detail.partition(" Some common causes")[0]
