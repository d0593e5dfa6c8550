"""KV blocks on their way between ranks of different groups: raw rows, through a buffer of the device's.

Gathered and scattered on a stream of their own that first waits for the steps queued before: what a sent block holds
was computed by one of them, and what a received one held was last written by one.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import UnavailableError
from .block_rows import BlockRows
from .peer_group import PeerGroup

# As the host tier's: enough for full speed, and little of the device's memory.
_STAGING_BYTES = 32 * 1024 * 1024

_BEHIND_S = 5.0  # how long a rank may be behind rank 0
_POLL_S = 0.0005

BlockIds = NDArray[np.int32]


class BlockHolder(Protocol):
    """What a copy needs to know of the runner whose blocks it moves."""

    @property
    def block_rows(self) -> BlockRows: ...

    def has_queued(self, step_id: int) -> bool:
        """Whether that step's plan has been applied, and what it computes is on the device's way."""
        ...

    def wait_for_transfers(self) -> None:
        """Until all transfers between device and host that were queued have ended."""
        ...


class BlockStaging:
    """A buffer for blocks in one direction, and the stream beside the steps on which it is used."""

    def __init__(self, holder: BlockHolder, device: torch.device) -> None:
        self._holder, self._rows, self._device = holder, holder.block_rows, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with self._beside_steps():
            self._buffer = self._rows.buffer(max(1, _STAGING_BYTES // self._rows.block_bytes))

    @property
    def num_blocks(self) -> int:
        """As many as fit at once."""
        return len(self._buffer)

    def gather(self, block_ids: BlockIds, after_step: int) -> None:
        """Fills the buffer, and waits for that: the other side is not to wait for steps of this one.

        Raises UnavailableError if this rank is too far behind.
        """
        self._catch_up(after_step)
        with self._beside_steps():
            self._rows.gather(self._rows.indices(block_ids), self._buffer[: len(block_ids)])
        self._wait()

    def send(self, num_blocks: int, group: PeerGroup) -> None:
        """The first blocks of the buffer. Raises UnavailableError."""
        with self._on_stream():
            group.send([self._buffer[:num_blocks]])

    def receive(self, num_blocks: int, group: PeerGroup) -> None:
        """Into the first blocks of the buffer. Raises UnavailableError."""
        with self._on_stream():
            group.receive([self._buffer[:num_blocks]])

    def scatter(self, block_ids: BlockIds, after_step: int) -> int:
        """What came to its places; returns its bytes when it is there. Raises UnavailableError if this rank is too far
        behind, and has written nothing then."""
        self._catch_up(after_step)
        received = self._buffer[: len(block_ids)]
        with self._beside_steps():
            self._rows.scatter(self._rows.indices(block_ids), received)
        self._wait()
        return received.nbytes

    def _catch_up(self, after_step: int) -> None:
        """Rank 0 has done that step, and what it was to do beside it; this one may only just have heard of it."""
        deadline = time.monotonic() + _BEHIND_S
        while not self._holder.has_queued(after_step):
            if time.monotonic() > deadline:
                raise UnavailableError(f"step {after_step} has not come")
            time.sleep(_POLL_S)
        self._holder.wait_for_transfers()

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    @contextmanager
    def _beside_steps(self) -> Iterator[None]:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.default_stream(self._device))
        with self._on_stream():
            yield

    def _wait(self) -> None:
        if self._stream is not None:
            ended = torch.cuda.Event(blocking=True)
            ended.record(self._stream)
            ended.synchronize()


def pieces(num_blocks: int, size: int) -> Iterator[slice]:
    """Of at most `size` blocks each."""
    for start in range(0, num_blocks, size):
        yield slice(start, min(start + size, num_blocks))
