"""Builds the gRPC server: public services, health with readiness and liveness, reflection; on a shared port and a
socket of this process's own."""

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ..errors import FailedPreconditionError
from ..proto import admin_pb2, admin_pb2_grpc, generation_pb2, generation_pb2_grpc
from .config import MAX_MESSAGE_BYTES, GatewaySettings
from .generation import GenerationService
from .grpc_service import AdminServicer, GenerationServicer
from .listen import shared_socket
from .malformed import MalformedRequestInterceptor

LIVENESS = "liveness"  # the health service's name for "this process answers"; the others mean readiness
_SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["Generation"].full_name,
    admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name,
)
_OPTIONS = [
    ("grpc.so_reuseport", 1),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", 8 * MAX_MESSAGE_BYTES),  # prompt logprobs are larger than their prompt
]


class Readiness:
    """What the health service says."""

    def __init__(self) -> None:
        self.servicer = health.aio.HealthServicer()

    async def set(self, ready: bool) -> None:
        """Readiness: whether requests can be taken. Liveness stays."""
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *_SERVICES):
            await self.servicer.set(name, status)
        await self.servicer.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)


def build_grpc_server(settings: GatewaySettings, service: GenerationService, readiness: Readiness) -> grpc.aio.Server:
    """A server that is bound and not started. Raises FailedPreconditionError if an address cannot be had."""
    server = grpc.aio.server(options=_OPTIONS, interceptors=[MalformedRequestInterceptor()])
    generation_pb2_grpc.add_GenerationServicer_to_server(GenerationServicer(service), server)
    admin_pb2_grpc.add_AdminServicer_to_server(AdminServicer(service, settings.launcher_address), server)
    health_pb2_grpc.add_HealthServicer_to_server(readiness.servicer, server)
    reflection.enable_server_reflection((*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    if settings.grpc_port:
        # A try of our own first: the library writes lines of its own when it fails.
        shared_socket(settings.host, settings.grpc_port, "--grpc-port").close()
        _bind(server, f"{_bracketed(settings.host)}:{settings.grpc_port}")
    if settings.local_address:
        _bind(server, settings.local_address)
    return server


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _bind(server: grpc.aio.Server, address: str) -> None:
    try:
        server.add_insecure_port(address)
    except RuntimeError as error:
        raise FailedPreconditionError(f"cannot listen on {address}: is it in use, or not of this host?") from error
