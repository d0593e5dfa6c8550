"""Ray: the cluster that the ranks run in, and one actor for each. The only module that imports ray.

Ray places and starts the ranks; what they say to each other and to the coordinator goes over gRPC and NCCL or gloo.
Actors take and return plain strings and numbers only.
"""

import atexit
import contextlib
import logging
import os
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..errors import FailedPreconditionError, OctavoError, UnavailableError
from .ray_processes import RayProcesses

# A rank on the CPU claims little, so that a small machine may hold several; its threads share the cores fairly.
_CPUS_PER_CPU_RANK = 0.25
# Read by a Ray that starts here. Its workers would run at nice 15, and wait for every other process of the machine.
_RAY_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
_OBJECT_STORE_BYTES = 80 * 1024 * 1024  # about Ray's minimum; nothing of ours goes through it
_PLACEMENT_TIMEOUT_S = 30.0
_STRICT_PLACEMENT_TIMEOUT_S = 5.0
_ACTOR_START_TIMEOUT_S = 300.0  # a first import of torch from a cold network disk takes minutes
_ACTOR_STOP_TIMEOUT_S = 3.0
_PING_TIMEOUT_S = 2.0
# An orderly end takes one to three seconds; a Ray that is broken would wait for a minute.
_SHUTDOWN_TIMEOUT_S = 10.0
_POLL_S = 0.1
_WATCH_S = 0.5


@dataclass(frozen=True, slots=True)
class RankEndpoint:
    """Where one rank listens."""

    address: str
    device: str
    store_address: str  # of rank 0; empty for the others


class RankActor:
    """Runs one rank in a process of its own."""

    def __init__(self, rank: int, device: str, is_local: bool, num_ranks_on_node: int) -> None:
        """`device` is "cuda" or "cpu"; of a cluster's GPUs Ray chooses one. On a cluster the node's address is used."""
        # torch's own calls of its deprecated functions; a rank's output is shown to the user.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        from ..workers.server import WorkerServer

        self._device = _assigned_gpu() if device == "cuda" else device
        self._server = WorkerServer(
            host="127.0.0.1" if is_local else ray.util.get_node_ip_address(),
            device=self._device,
            create_store=rank == 0,
            num_threads=max(1, len(os.sched_getaffinity(0)) // num_ranks_on_node),
            num_ranks_on_host=num_ranks_on_node,
        )

    def start(self) -> tuple[str, str, str]:
        """Its address, its device, and the store's address."""
        endpoints = self._server.start()
        return endpoints.address, self._device, endpoints.store_address

    def ping(self) -> int:
        """The process id."""
        return os.getpid()

    def stop(self) -> None:
        self._server.stop()


def _assigned_gpu() -> str:
    """The GPU that Ray gave this actor, as torch counts: all GPUs stay visible, so that ranks reach each other's."""
    [assigned] = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    index = visible.split(",").index(assigned) if visible else int(assigned)
    return f"cuda:{index}"


class RayCluster:
    """A Ray that this process started, or joined; and the actors that it placed there."""

    def __init__(self, address: str | None, num_ranks: int, device: str, temp_dir: Path) -> None:
        """Joins the cluster at `address`; starts a local one of `num_ranks` places if there is none.

        A local one keeps its files under `temp_dir`. Raises UnavailableError if the cluster does not answer.
        """
        self.is_local = address is None
        self._placements: list[PlacementGroup] = []
        self._groups: list[list[Any]] = []  # actors by group and rank
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
                self._start_local(num_ranks, device, temp_dir)
            else:
                self._join(address)
            self._processes.note_started()

    def _start_local(self, num_ranks: int, device: str, temp_dir: Path) -> None:
        try:
            ray.init(
                address="local",
                num_cpus=num_ranks,
                num_gpus=0 if device == "cpu" else None,
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=True,
                object_store_memory=_OBJECT_STORE_BYTES,
                _temp_dir=str(temp_dir),
            )
        except (RayError, RuntimeError, OSError) as error:
            raise UnavailableError(f"Ray did not start: {_cause(error)}") from error

    def _join(self, address: str) -> None:
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=True)
        except (RayError, RuntimeError, OSError, ValueError) as error:
            raise UnavailableError(
                f"could not join the Ray cluster at {address}: {_cause(error)}; check --ray-address, set "
                "RAY_AUTH_MODE=token if the cluster wants its token, or leave the option out to start a local one"
            ) from error

    @property
    def num_free_gpus(self) -> int:
        return int(ray.available_resources().get("GPU", 0))

    def start_groups(self, num_groups: int, num_ranks: int, device: str) -> list[list[RankEndpoint]]:
        """Places and starts `num_ranks` ranks for each group; where they listen, by group and rank.

        Raises FailedPreconditionError if the cluster has no room, UnavailableError if a rank's process does not start.
        """
        bundle = {"GPU": 1.0} if device == "cuda" else {"CPU": _CPUS_PER_CPU_RANK}
        _require_room(bundle, num_groups * num_ranks)
        for _ in range(num_groups):
            self._placements.append(_place(bundle, num_ranks))
        nodes = [placement_group_table(placement)["bundles_to_node_id"] for placement in self._placements]
        num_on_node = Counter(node for group in nodes for node in group.values())
        for placement, group in zip(self._placements, nodes, strict=True):
            self._groups.append(
                [self._start_actor(placement, rank, device, num_on_node[group[rank]]) for rank in range(num_ranks)]
            )
        endpoints = _await_endpoints(self._groups, self.require_alive)
        self._processes.note_descendants()
        return endpoints

    def _start_actor(self, placement: PlacementGroup, rank: int, device: str, num_ranks_on_node: int) -> Any:  # noqa: ANN401 (an actor handle)
        actor_class = ray.remote(RankActor).options(**_actor_options(placement, rank, device))
        return actor_class.remote(rank, device, self.is_local, num_ranks_on_node)

    def require_alive(self) -> None:
        """Raises UnavailableError if a process of the Ray that we started has ended: its calls would only wait."""
        self._processes.require_alive()

    def find_dead_rank(self) -> str | None:
        """Which rank's process has ended, and why, in one line; None if all answer."""
        for group_id, actors in enumerate(self._groups):
            for rank, actor in enumerate(actors):
                try:
                    ray.get(actor.ping.remote(), timeout=_PING_TIMEOUT_S)
                except RayActorError as error:
                    return f"rank {rank} of group {group_id} died: {_cause(error)}"
                except GetTimeoutError:
                    return f"rank {rank} of group {group_id} does not answer"
        return None

    def shut_down(self, hurry: threading.Event) -> None:
        """Stops the actors, then what of Ray is ours. `hurry` skips the ranks' own goodbye.

        What a broken Ray leaves is killed: never waits longer than a few seconds.
        """
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
        actors = [actor for group in self._groups for actor in group]
        if actors and not hurry.is_set():
            stops = [actor.stop.remote() for actor in actors]
            ray.wait(stops, num_returns=len(stops), timeout=_ACTOR_STOP_TIMEOUT_S)
        for actor in actors:
            ray.kill(actor)
        for placement in self._placements:
            remove_placement_group(placement)
        self._groups.clear()
        self._placements.clear()
        self._is_ending = True
        if self._owns_connection:
            ray.shutdown()
        self._is_ended = True


def _await_endpoints(groups: Sequence[Sequence[Any]], require_alive: Callable[[], None]) -> list[list[RankEndpoint]]:
    starts = [[actor.start.remote() for actor in actors] for actors in groups]
    pending = [start for group in starts for start in group]
    deadline = time.monotonic() + _ACTOR_START_TIMEOUT_S
    try:
        while pending:
            done, pending = ray.wait(pending, timeout=_WATCH_S)
            ray.get(done)
            require_alive()
            if time.monotonic() > deadline:
                raise UnavailableError(f"the ranks did not start within {_ACTOR_START_TIMEOUT_S:.0f} s")
        return [[RankEndpoint(*ray.get(start)) for start in group] for group in starts]
    except RayError as error:
        raise UnavailableError(f"a rank did not start: {_cause(error)}") from error


def _place(bundle: dict[str, float], num_ranks: int) -> PlacementGroup:
    """On one node if any has room, else on as few as possible."""
    strategies = [("PACK", _PLACEMENT_TIMEOUT_S)]
    if any(_fits(node, bundle, num_ranks) for node in ray.nodes()):
        strategies.insert(0, ("STRICT_PACK", _STRICT_PLACEMENT_TIMEOUT_S))
    for strategy, timeout_s in strategies:
        placement: PlacementGroup = placement_group([bundle] * num_ranks, strategy=strategy)
        if placement.wait(timeout_s):
            return placement
        remove_placement_group(placement)
    raise _no_room(bundle, num_ranks)


def _fits(node: dict[str, Any], bundle: dict[str, float], num_ranks: int) -> bool:
    return bool(node["Alive"]) and all(
        node["Resources"].get(name, 0) >= amount * num_ranks for name, amount in bundle.items()
    )


def _require_room(bundle: dict[str, float], num_ranks: int) -> None:
    free = ray.available_resources()
    if any(free.get(name, 0) < amount * num_ranks for name, amount in bundle.items()):
        raise _no_room(bundle, num_ranks)


def _no_room(bundle: dict[str, float], num_ranks: int) -> OctavoError:
    free = ray.available_resources()
    needs = ", ".join(f"{amount * num_ranks:g} {name}" for name, amount in bundle.items())
    has = ", ".join(f"{free.get(name, 0):g}" for name in bundle)
    return FailedPreconditionError(
        f"Ray has no room for {num_ranks} rank(s): they need {needs}, and {has} is free; lower "
        "--tensor-parallel-size or --num-groups, or add nodes"
    )


def _actor_options(placement: PlacementGroup, rank: int, device: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "num_cpus": 0 if device == "cuda" else _CPUS_PER_CPU_RANK,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(placement, rank),
    }
    if device == "cuda":
        options["num_gpus"] = 1
        # Peer-to-peer copies need to see the neighbours' GPUs; each rank names its own.
        options["runtime_env"] = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}
    else:
        # OpenMP threads that spin while they wait take the cores from the coordinator and the gateways. Measured with
        # 2 threads on 2 busy cores, 64 decodes of a 6.5 M-parameter model: a step took 169 ms so, 38 ms without.
        options["runtime_env"] = {"env_vars": {"OMP_WAIT_POLICY": "passive"}}
    return options


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


def _cause(error: BaseException) -> str:
    """The line that says what happened: Ray appends the rank's own traceback, which ends with it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    detail = lines[-1].rpartition("Worker exit detail: ")[2]
    return detail.partition(" Some common causes")[0]
