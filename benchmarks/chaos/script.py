"""What goes wrong, and when: one fault a line, as `at 12.5 kill-rank group=0 rank=1`. See FAULT_KINDS."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ...errors import InvalidArgumentError


@dataclass(frozen=True, slots=True)
class FaultKind:
    """The arguments of one kind of fault. Groups are counted as GetStatus lists them, gateways and ranks from 0."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


_SECONDS = "seconds"  # the one argument that need not be whole

FAULT_KINDS: Mapping[str, FaultKind] = {
    "kill-rank": FaultKind(("group", "rank")),
    # With `seconds` it goes on by itself after that; without, it stays stopped until somebody ends it.
    "stop-rank": FaultKind(("group", "rank"), (_SECONDS,)),
    # One step of the rank raises.
    "raise": FaultKind(("group", "rank")),
    # One StepResult of rank 0 is lost, or comes twice: no other rank answers.
    "drop-reply": FaultKind(("group",)),
    "repeat-reply": FaultKind(("group",)),
    "kill-coordinator": FaultKind(),
    "stop-coordinator": FaultKind((_SECONDS,)),
    "kill-gateway": FaultKind(("gateway",)),
    # To so many groups; of so many ranks each, if that is given.
    "scale": FaultKind(("groups",), ("ranks",)),
    # SIGTERM to the launcher under load. The last of a script.
    "drain": FaultKind(),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the server that a script is for."""

    num_groups: int
    tensor_parallel_size: int
    num_gateways: int


@dataclass(frozen=True, slots=True)
class Fault:
    """One line of a script."""

    at_s: float  # after the load began; later if the server has not recovered from the one before
    kind: str
    arguments: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        words = [f"{name}={value:g}" for name, value in self.arguments.items()]
        return " ".join([f"at {self.at_s:g}", self.kind, *words])

    def number(self, name: str) -> int:
        return int(self.arguments[name])

    @property
    def seconds(self) -> float | None:
        return self.arguments.get(_SECONDS)


def parse_script(text: str) -> list[Fault]:
    """Faults in order of time; `#` begins a comment. Raises InvalidArgumentError naming the line."""
    faults: list[Fault] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if words := line.partition("#")[0].split():
            try:
                faults.append(_parse_fault(words))
            except ValueError as error:
                raise _refusal(f"line {number}: {error}") from error
    _check_order(faults)
    return faults


def _parse_fault(words: Sequence[str]) -> Fault:
    if len(words) < 3 or words[0] != "at":
        raise ValueError("a fault is written as: at SECONDS KIND name=number ...")
    kind = FAULT_KINDS.get(words[2])
    if kind is None:
        raise ValueError(f"{words[2]!r} is not a fault; known are {', '.join(FAULT_KINDS)}")
    arguments = dict(_parse_argument(word) for word in words[3:])
    if len(arguments) < len(words) - 3:
        raise ValueError(f"{words[2]} has an argument twice")
    if missing := [name for name in kind.required if name not in arguments]:
        raise ValueError(f"{words[2]} needs {' and '.join(f'{name}=' for name in missing)}")
    if unknown := [name for name in arguments if name not in (*kind.required, *kind.optional)]:
        raise ValueError(f"{words[2]} takes no {unknown[0]}=")
    return Fault(_parse_number(words[1], "the time"), words[2], arguments)


def _parse_argument(word: str) -> tuple[str, float]:
    name, equals, text = word.partition("=")
    if not equals:
        raise ValueError(f"{word!r} is not name=number")
    value = _parse_number(text, name)
    if name != _SECONDS and not value.is_integer():
        raise ValueError(f"{name} must be whole, got {text!r}")
    return name, value


def _parse_number(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{what} must be a number, got {text!r}") from None
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{what} must be 0 or more, got {text!r}")
    return value


def _check_order(faults: Sequence[Fault]) -> None:
    for before, fault in pairwise(faults):
        if fault.at_s < before.at_s:
            raise _refusal(f"{str(fault)!r} comes after {str(before)!r}; write faults in order of time")
        if before.kind == "drain":
            raise _refusal(f"{str(fault)!r} comes after drain, which ends the server")


def check_script(faults: Sequence[Fault], shape: Shape) -> None:
    """Raises InvalidArgumentError for a fault of what the server will not have then."""
    limits = {"group": shape.num_groups, "rank": shape.tensor_parallel_size, "gateway": shape.num_gateways}
    for fault in faults:
        for name, limit in limits.items():
            if name in fault.arguments and fault.number(name) >= limit:
                raise _refusal(f"{str(fault)!r}: the server has {limit} {name}(s) then, counted from 0")
        if fault.kind == "scale":
            if not all(fault.arguments.values()):
                raise _refusal(f"{str(fault)!r}: a server has at least 1 group of 1 rank")
            limits["group"] = fault.number("groups")
            limits["rank"] = int(fault.arguments.get("ranks", limits["rank"]))


def _refusal(reason: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"fault script: {reason}", "script")
