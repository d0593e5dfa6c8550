"""Memory and file descriptors of a server's processes over time, and whether they grow."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import psutil

from .server import ChaosServer

_INTERVAL_S = 2.0
KINDS = ("launcher", "coordinator", "gateway", "rank", "ray")
# What may come on top between the first and the last third of a run: caches fill, allocators keep what they had.
_GROWTH = 0.10
_FREE_MIB, _FREE_FDS = 32.0, 16.0
# Ray's log monitor keeps logs of dead workers open, up to 200; the mean is over its seven processes.
_RAY_FREE_FDS = 45.0
JUDGED_FROM_S = 300.0  # a shorter run is mostly warm-up


@dataclass(frozen=True, slots=True)
class Sample:
    """Of all processes of a kind at one moment."""

    at_s: float  # since the first
    num_processes: int
    uss_mib: float  # unique set size of a process, in the mean
    num_fds: float  # of a process, in the mean


@dataclass(frozen=True, slots=True)
class Trend:
    """Medians of the first and of the last third of a run."""

    first_uss_mib: float
    last_uss_mib: float
    first_fds: float
    last_fds: float

    def is_flat(self, kind: str) -> bool:
        free_fds = _RAY_FREE_FDS if kind == "ray" else _FREE_FDS
        return (
            self.last_uss_mib <= self.first_uss_mib * (1 + _GROWTH) + _FREE_MIB
            and self.last_fds <= self.first_fds * (1 + _GROWTH) + free_fds
        )


def trend_of(samples: Sequence[Sample]) -> Trend | None:
    """None for fewer than three samples."""
    third = len(samples) // 3
    if not third:
        return None
    first, last = samples[:third], samples[-third:]
    return Trend(
        median(sample.uss_mib for sample in first),
        median(sample.uss_mib for sample in last),
        median(sample.num_fds for sample in first),
        median(sample.num_fds for sample in last),
    )


class ResourceLog:
    """Looks every few seconds while `run` runs."""

    def __init__(self, server: ChaosServer) -> None:
        self.samples: dict[str, list[Sample]] = {kind: [] for kind in KINDS}
        self._server = server

    async def run(self) -> None:
        started = time.monotonic()
        while True:
            taken = await asyncio.to_thread(self._look, time.monotonic() - started)
            for kind, sample in taken.items():
                self.samples[kind].append(sample)
            await asyncio.sleep(_INTERVAL_S)

    def _look(self, at_s: float) -> dict[str, Sample]:
        sizes: dict[str, list[tuple[float, int]]] = {}
        for process, kind in self._server.family().items():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # it ends while we look
                size = process.memory_full_info().uss / 2**20, process.num_fds()
                sizes.setdefault(kind, []).append(size)
        return {
            kind: Sample(
                at_s,
                len(found),
                sum(uss_mib for uss_mib, _ in found) / len(found),
                sum(num_fds for _, num_fds in found) / len(found),
            )
            for kind, found in sizes.items()
        }
