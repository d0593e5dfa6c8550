"""Two ranks of different groups, and the process group of the two: what weights and KV blocks are copied over.

It lies beside the groups that the ranks serve in, and is made directly, so torch's default group knows nothing of it.

**Why it does not lock up a GPU** on which a step's kernels wait for other GPUs (kernels/ll_all_reduce.py, two_shot.py).
A copy's kernel waits for its twin on the other GPU and for nothing else; steps never wait for copies. It takes at most
`_MAX_CTAS` multiprocessors, and a step's waiting kernels need one free program anywhere to go on, so steps end whatever
copies do, and copies get their turn. Should the hardware put both in one queue all the same, and the two wait for each
other round a ring of ranks, patience breaks it: a copy that stands still is aborted before a step counts as late.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..errors import UnavailableError

MEET_S = 20.0  # how long the two may take to find each other
# How long a piece of a copy may take. A GPU may stand still for blocks no longer than a step may take. Beside weights
# no step runs on the receiver, but it may capture graphs, and other ranks wait half a minute for it there.
WEIGHTS_PATIENCE_S = 10.0
BLOCKS_PATIENCE_S = {"cpu": 15.0, "cuda": 3.0}
_MEET = timedelta(seconds=MEET_S)
# Torch's own watchdog is never to act: it ends the process. Ours has by then.
_NCCL_TIMEOUT = timedelta(hours=1)
_MAX_CTAS = 4
_PIECE_BYTES = 32 * 1024 * 1024  # by which it is seen whether a copy goes on
_MAX_QUEUED = 4  # pieces
_POLL_S = 0.0002


class PeerGroup:
    """One side of the two. Its thread copies; any thread may `abort`."""

    def __init__(self, store: dist.Store, is_source: bool, device: torch.device, patience_s: float) -> None:
        """Meets the other side. `patience_s`: how long a piece may take. Raises UnavailableError."""
        self._device, self._patience_s = device, patience_s
        self._other = 1 if is_source else 0
        self._is_aborted = threading.Event()
        self._queued: deque[tuple[Any, torch.Tensor]] = deque()  # a piece is to live until it has moved
        store = dist.PrefixStore("peers", store)
        make = _nccl_group if device.type == "cuda" else _gloo_group
        try:
            self._group: Any = make(store, 1 - self._other)
        except (RuntimeError, dist.DistError) as error:
            raise UnavailableError("the two ranks did not meet") from error
        with beside_steps(device):
            # NCCL connects with the first piece.
            token = torch.zeros(1, dtype=torch.uint8, device=device)
            if is_source:
                self.send([token])
            else:
                self.receive([token])

    def send(self, tensors: Iterable[torch.Tensor]) -> None:
        """Sends contiguous tensors behind what the current stream has queued; returns when they are gone.

        Raises UnavailableError; the group is of no use then.
        """
        self._move(self._group.send, tensors)

    def receive(self, tensors: Iterable[torch.Tensor]) -> None:
        """As `send`: what the other side sends, in the same sizes."""
        self._move(self._group.recv, tensors)

    def _move(self, queue: Callable[[list[torch.Tensor], int, int], Any], tensors: Iterable[torch.Tensor]) -> None:
        try:
            for piece in _pieces(tensors):
                self._queued.append((queue([piece], self._other, 0), piece))
                if len(self._queued) == _MAX_QUEUED:
                    self._finish_first()
            while self._queued:
                self._finish_first()
        except (RuntimeError, dist.DistError) as error:
            raise UnavailableError("the connection to the other rank is lost") from error

    def _finish_first(self) -> None:
        self._finish(self._queued[0][0])
        self._queued.popleft()

    def _finish(self, work: Any) -> None:  # noqa: ANN401 (torch's Work is untyped)
        if self._device.type == "cuda":
            self._poll(work)
            work.wait()  # which has the current stream wait, and no thread
        else:
            work.wait(timedelta(seconds=self._patience_s))

    def _poll(self, work: Any) -> None:  # noqa: ANN401
        deadline = time.monotonic() + self._patience_s
        while not work.is_completed():
            if self._is_aborted.is_set() or time.monotonic() > deadline:
                raise UnavailableError("the copy stands still" if time.monotonic() > deadline else "it was broken off")
            time.sleep(_POLL_S)

    def abort(self) -> None:
        """Frees the thread that copies; what it copies is worthless. On a GPU its kernels end with `close`."""
        self._is_aborted.set()
        if self._device.type != "cuda":
            self._group.abort()

    def close(self) -> None:
        """Ends the group at once, on the thread that copied; the other side is not waited for. Nothing is written any
        more when it returns."""
        self._is_aborted.set()
        self._group.abort()
        if self._queued and self._device.type == "cuda":
            self._await_kernels()

    def _await_kernels(self) -> None:
        with torch.cuda.stream(torch.cuda.Stream(self._device)):
            for work, _ in self._queued:
                work.wait()
            ended = torch.cuda.Event(blocking=True)
            ended.record()
            ended.synchronize()


def beside_steps(device: torch.device) -> AbstractContextManager[object]:
    """On a GPU a stream of its own, which begins behind what was queued before."""
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))
    return torch.cuda.stream(stream)


def _gloo_group(store: dist.Store, rank: int) -> Any:  # noqa: ANN401
    return dist.ProcessGroupGloo(store, rank, 2, _MEET)


def _nccl_group(store: dist.Store, rank: int) -> Any:  # noqa: ANN401
    _await_other(store, rank)  # NCCL itself would wait for ever
    options = dist.ProcessGroupNCCL.Options()
    options.is_high_priority_stream = True  # hardware queues apart from the steps'; and it is soon gone
    options.config.min_ctas, options.config.max_ctas = 1, _MAX_CTAS
    options._timeout = _NCCL_TIMEOUT
    with _errors_left_to_us():
        return dist.ProcessGroupNCCL(store, rank, 2, options)


def _await_other(store: dist.Store, rank: int) -> None:
    store.set(f"here-{rank}", "yes")
    store.wait([f"here-{1 - rank}"], _MEET)


@contextmanager
def _errors_left_to_us() -> Iterator[None]:
    """Torch would end the process when a peer is lost. It reads this when a group is made, and from nowhere else."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    previous = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if previous is None:
            del os.environ[name]
        else:
            os.environ[name] = previous


def _pieces(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    for tensor in tensors:
        if tensor.numel():
            yield from tensor.view(-1).view(torch.uint8).split(_PIECE_BYTES)
