"""Places for ranks: what Ray has room for, and where a group's ranks go."""

from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from ..errors import FailedPreconditionError, OctavoError
from .rank_actor import CPUS_PER_CPU_RANK

_PLACEMENT_TIMEOUT_S = 30.0
_STRICT_PLACEMENT_TIMEOUT_S = 5.0


def bundle_of(device: str) -> dict[str, float]:
    """What one rank claims."""
    return {"GPU": 1.0} if device == "cuda" else {"CPU": CPUS_PER_CPU_RANK}


def num_that_fit(bundle: dict[str, float]) -> int:
    free = ray.available_resources()
    return min(int(free.get(name, 0) / amount + 1e-6) for name, amount in bundle.items())


def place(bundle: dict[str, float], num_ranks: int) -> PlacementGroup:
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


def require_room(bundle: dict[str, float], num_ranks: int) -> None:
    if num_that_fit(bundle) < num_ranks:
        raise _no_room(bundle, num_ranks)


def _no_room(bundle: dict[str, float], num_ranks: int) -> OctavoError:
    free = ray.available_resources()
    needs = ", ".join(f"{amount * num_ranks:g} {name}" for name, amount in bundle.items())
    has = ", ".join(f"{free.get(name, 0):g}" for name in bundle)
    return FailedPreconditionError(
        f"Ray has no room for {num_ranks} rank(s): they need {needs}, and {has} is free; lower "
        "--tensor-parallel-size or --num-groups, or add nodes"
    )
