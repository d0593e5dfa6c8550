"""A rank's way to a rank of another group that it copies from: a call that says what it wants, and a group of the two.

The call is also the sign of life: when it ends, so does what is being copied.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Self, TypeVar

import grpc
import torch.distributed as dist

from ..errors import UnavailableError
from ..internal_channel import CHANNEL_OPTIONS
from ..proto import worker_pb2, worker_pb2_grpc
from .copy_thread import CopySettings, CopyThread
from .peer_group import MEET_S, PeerGroup
from .rendezvous import create_store

T = TypeVar("T")


class PeerLink:
    """The receiver's side. Belongs to one event loop; `receive` runs functions on a thread of the link's own."""

    def __init__(self, address: str, settings: CopySettings, patience_s: float) -> None:
        self._address, self._settings, self._patience_s = address, settings, patience_s
        self._thread = CopyThread(settings)
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._call: grpc.aio.StreamStreamCall = worker_pb2_grpc.WorkerStub(self._channel).Send()
        self._ended: asyncio.Future[Any] = asyncio.ensure_future(self._call.code())
        self._store: dist.TCPStore | None = None
        self._group: PeerGroup | None = None

    @classmethod
    async def open(
        cls, address: str, opening: worker_pb2.SendOpening, settings: CopySettings, patience_s: float
    ) -> Self:
        """Asks the rank at `address` for what `opening` says, and meets it if it has that.

        Raises UnavailableError, also for what the other refuses.
        """
        link = cls(address, settings, patience_s)
        try:
            await link._open(opening)
        except BaseException:
            await link.close()
            raise
        return link

    async def _open(self, opening: worker_pb2.SendOpening) -> None:
        self._store = store = create_store(self._settings.host)
        opening.store_address = f"{self._settings.host}:{store.port}"
        opening.device_type = self._settings.device.type
        await self.ask(worker_pb2.SendRequest(opening=opening))
        await self._run(self._meet)

    def _meet(self) -> None:
        assert self._store is not None
        self._group = PeerGroup(self._store, False, self._settings.device, self._patience_s)

    @property
    def is_over(self) -> bool:
        """Whether the other side is gone, or the copies went wrong."""
        return self._ended.done()

    async def ask(self, request: worker_pb2.SendRequest) -> None:
        """Returns when the other side is about to send it. Raises UnavailableError."""
        try:
            async with asyncio.timeout(max(MEET_S, self._patience_s)):
                await self._call.write(request)
                answer = await self._call.read()
        except TimeoutError:
            raise UnavailableError(f"the rank at {self._address} does not answer") from None
        except asyncio.InvalidStateError:
            raise UnavailableError(f"the rank at {self._address} has ended the call") from None
        except grpc.aio.AioRpcError as error:
            why = error.details() or error.code().name
            raise UnavailableError(f"the rank at {self._address}: {why}") from error
        if answer is grpc.aio.EOF:
            raise UnavailableError(f"the rank at {self._address} has ended the call")

    async def receive(self, function: Callable[[PeerGroup], T]) -> T:
        """What `function` makes of what the other side sends. Raises UnavailableError; the link is of no use then."""
        group = self._group
        assert group is not None, "the two have met"
        return await self._run(lambda: function(group))

    async def complete(self, function: Callable[[], T]) -> T:
        """Runs `function` on the link's thread, and whatever becomes of the other side, waits for its end."""
        return await self._thread.complete(function)

    async def _run(self, function: Callable[[], T]) -> T:
        return await self._thread.run(function, self._ended, self._abort)

    def _abort(self) -> None:
        if self._group is not None:
            self._group.abort()

    async def close(self) -> bool:
        """Ends the call, and with it the other side's part. Whether nothing writes any more to what was received."""
        self._abort()
        self._call.cancel()
        has_ended = await self._thread.close(self._end_group)
        await self._channel.close()
        return has_ended or self._group is None

    def _end_group(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = self._store = None
