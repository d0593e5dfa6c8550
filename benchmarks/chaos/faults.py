"""Makes one fault after another, from outside: signals to processes, orders to ranks, calls of the Admin door."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import grpc
import psutil

from ...errors import OctavoError, UnavailableError
from ...launch.rpc_errors import from_rpc_error
from ...proto import admin_pb2, admin_pb2_grpc
from .load import Load
from .script import Fault, Shape
from .server import ChaosServer
from .watch import Condition, Status, StatusWatch, group_of, is_whole

RECOVERY_LIMIT_S = 120.0
_ORDER_LIMIT_S = 30.0
_ORDER_POLL_S = 0.002
_STAYS_WHOLE_S = 0.5
_GO_ON_LIMIT_S = 30.0  # for every stream to get its next token, once the server is whole
_GO_ON_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Effect:
    """What a fault that was made should lead to."""

    made_at: float  # time.monotonic()
    is_noticed: Condition  # by the server, as something that failed
    is_over: Condition  # once the server is whole, too


@dataclass(frozen=True, slots=True)
class FaultRecord:
    """What a fault led to."""

    fault: str  # as the script has it
    made_at_s: float  # after the load began
    noticed_after_s: float | None  # None: the server missed nothing
    whole_after_s: float | None  # None: not within RECOVERY_LIMIT_S
    longest_gap_s: float | None  # that a stream waited for its next token, from the fault until all streams went on
    problem: str = ""  # why it could not be made, or that the server did not recover


class FaultMaker:
    """Knows how many groups and gateways there should be."""

    def __init__(self, server: ChaosServer, watch: StatusWatch, load: Load, shape: Shape) -> None:
        self._server, self._watch, self._load = server, watch, load
        self._num_groups, self._num_gateways = shape.num_groups, shape.num_gateways
        self._woken: list[asyncio.Task[None]] = []
        self._makers: Mapping[str, Callable[[Fault], Awaitable[Effect]]] = {
            "kill-rank": self._kill_rank,
            "stop-rank": self._stop_rank,
            "raise": self._order,
            "drop-reply": self._order,
            "repeat-reply": self._order,
            "kill-coordinator": self._kill_coordinator,
            "stop-coordinator": self._stop_coordinator,
            "kill-gateway": self._kill_gateway,
            "scale": self._scale,
        }

    def is_whole(self, status: Status) -> bool:
        return is_whole(status, self._num_groups, self._num_gateways)

    async def make(self, fault: Fault) -> FaultRecord:
        """Until the server has recovered. A fault that cannot be made is a record of why."""
        line, made_at_s = str(fault), self._load.time_s
        try:
            effect = await self._makers[fault.kind](fault)
        except OctavoError as error:
            return FaultRecord(line, made_at_s, None, None, None, str(error))
        noticing = asyncio.create_task(self._watch.wait_until(effect.is_noticed, RECOVERY_LIMIT_S))
        whole_at = await self._wait_until_whole(effect)
        noticed_at = noticing.result() if noticing.done() else None
        noticing.cancel()
        await self._wait_until_streams_go_on(time.monotonic() if whole_at is None else whole_at)
        gap_s = self._load.longest_gap_s(effect.made_at, time.monotonic())
        made_at_s += max(0.0, self._load.time_s - made_at_s - (time.monotonic() - effect.made_at))
        noticed_after_s = None if noticed_at is None else noticed_at - effect.made_at
        if whole_at is None:
            problem = f"the server has not recovered within {RECOVERY_LIMIT_S:.0f} s"
            return FaultRecord(line, made_at_s, noticed_after_s, None, gap_s, problem)
        return FaultRecord(line, made_at_s, noticed_after_s, whole_at - effect.made_at, gap_s)

    async def _wait_until_whole(self, effect: Effect) -> float | None:
        """When it became so and stayed so for a while."""
        deadline = time.monotonic() + RECOVERY_LIMIT_S
        while (left_s := deadline - time.monotonic()) > 0:
            whole_at = await self._watch.wait_until(
                lambda status: self.is_whole(status) and effect.is_over(status), left_s
            )
            await asyncio.sleep(_STAYS_WHOLE_S)
            if whole_at is not None and self.is_whole(self._watch.last):
                return whole_at
        return None

    async def _wait_until_streams_go_on(self, since: float) -> None:
        for _ in range(int(_GO_ON_LIMIT_S / _GO_ON_POLL_S)):
            if self._load.goes_on(since):
                return
            await asyncio.sleep(_GO_ON_POLL_S)

    # Ranks

    def _group(self, fault: Fault) -> admin_pb2.GroupStatus:
        if self._watch.last is None:
            raise UnavailableError("nobody answers GetStatus")
        groups = self._watch.last.groups
        if fault.number("group") >= len(groups):
            raise UnavailableError(f"the server has only {len(groups)} groups")
        return groups[fault.number("group")]

    async def _rank(self, group: admin_pb2.GroupStatus, rank: int) -> psutil.Process:
        if rank >= len(group.ranks):
            raise UnavailableError(f"group {group.group_id} has only {len(group.ranks)} ranks")
        return await asyncio.to_thread(self._server.rank_at, group.ranks[rank].address)

    async def _kill_rank(self, fault: Fault) -> Effect:
        group = self._group(fault)
        process = await self._rank(group, fault.number("rank"))
        process.kill()
        return _new_epoch(group)

    async def _stop_rank(self, fault: Fault) -> Effect:
        group = self._group(fault)
        process = await self._rank(group, fault.number("rank"))
        process.suspend()
        if fault.seconds is None:
            return _new_epoch(group)
        return self._wake_after(process, fault.seconds, _new_epoch(group).is_noticed)

    async def _order(self, fault: Fault) -> Effect:
        group = self._group(fault)
        process = await self._rank(group, fault.number("rank") if "rank" in fault.arguments else 0)
        orders = self._server.orders_for(process)
        orders.give(fault.kind)
        deadline = time.monotonic() + _ORDER_LIMIT_S
        while orders.is_given:
            if time.monotonic() > deadline:
                orders.withdraw()
                raise UnavailableError(f"the rank has made no step within {_ORDER_LIMIT_S:.0f} s")
            await asyncio.sleep(_ORDER_POLL_S)
        return _new_epoch(group)

    # Coordinator and gateways

    async def _kill_coordinator(self, fault: Fault) -> Effect:
        process = await self._process("coordinator", 0)
        process.kill()
        return _another_coordinator(process)

    async def _stop_coordinator(self, fault: Fault) -> Effect:
        process = await self._process("coordinator", 0)
        process.suspend()
        if fault.seconds is None:
            return _another_coordinator(process)
        return self._wake_after(process, fault.seconds, lambda status: False)

    async def _kill_gateway(self, fault: Fault) -> Effect:
        process = await self._process("gateway", fault.number("gateway"))
        process.kill()
        self._load.note_gateway_kill()
        gone = asyncio.Event()

        def is_gone(status: Status) -> bool:
            if status is None or status.num_gateways < self._num_gateways:
                gone.set()
            return gone.is_set()

        return Effect(time.monotonic(), is_gone, is_gone)

    async def _process(self, kind: str, index: int) -> psutil.Process:
        find = self._server.gateways if kind == "gateway" else lambda: self._server.processes_of(kind)
        processes = await asyncio.to_thread(find)
        if index >= len(processes):
            raise UnavailableError(f"the server has no {kind} {index}")
        return processes[index]

    def _wake_after(self, process: psutil.Process, seconds: float, is_noticed: Condition) -> Effect:
        """Of one that is stopped now. It may have been killed before."""
        waking = asyncio.create_task(_wake_after(process, seconds))
        self._woken.append(waking)  # a task that nobody holds may be collected
        return Effect(time.monotonic(), is_noticed, lambda status: waking.done())

    # Size

    async def _scale(self, fault: Fault) -> Effect:
        """Until the server says that it is done."""
        made_at, num_groups = time.monotonic(), fault.number("groups")
        num_ranks = int(fault.arguments.get("ranks", 0))  # 0: as many as now
        async with grpc.aio.insecure_channel(self._server.address) as channel:
            request = admin_pb2.ScaleRequest(num_groups=num_groups, tensor_parallel_size=num_ranks)
            try:
                async for _ in admin_pb2_grpc.AdminStub(channel).Scale(request, timeout=RECOVERY_LIMIT_S):
                    pass
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error, self._server.address) from error
        self._num_groups = num_groups
        return Effect(made_at, lambda status: False, lambda status: True)


def _new_epoch(group: admin_pb2.GroupStatus) -> Effect:
    """The group fails, and comes back as another incarnation."""

    def is_noticed(status: Status) -> bool:
        now = group_of(status, group.group_id)
        return now is not None and (now.state != admin_pb2.GROUP_STATE_READY or now.epoch != group.epoch)

    def is_over(status: Status) -> bool:
        now = group_of(status, group.group_id)
        return now is not None and now.epoch > group.epoch

    return Effect(time.monotonic(), is_noticed, is_over)


def _another_coordinator(process: psutil.Process) -> Effect:
    """It ends, by our hand or the launcher's, and another follows."""
    made_at = time.monotonic()

    def is_another(status: Status) -> bool:
        return status is not None and status.uptime_s < time.monotonic() - made_at

    return Effect(made_at, lambda status: _has_ended(process) or is_another(status), is_another)


def _has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def _wake_after(process: psutil.Process, seconds: float) -> None:
    await asyncio.sleep(seconds)
    try:
        process.resume()
    except psutil.NoSuchProcess:
        return
