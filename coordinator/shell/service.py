"""The `Engine` gRPC service: sessions of gateways, groups from the launcher, status."""

import asyncio
from collections.abc import AsyncIterator

import grpc

from ...errors import OctavoError
from ...internal_channel import ANSWERED
from ...proto import admin_pb2, engine_pb2, engine_pb2_grpc
from .engine import Engine
from .session import Session as GatewaySession

_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}


class EngineService(engine_pb2_grpc.EngineServicer):
    """A thin layer over Engine: one coroutine reads a session, another writes it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def Session(  # noqa: N802
        self, requests: AsyncIterator[engine_pb2.SessionRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[engine_pb2.SessionResponse]:
        session = await self._engine.open_session()
        reader = asyncio.create_task(self._read(session, requests))
        reader.add_done_callback(lambda _: session.end())
        try:
            yield engine_pb2.SessionResponse()
            while (response := await session.next_response()) is not None:
                yield response
            reader.result()  # raises what the reader raised
        finally:
            reader.cancel()
            self._engine.close_session(session)

    async def _read(self, session: GatewaySession, requests: AsyncIterator[engine_pb2.SessionRequest]) -> None:
        async for request in requests:
            self._engine.take_request(session, request)

    async def AddGroup(  # noqa: N802
        self, request: engine_pb2.AddGroupRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[engine_pb2.AddGroupProgress]:
        reports: asyncio.Queue[engine_pb2.AddGroupProgress | None] = asyncio.Queue()

        def report(stage: str, duration_s: float) -> None:
            reports.put_nowait(engine_pb2.AddGroupProgress(stage=stage, duration_s=duration_s))

        adding = asyncio.create_task(self._engine.add_group(request, report))
        adding.add_done_callback(lambda _: reports.put_nowait(None))
        try:
            while (progress := await reports.get()) is not None:
                yield progress
            memory = await adding
            yield engine_pb2.AddGroupProgress(
                stage="ready", num_blocks=memory.num_blocks, num_host_blocks=memory.num_host_blocks
            )
        except OctavoError as error:
            await self._refuse(context, error)
        finally:
            adding.cancel()

    async def AwaitFailure(  # noqa: N802
        self, request: engine_pb2.AwaitFailureRequest, context: grpc.aio.ServicerContext
    ) -> engine_pb2.AwaitFailureResponse:
        return await self._engine.await_failures(request.known_epochs)

    async def AbandonGroup(  # noqa: N802
        self, request: engine_pb2.AbandonGroupRequest, context: grpc.aio.ServicerContext
    ) -> engine_pb2.AbandonGroupResponse:
        try:
            self._engine.abandon_group(request.group_id)
        except OctavoError as error:
            await self._refuse(context, error)
        return engine_pb2.AbandonGroupResponse()

    async def RemoveGroup(  # noqa: N802
        self, request: engine_pb2.RemoveGroupRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[engine_pb2.RemoveGroupProgress]:
        counts: asyncio.Queue[int | None] = asyncio.Queue()
        removing = asyncio.create_task(self._engine.remove_group(request.group_id, counts.put_nowait))
        removing.add_done_callback(lambda _: counts.put_nowait(None))
        try:
            while (num_running := await counts.get()) is not None:
                yield engine_pb2.RemoveGroupProgress(num_running=num_running)
            await removing
            yield engine_pb2.RemoveGroupProgress(num_running=0)
        except OctavoError as error:
            await self._refuse(context, error)
        finally:
            removing.cancel()

    async def _refuse(self, context: grpc.aio.ServicerContext, error: OctavoError) -> None:
        """While the coordinator ends, errors may be of its own making, and say nothing."""
        metadata = () if self._engine.is_closing else (ANSWERED,)
        await context.abort(_STATUS_CODES[error.grpc_code], str(error), metadata)

    async def GetStatus(  # noqa: N802
        self, request: admin_pb2.GetStatusRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.GetStatusResponse:
        return self._engine.status()
