"""Copies between this rank and ranks of other groups, in both directions, until the epoch ends."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from ..errors import FailedPreconditionError, InternalError, InvalidArgumentError, OctavoError
from ..proto import worker_pb2
from .block_copy import BlockHolder, BlockStaging, pieces
from .block_rows import BlockRows
from .copy_thread import CopySettings
from .models.registry import Model
from .peer_group import BLOCKS_PATIENCE_S, WEIGHTS_PATIENCE_S
from .peer_link import PeerLink
from .peer_sender import Holdings, PeerSender
from .plan import BlockMoves, unpack_int32
from .weight_copy import layout_of, receive_weights

T = TypeVar("T")

_log = logging.getLogger(__name__)

_END_S = 20.0  # how long copies that are broken off may take to end


@dataclass(frozen=True, slots=True)
class _Source:
    address: str
    epoch: int


class Copies:
    """Owner of the links to ranks that this one copies from, and of what it sends. Belongs to one event loop."""

    def __init__(self, settings: CopySettings) -> None:
        self._settings = settings
        self._links: dict[_Source, PeerLink] = {}  # for blocks: they stay open
        self._staging: BlockStaging | None = None
        self._stuck: list[BlockStaging | None] = []  # buffers that are never used again
        self._receiving = asyncio.Lock()  # of blocks: there is one buffer
        self._running: set[asyncio.Task[Any]] = set()  # what is being received
        self._senders: set[PeerSender] = set()
        self._num_ends = 0

    async def send(
        self, requests: AsyncIterator[worker_pb2.SendRequest], holdings: Holdings
    ) -> AsyncIterator[worker_pb2.SendResponse]:
        """One call of `Send`, as PeerSender.run."""
        sender = PeerSender(self._settings)
        self._senders.add(sender)
        try:
            async for answer in sender.run(requests, holdings):
                yield answer
        finally:
            self._senders.discard(sender)

    async def fetch_weights(self, request: worker_pb2.ConfigureRequest, model: Model) -> None:
        """Fills `model` from the rank that `request` names. Raises UnavailableError, and FailedPreconditionError at the
        end of the epoch; the model is worthless then."""
        await self._run(asyncio.create_task(self._fetch_weights(request, model)))

    async def _fetch_weights(self, request: worker_pb2.ConfigureRequest, model: Model) -> None:
        started_at = time.monotonic()
        wanted = worker_pb2.WeightsWanted(
            config=request.config,
            rank=request.rank,
            tensor_parallel_size=request.tensor_parallel_size,
            layout=layout_of(model),
        )
        opening = worker_pb2.SendOpening(weights=wanted)
        link = await PeerLink.open(request.weight_source, opening, self._settings, WEIGHTS_PATIENCE_S)
        try:
            await link.ask(worker_pb2.SendRequest())
            num_bytes = await link.receive(lambda group: receive_weights(model, group, self._settings.device))
        finally:
            if not await link.close():  # it may still write to memory that is free
                raise InternalError("a copy of weights was broken off, and does not end")
        duration_s = time.monotonic() - started_at
        _log.info("copied %.1f MB of weights from %s in %.2f s", num_bytes / 1e6, request.weight_source, duration_s)

    async def receive_blocks(
        self, request: worker_pb2.ReceiveBlocksRequest, holder: BlockHolder
    ) -> worker_pb2.ReceiveBlocksResponse:
        """Always answers, when nothing writes to the blocks any more."""
        num_ends = self._num_ends
        try:
            async with self._receiving:
                if num_ends != self._num_ends:
                    raise FailedPreconditionError("the epoch is over")
                return await self._run(asyncio.create_task(self._receive(request, holder)))
        except OctavoError as error:
            return worker_pb2.ReceiveBlocksResponse(failure=str(error))
        except Exception as error:  # who asked holds the blocks until there is an answer
            _log.exception("a copy of blocks failed by a fault of ours")
            return worker_pb2.ReceiveBlocksResponse(failure=f"{type(error).__name__}; the worker's log has more")

    async def _receive(
        self, request: worker_pb2.ReceiveBlocksRequest, holder: BlockHolder
    ) -> worker_pb2.ReceiveBlocksResponse:
        rows = holder.block_rows
        moves = _moves_of(request, rows)
        link = await self._link(_Source(request.source_address, request.source_epoch), rows)
        try:
            if self._staging is None:
                self._staging = await link.receive(lambda _: BlockStaging(holder, self._settings.device))
            return await _receive_moves(link, moves, self._staging, request)
        except BaseException:
            await self._drop(link)
            raise

    async def _link(self, source: _Source, rows: BlockRows) -> PeerLink:
        """The one that is open, or a new one."""
        for link in [link for link in self._links.values() if link.is_over]:
            await self._drop(link)
        if source not in self._links:
            layout = {"block_bytes": rows.block_bytes, "num_rows": rows.num_groups}
            opening = worker_pb2.SendOpening(blocks=worker_pb2.BlocksWanted(epoch=source.epoch, **layout))
            patience_s = BLOCKS_PATIENCE_S[self._settings.device.type]
            self._links[source] = await PeerLink.open(source.address, opening, self._settings, patience_s)
        return self._links[source]

    async def _drop(self, link: PeerLink) -> None:
        self._links = {source: other for source, other in self._links.items() if other is not link}
        if not await link.close():  # it may still write to the buffer
            self._stuck.append(self._staging)
            self._staging = None

    async def _run(self, task: asyncio.Task[T]) -> T:
        """The task's result; it ends with this call, and with the epoch."""
        self._running.add(task)
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
            await asyncio.wait({task})
            self._running.discard(task)
        if task.cancelled():
            raise FailedPreconditionError("the epoch is over")
        return task.result()

    async def end(self) -> None:
        """The epoch is over: what is on its way is broken off, and fails."""
        self._num_ends += 1
        for task in self._running:
            task.cancel()
        for sender in self._senders:
            sender.end()
        with contextlib.suppress(TimeoutError):  # one that is stuck holds only what is its own
            async with asyncio.timeout(_END_S):
                await asyncio.gather(*(sender.ended.wait() for sender in self._senders))
                await asyncio.gather(*self._running, return_exceptions=True)
        for link in list(self._links.values()):
            await self._drop(link)
        self._staging = None


async def _receive_moves(
    link: PeerLink, moves: BlockMoves, staging: BlockStaging, request: worker_pb2.ReceiveBlocksRequest
) -> worker_pb2.ReceiveBlocksResponse:
    started_at = time.perf_counter()
    num_bytes = 0
    for piece in pieces(len(moves), staging.num_blocks):
        sources, targets = moves.sources[piece].astype("<i4").tobytes(), moves.targets[piece]
        await link.ask(worker_pb2.SendRequest(block_ids=sources, after_step=request.source_after_step))
        await link.receive(partial(staging.receive, len(targets)))
        num_bytes += await link.complete(partial(staging.scatter, targets, request.after_step))
    duration_us = (time.perf_counter() - started_at) * 1e6
    return worker_pb2.ReceiveBlocksResponse(duration_us=duration_us, num_bytes=num_bytes)


def _moves_of(request: worker_pb2.ReceiveBlocksRequest, rows: BlockRows) -> BlockMoves:
    """Raises InvalidArgumentError, FailedPreconditionError."""
    sources = unpack_int32(request.source_block_ids, "source_block_ids")
    targets = unpack_int32(request.block_ids, "block_ids")
    if len(sources) != len(targets):
        raise InvalidArgumentError("source_block_ids and block_ids differ in length", "block_ids")
    moves = BlockMoves(sources, targets)
    moves.check(np.iinfo(np.int32).max, rows.num_blocks)  # the source checks its own
    return moves
