"""The clients of a served system, in a process of their own: `python -m octavo.benchmarks.load_client < SPEC.json`.

Sends each request at its time, reads the streams, notes when tokens come, and writes the observations to stdout as
JSON.
"""

import asyncio
import os
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import orjson
import uvloop

from ..errors import InvalidArgumentError, OctavoError
from .grpc_door import GrpcDoor
from .http_door import HttpDoor
from .observation import Clock, Observation
from .workload import LengthRange, Workload, poisson_arrivals

DOORS = ("http", "grpc")
_SPARE_FILES = 64  # file descriptors besides one for each request


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """What to ask of whom. Prompts and arrivals follow from the seed."""

    door: str  # one of DOORS
    target: str  # http://HOST:PORT, or an address as gRPC writes it
    model: str  # empty: the only one served
    vocab_size: int
    num_prompts: int
    input_len: str  # as LengthRange.parse
    output_len: int
    requests_per_s: float | None  # None: all at once
    seed: int

    def __post_init__(self) -> None:
        if self.door not in DOORS:
            raise InvalidArgumentError(f"door takes {' or '.join(DOORS)}, got {self.door!r}", "door")

    def workload(self) -> Workload:
        return Workload(self.num_prompts, LengthRange.parse(self.input_len, "input_len"), self.output_len, self.seed)

    def arrivals(self) -> list[float]:
        rate = float("inf") if self.requests_per_s is None else self.requests_per_s
        return poisson_arrivals(self.num_prompts, rate, self.seed)


class Door(Protocol):
    """A way in."""

    async def generate(self, prompt: Sequence[int], output_len: int, observation: Observation) -> None: ...

    async def close(self) -> None: ...


def run_load(spec: LoadSpec) -> list[Observation]:
    """Blocks until every request has ended."""
    _allow_connections(spec.num_prompts)
    return uvloop.run(_run_load(spec))


async def _run_load(spec: LoadSpec) -> list[Observation]:
    prompts, arrivals = spec.workload().prompts(spec.vocab_size), spec.arrivals()
    started = time.perf_counter()
    door = _open_door(spec, lambda: time.perf_counter() - started)
    observations = [Observation(arrival_s) for arrival_s in arrivals]
    async with asyncio.TaskGroup() as group:
        for prompt, observation in zip(prompts, observations, strict=True):
            group.create_task(_send(door, prompt, spec.output_len, observation, started))
    await door.close()
    return observations


async def _send(door: Door, prompt: Sequence[int], output_len: int, observation: Observation, started: float) -> None:
    """The request's time counts from when it was due, so that a late client cannot make the server look fast."""
    await asyncio.sleep(max(0.0, observation.sent_at_s - (time.perf_counter() - started)))
    try:
        await door.generate(prompt, output_len, observation)
    except OctavoError as error:
        observation.error = str(error)
    observation.finished_at_s = time.perf_counter() - started


def _open_door(spec: LoadSpec, now: Clock) -> Door:
    opener = HttpDoor if spec.door == "http" else GrpcDoor
    return opener(spec.target, spec.model, now)


def _allow_connections(num_requests: int) -> None:
    """HTTP takes a file descriptor for each request."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_requests + _SPARE_FILES
    if hard not in (resource.RLIM_INFINITY,) and wanted > hard:
        raise InvalidArgumentError(f"num_prompts {num_requests} needs more open files than this system allows ({hard})")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def main() -> None:
    spec = LoadSpec(**orjson.loads(sys.stdin.buffer.read()))
    observations = orjson.dumps([asdict(observation) for observation in run_load(spec)])
    # With PYTHONUNBUFFERED a write to sys.stdout may write a part only, and say so where nobody looks.
    os.set_blocking(sys.stdout.fileno(), True)
    with open(sys.stdout.fileno(), "wb", closefd=False) as out:
        out.write(observations)


if __name__ == "__main__":
    main()
