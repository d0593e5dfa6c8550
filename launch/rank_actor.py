"""One rank as a Ray actor: what runs in its process, and how Ray is asked for it.

Actors take and return plain strings and numbers only.
"""

import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from .library_logs import quiet_libraries
from .rank_process import kill_rank, wait_until_gone

if TYPE_CHECKING:
    from ..workers.server import WorkerServer

# A rank on the CPU claims little, so that a small machine may hold several; its threads share the cores fairly.
CPUS_PER_CPU_RANK = 0.25
_PREDECESSOR_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class RankEndpoint:
    """Where one rank listens."""

    address: str
    device: str
    store_address: str  # of rank 0; empty for the others
    process_id: int
    node_id: str  # as Ray names it


class RankActor:
    """Runs one rank in a process of its own, once it is told which."""

    def __init__(self) -> None:
        # torch's own calls of its deprecated functions; a rank's output is shown to the user.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        self._predecessor: tuple[int, str] | None = None
        self._server: WorkerServer | None = None

    def prepare(self, device_type: str) -> None:
        """For a spare: all that a start can find in place. `device_type` is "cuda" or "cpu"; no GPU is touched."""
        from ..workers.preparation import import_for

        import_for(device_type)

    def succeed(self, process_id: int, node_id: str) -> None:
        """Which process it takes the place of, and where that ran. `start` ends it first: a rank measures the memory
        that is free."""
        self._predecessor = process_id, node_id

    def start(self, rank: int, device: str, is_local: bool, num_ranks_on_node: int) -> tuple[str, str, str, int, str]:
        """Becomes a rank; the fields of its RankEndpoint.

        `device` is "cpu", "cuda" for the GPU that Ray chose, or one GPU by its index. On a cluster the node's address
        is used. Raises TimeoutError if the process does not end whose place this one takes.
        """
        from ..workers.server import WorkerServer

        node_id = ray.get_runtime_context().get_node_id()
        self._end_predecessor(node_id)
        own_device = assigned_gpu() if device == "cuda" else device
        self._server = WorkerServer(
            host="127.0.0.1" if is_local else ray.util.get_node_ip_address(),
            device=own_device,
            create_store=rank == 0,
            num_threads=max(1, len(os.sched_getaffinity(0)) // num_ranks_on_node),
            num_ranks_on_host=num_ranks_on_node,
        )
        endpoints = self._server.start()
        return endpoints.address, own_device, endpoints.store_address, os.getpid(), node_id

    def _end_predecessor(self, node_id: str) -> None:
        if self._predecessor is not None and self._predecessor[1] == node_id:
            process_id, _ = self._predecessor
            kill_rank(process_id)
            wait_until_gone(process_id, _PREDECESSOR_TIMEOUT_S)

    def ping(self) -> None:
        """Answers while its process lives."""

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()


def assigned_gpu() -> str:
    """The GPU that Ray gave this actor or task, as torch counts: all GPUs stay visible, so that ranks reach each
    other's."""
    [assigned] = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    index = visible.split(",").index(assigned) if visible else int(assigned)
    return f"cuda:{index}"


def actor_options(placement: PlacementGroup, rank: int, device: str, has_variables: bool) -> dict[str, Any]:
    """`has_variables`: whether Ray itself runs with `rank_variables`, so that its workers do."""
    claims = {"num_cpus": 0, "num_gpus": 1} if device == "cuda" else {"num_cpus": CPUS_PER_CPU_RANK}
    return {
        **claims,
        "runtime_env": None if has_variables else {"env_vars": rank_variables(device)},
        "scheduling_strategy": PlacementGroupSchedulingStrategy(placement, rank),
    }


def spare_options(node_id: str, device: str, has_variables: bool) -> dict[str, Any]:
    """It claims nothing: the rank whose place it takes has left its own to the group."""
    return {
        "num_cpus": 0,
        "num_gpus": 0,
        "runtime_env": None if has_variables else {"env_vars": rank_variables(device)},
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False),
    }


def rank_variables(device: str) -> dict[str, str]:
    """For the environment of a rank."""
    if device == "cuda":
        # Peer-to-peer copies need to see the neighbours' GPUs; each rank names its own.
        return quiet_libraries() | {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
    # OpenMP threads that spin while they wait take the cores from the coordinator and the gateways. Measured with 2
    # threads on 2 busy cores, 64 decodes of a 6.5 M-parameter model: a step took 169 ms so, 38 ms without.
    return quiet_libraries() | {"OMP_WAIT_POLICY": "passive"}
