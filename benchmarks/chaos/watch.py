"""The server's state as anyone may ask for it: GetStatus, many times a second."""

import asyncio
import time
from collections.abc import Callable

import grpc

from ...launch.client import CHANNEL_OPTIONS
from ...proto import admin_pb2, admin_pb2_grpc

POLL_S = 0.05
_ANSWER_TIMEOUT_S = 1.0
_OPTIONS = [*CHANNEL_OPTIONS, ("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200)]

Status = admin_pb2.GetStatusResponse | None  # None: nobody answered within a second
Condition = Callable[[Status], bool]


class StatusWatch:
    """Asks while `run` runs."""

    def __init__(self, address: str) -> None:
        self.last: Status = None
        self._address = address
        self._has_news = asyncio.Event()

    async def run(self) -> None:
        async with grpc.aio.insecure_channel(self._address, options=_OPTIONS) as channel:
            stub = admin_pb2_grpc.AdminStub(channel)
            while True:
                self.last = await _ask(stub)
                self._has_news.set()
                self._has_news = asyncio.Event()
                await asyncio.sleep(POLL_S)

    async def wait_until(self, condition: Condition, timeout_s: float) -> float | None:
        """When a status that came after this call met the condition, of time.monotonic(); None: none did."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    await self._has_news.wait()
                    if condition(self.last):
                        return time.monotonic()
        except TimeoutError:
            return None


async def _ask(stub: admin_pb2_grpc.AdminStub) -> Status:
    try:
        status: admin_pb2.GetStatusResponse = await stub.GetStatus(
            admin_pb2.GetStatusRequest(), timeout=_ANSWER_TIMEOUT_S
        )
        return status
    except grpc.aio.AioRpcError:
        return None


def is_whole(status: Status, num_groups: int, num_gateways: int) -> bool:
    """Whether all groups and gateways are there and serve."""
    return (
        status is not None
        and status.num_gateways == num_gateways
        and len(status.groups) == num_groups
        and all(group.state == admin_pb2.GROUP_STATE_READY for group in status.groups)
    )


def is_idle(status: Status) -> bool:
    """Whether nothing waits, runs or moves. Blocks that are not free then are lost."""
    if status is None or status.num_waiting:
        return False
    return not any(
        group.num_running or group.num_inflight_steps or group.blocks.num_in_transfer for group in status.groups
    )


def num_leaked_blocks(status: admin_pb2.GetStatusResponse) -> int:
    """Of an idle server."""
    return sum(group.num_blocks - group.num_free_blocks for group in status.groups)


def group_of(status: Status, group_id: int) -> admin_pb2.GroupStatus | None:
    groups = status.groups if status is not None else []
    return next((group for group in groups if group.group_id == group_id), None)
