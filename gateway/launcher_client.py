"""The gateway's line to the launcher, which knows what the cluster has room for."""

from collections.abc import AsyncGenerator

import grpc
from grpc_status import rpc_status

from ..errors import FailedPreconditionError, UnavailableError
from ..proto import admin_pb2, launcher_pb2_grpc


class RefusedByLauncherError(Exception):
    """The launcher's own status, meant for the client as it is."""

    def __init__(self, status: grpc.Status) -> None:
        super().__init__(status.details)
        self.status = status


async def scale(address: str, request: admin_pb2.ScaleRequest) -> AsyncGenerator[admin_pb2.ScaleProgress]:
    """Hands the launcher's progress on. Who leaves ends the call, and not the change.

    Raises RefusedByLauncherError with what the launcher says, UnavailableError if it does not answer, and
    FailedPreconditionError where nobody scales (`address` is empty).
    """
    if not address:
        raise FailedPreconditionError("this server cannot be scaled: no launcher watches over its groups")
    async with grpc.aio.insecure_channel(address) as channel:
        call = launcher_pb2_grpc.LauncherStub(channel).Scale(request)
        try:
            async for progress in call:
                yield progress
        except grpc.aio.AioRpcError as error:
            if (status := await rpc_status.aio.from_call(call)) is not None:
                raise RefusedByLauncherError(rpc_status.to_status(status)) from error
            raise UnavailableError("the launcher does not answer, or is ending; see octavo status") from error
