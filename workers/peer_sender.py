"""One `Send` call: what this rank holds, to a rank of another group that asks for it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from ..errors import FailedPreconditionError, InvalidArgumentError
from ..proto import worker_pb2
from .block_copy import BlockHolder, BlockIds, BlockStaging
from .block_rows import BlockRows
from .copy_thread import CopySettings, CopyThread
from .models.registry import Model
from .peer_group import BLOCKS_PATIENCE_S, MEET_S, WEIGHTS_PATIENCE_S, PeerGroup
from .plan import unpack_int32
from .rendezvous import connect_store
from .weight_copy import send_weights

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a rank may be asked for. Each raises FailedPreconditionError if it does not hold that."""

    model: Callable[[worker_pb2.WeightsWanted], Model]
    blocks: Callable[[worker_pb2.BlocksWanted], BlockHolder]


class PeerSender:
    """The source's side of one copy, or of all block copies to one rank."""

    def __init__(self, settings: CopySettings) -> None:
        self._settings = settings
        self._thread = CopyThread(settings)
        self._group: PeerGroup | None = None
        self._over: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.ended = asyncio.Event()

    async def run(
        self, requests: AsyncIterator[worker_pb2.SendRequest], holdings: Holdings
    ) -> AsyncIterator[worker_pb2.SendResponse]:
        """Until the receiver ends the call, or `end`. Raises FailedPreconditionError, UnavailableError."""
        try:
            until_over = self._until_over(requests)
            opening = await self._opening(until_over)
            is_of_weights = opening.WhichOneof("wanted") == "weights"
            send = self._send_weights if is_of_weights else self._send_blocks
            async for answer in send(opening, until_over, holdings):
                yield answer
        finally:
            self._abort()
            await self._thread.close(self._end_group)
            self.ended.set()

    async def _until_over(
        self, requests: AsyncIterator[worker_pb2.SendRequest]
    ) -> AsyncIterator[worker_pb2.SendRequest]:
        following = aiter(requests)
        while True:
            request = asyncio.ensure_future(anext(following, None))
            await asyncio.wait({request, self._over}, return_when=asyncio.FIRST_COMPLETED)
            if not request.done():
                request.cancel()
                raise FailedPreconditionError("the epoch is over")
            if (received := request.result()) is None:
                return
            yield received

    async def _opening(self, requests: AsyncIterator[worker_pb2.SendRequest]) -> worker_pb2.SendOpening:
        opening = (await anext(requests, worker_pb2.SendRequest())).opening
        if opening.WhichOneof("wanted") is None:
            raise InvalidArgumentError("the first request says what is wanted", "opening")
        if opening.device_type != self._settings.device.type:
            raise FailedPreconditionError(f"it is on another kind of device: {self._settings.device.type}")
        return opening

    async def _send_weights(
        self, opening: worker_pb2.SendOpening, requests: AsyncIterator[worker_pb2.SendRequest], holdings: Holdings
    ) -> AsyncIterator[worker_pb2.SendResponse]:
        model = holdings.model(opening.weights)
        yield worker_pb2.SendResponse()
        group = await self._meet(opening.store_address, WEIGHTS_PATIENCE_S)
        async for _ in requests:
            yield worker_pb2.SendResponse()
            await self._run(lambda: send_weights(model, group, self._settings.device))

    async def _send_blocks(
        self, opening: worker_pb2.SendOpening, requests: AsyncIterator[worker_pb2.SendRequest], holdings: Holdings
    ) -> AsyncIterator[worker_pb2.SendResponse]:
        holder = holdings.blocks(opening.blocks)
        staging = await self._run(lambda: BlockStaging(holder, self._settings.device))
        yield worker_pb2.SendResponse()
        group = await self._meet(opening.store_address, BLOCKS_PATIENCE_S[self._settings.device.type])
        async for request in requests:
            block_ids = _checked(unpack_int32(request.block_ids, "block_ids"), holder.block_rows, staging)
            await self._run(partial(staging.gather, block_ids, request.after_step))
            yield worker_pb2.SendResponse()
            await self._run(partial(staging.send, len(block_ids), group))

    async def _meet(self, store_address: str, patience_s: float) -> PeerGroup:
        def meet() -> PeerGroup:
            store = connect_store(store_address, MEET_S)
            self._group = PeerGroup(store, True, self._settings.device, patience_s)
            return self._group

        return await self._run(meet)

    async def _run(self, function: Callable[[], T]) -> T:
        if self._over.done():
            raise FailedPreconditionError("the epoch is over")
        return await self._thread.run(function, self._over, self._abort)

    def _abort(self) -> None:
        if self._group is not None:
            self._group.abort()

    def _end_group(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = None

    def end(self) -> None:
        """What this rank holds is about to change: breaks off what is on its way."""
        if not self._over.done():
            self._over.set_result(None)


def _checked(block_ids: BlockIds, rows: BlockRows, staging: BlockStaging) -> BlockIds:
    if not 0 < len(block_ids) <= staging.num_blocks:
        raise FailedPreconditionError(f"{len(block_ids)} blocks at once; it is to be 1 to {staging.num_blocks}")
    if not 0 <= int(np.min(block_ids)) <= int(np.max(block_ids)) < rows.num_blocks:
        raise FailedPreconditionError(f"a block id is not in [0, {rows.num_blocks})")
    return block_ids
