"""KV blocks in the host's memory: saved from the device and loaded back beside the steps.

A block lies in one piece there, [num_groups, words] as in workers/block_rows.py. On its way it passes through a small
buffer on the device, so that what crosses the bus is contiguous.
"""

import threading
import time
import weakref
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from .host_memory import host_memory, unpin
from .kv_cache import KVCache
from .plan import BlockMoves, Plan
from .transfer_stream import TransferStream

# Blocks are gathered by so many bytes at a time: enough for a bus's full speed, and gone from a GPU's memory in tens of
# microseconds, so that steps are hardly held up.
_STAGING_BYTES = 32 * 1024 * 1024
_MEASURED_BLOCKS = 32
_NUM_ROUNDS = 4
_NO_STEP = 0  # steps count from 1


class HostTier:
    """Owner of a rank's host blocks. Belongs to the device thread, but for `finished`."""

    def __init__(self, cache: KVCache, num_blocks: int, staging_bytes: int = _STAGING_BYTES) -> None:
        """Raises ResourceExhaustedError if the host's memory cannot be pinned."""
        self.num_blocks = num_blocks
        self._rows = cache.rows
        self._staging = self._rows.buffer(max(1, staging_bytes // self._rows.block_bytes))
        self._transfers = TransferStream(cache.device)
        memory = host_memory(num_blocks * self._rows.block_bytes, cache.device)
        if cache.device.type == "cuda":
            release = weakref.finalize(self, _release, self._transfers, memory, cache.device)
            release.atexit = False  # the end of the process frees it all
        self._host = memory.view(self._staging.dtype).view(num_blocks, *self._staging.shape[1:])

    def apply(self, plan: Plan) -> None:
        """Queues the plan's transfers, saves before loads, and has its step wait for those that it counts on.

        Raises FailedPreconditionError for blocks that are not there.
        """
        self._transfers.note_step(plan.step_id)
        self._transfers.hold_steps(plan.finished_transfers)
        if not len(plan.saves) and not len(plan.loads):
            return
        plan.saves.check(self._rows.num_blocks, self.num_blocks)
        plan.loads.check(self.num_blocks, self._rows.num_blocks)
        with self._transfers.behind_steps(plan.step_id):
            self._save(plan.saves)
            self._load(plan.loads)

    def finished(self, awaited: int = 0) -> int:
        """As TransferStream.finished."""
        return self._transfers.finished(awaited)

    def wait(self) -> None:
        """Until all transfers that are queued have ended; for any thread."""
        self._transfers.wait()

    def measure_block_us(self) -> float:
        """How long a block takes on its way, the mean of both directions. Leaves the device's blocks as they are."""
        ids = np.arange(min(_MEASURED_BLOCKS, self.num_blocks, self._rows.num_blocks), dtype=np.int32)
        # The first round loads what libraries load late.
        duration_s = min(self._time_round_trip(BlockMoves(ids, ids)) for _ in range(_NUM_ROUNDS))
        return duration_s * 1e6 / (2 * len(ids))

    def _time_round_trip(self, moves: BlockMoves) -> float:
        started_at = time.perf_counter()
        with self._transfers.behind_steps(_NO_STEP):
            self._save(moves)
            self._load(moves)
        self._transfers.wait()
        return time.perf_counter() - started_at

    def _save(self, saves: BlockMoves) -> None:
        for indices, runs in self._pieces(saves.sources, saves.targets):
            self._rows.gather(indices, self._staging[: len(indices)])
            for staged, host in runs:
                self._host[host].copy_(self._staging[staged], non_blocking=True)

    def _load(self, loads: BlockMoves) -> None:
        for indices, runs in self._pieces(loads.targets, loads.sources):
            for staged, host in runs:
                self._staging[staged].copy_(self._host[host], non_blocking=True)
            self._rows.scatter(indices, self._staging[: len(indices)])

    def _pieces(
        self, block_ids: NDArray[np.int32], host_ids: NDArray[np.int32]
    ) -> Iterator[tuple[torch.Tensor, list[tuple[slice, slice]]]]:
        """What fits the staging buffer, time after time: the rows of its device blocks, and runs of host blocks that
        lie side by side, each with its place in the buffer."""
        if not len(block_ids):
            return
        order = np.argsort(host_ids, kind="stable")  # for long runs: each is one copy
        host_ids, indices = host_ids[order], self._rows.indices(block_ids[order])
        for start in range(0, len(host_ids), len(self._staging)):
            piece = slice(start, start + len(self._staging))
            yield indices[piece], _runs(host_ids[piece])


def _runs(host_ids: NDArray[np.int32]) -> list[tuple[slice, slice]]:
    """(place among `host_ids`, host blocks) of each run of consecutive ids."""
    (breaks,) = np.nonzero(np.diff(host_ids) != 1)
    starts, ends = np.append(0, breaks + 1).tolist(), np.append(breaks + 1, len(host_ids)).tolist()
    places = [slice(start, end) for start, end in zip(starts, ends, strict=True)]
    return [(place, slice(first := int(host_ids[place.start]), first + place.stop - place.start)) for place in places]


def _release(transfers: TransferStream, memory: torch.Tensor, device: torch.device) -> None:
    """Waits for nothing: the steps that transfers are queued behind may be waiting for a rank that is gone."""

    def unpin_unused() -> None:
        transfers.wait()
        unpin(memory, device)

    if transfers.is_idle():
        unpin_unused()
    else:
        threading.Thread(target=unpin_unused, name="host tier", daemon=True).start()
