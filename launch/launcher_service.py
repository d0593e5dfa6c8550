"""The launcher's own gRPC service, for gateways: changes of scale."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

from ..errors import OctavoError
from ..gateway.errors import to_grpc_status
from ..internal_channel import CHANNEL_OPTIONS
from ..proto import admin_pb2, launcher_pb2_grpc
from .scaler import Scaler

_NUM_THREADS = 8  # each listens to a change, or is refused


class LauncherService(launcher_pb2_grpc.LauncherServicer):
    """Owner of a gRPC server at `address`."""

    def __init__(self, address: str, scaler: Scaler) -> None:
        self._scaler = scaler
        self._server = grpc.server(ThreadPoolExecutor(_NUM_THREADS, "launcher"), options=CHANNEL_OPTIONS)
        launcher_pb2_grpc.add_LauncherServicer_to_server(self, self._server)
        self._server.add_insecure_port(address)
        self._server.start()

    def Scale(  # noqa: N802
        self, request: admin_pb2.ScaleRequest, context: grpc.ServicerContext
    ) -> Iterator[admin_pb2.ScaleProgress]:
        try:
            yield from self._scaler.scale(request.num_groups, request.tensor_parallel_size)
        except OctavoError as error:
            context.abort_with_status(to_grpc_status(error))

    def stop(self) -> None:
        """Nothing more is taken; who listens to a change hears no more of it."""
        self._server.stop(None)
