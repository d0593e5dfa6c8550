"""Whether a gateway serves, and whether it answers at all: asked at its own door, as any prober would."""

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_TIMEOUT_S = 1.0


def gateway_serves(address: str, wait_for_ready: bool = False) -> bool:
    """`wait_for_ready`: gives one that does not listen yet the time of an answer; otherwise says at once that it does
    not."""
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        try:
            answer = health.Check(request, timeout=_TIMEOUT_S, wait_for_ready=wait_for_ready)
        except grpc.RpcError:  # not up; the caller watches the process and the clock
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def begin_gateway_check(address: str, timeout_s: float) -> "grpc.Future":
    """Asks, and waits for no answer; without one the call ends with DEADLINE_EXCEEDED. A gateway that is only starting
    refuses, and one that is drained answers: neither hangs."""
    channel = grpc.insecure_channel(address)
    call = health_pb2_grpc.HealthStub(channel).Check.future(health_pb2.HealthCheckRequest(), timeout=timeout_s)
    call.add_done_callback(lambda _: channel.close())
    return call
