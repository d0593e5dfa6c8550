"""A script of random faults: the same one for the same seed, so that a run can be had again."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import InvalidArgumentError
from .script import FAULT_KINDS, Fault, Shape

_CALM_S = 5.0  # of load before the first fault
# A rank that is stopped for shorter than the server's step timeout is not missed, one for longer is replaced.
_STOP_FACTORS = (0.2, 0.5, 1.2)  # of that timeout
_COORDINATOR_STOPS = (3.0, None)  # seconds, shorter than what the launcher takes for a hang; for good


@dataclass(frozen=True, slots=True)
class RandomFaults:
    """What to draw from."""

    kinds: Sequence[str]
    duration_s: float
    interval_s: float  # between two faults, in the mean
    step_timeout_s: float
    seed: int

    def __post_init__(self) -> None:
        if unknown := [kind for kind in self.kinds if kind not in FAULT_KINDS]:
            raise InvalidArgumentError(f"--faults takes {', '.join(FAULT_KINDS)}; got {unknown[0]!r}", "faults")
        if not self.interval_s > 0:
            raise InvalidArgumentError(f"interval must be over 0 seconds, got {self.interval_s}", "interval")


def make_script(wanted: RandomFaults, shape: Shape) -> list[Fault]:
    """Faults until `duration_s`; the kinds come equally often, and drain at the end if it is wanted."""
    rng = random.Random(wanted.seed)  # noqa: S311 (no secret)
    drawn = [kind for kind in wanted.kinds if kind != "drain"]
    faults: list[Fault] = []
    bag: list[str] = []
    num_groups, at_s = shape.num_groups, _CALM_S
    while drawn and at_s < wanted.duration_s:
        bag = bag or rng.sample(drawn, len(drawn))
        here = Shape(num_groups, shape.tensor_parallel_size, shape.num_gateways)
        fault = _draw(bag.pop(), round(at_s, 1), here, wanted.step_timeout_s, rng)
        if fault.kind == "scale":
            num_groups = fault.number("groups")
        faults.append(fault)
        at_s += rng.uniform(0.5, 1.5) * wanted.interval_s
    if "drain" in wanted.kinds:
        faults.append(Fault(max([wanted.duration_s, *(fault.at_s for fault in faults)]), "drain"))
    return faults


def _draw(kind: str, at_s: float, shape: Shape, step_timeout_s: float, rng: random.Random) -> Fault:
    limits = {"group": shape.num_groups, "rank": shape.tensor_parallel_size, "gateway": shape.num_gateways}
    arguments: dict[str, float] = {
        name: rng.randrange(limit) for name, limit in limits.items() if name in FAULT_KINDS[kind].required
    }
    if kind == "scale":
        arguments["groups"] = _other_than(shape.num_groups, rng)
    if kind == "stop-coordinator" and (seconds := rng.choice(_COORDINATOR_STOPS)) is not None:
        arguments["seconds"] = seconds
    if kind == "stop-rank" and step_timeout_s:
        factor = rng.choice((*_STOP_FACTORS, None))
        arguments |= {} if factor is None else {"seconds": factor * step_timeout_s}
    return Fault(at_s, kind, arguments)


def _other_than(num_groups: int, rng: random.Random) -> int:
    """One more or one less, of one to three."""
    return rng.choice([number for number in (num_groups - 1, num_groups + 1) if 1 <= number <= 3] or [1])
