"""Changes of scale go to the launcher, and what it says comes back word for word."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from octavo.errors import FailedPreconditionError, InvalidArgumentError
from octavo.gateway.errors import to_grpc_status
from octavo.proto import admin_pb2, launcher_pb2_grpc


class FakeLauncher(launcher_pb2_grpc.LauncherServicer):
    def __init__(self):
        self.requests, self.error = [], None
        self.left = threading.Event()

    def Scale(self, request, context):
        self.requests.append(request)
        context.add_callback(self.left.set)
        yield admin_pb2.ScaleProgress(message="starting", num_ready_groups=1, num_groups=request.num_groups)
        if self.error is not None:
            context.abort_with_status(to_grpc_status(self.error))
        yield admin_pb2.ScaleProgress(message="done", num_ready_groups=2, num_groups=request.num_groups)


@contextmanager
def serving(launcher, address):
    server = grpc.server(ThreadPoolExecutor(2))
    launcher_pb2_grpc.add_LauncherServicer_to_server(launcher, server)
    server.add_insecure_port(address)
    server.start()
    try:
        yield
    finally:
        server.stop(None).wait()


def test_progress_is_handed_on(start_gateway, tmp_path):
    launcher, address = FakeLauncher(), f"unix:{tmp_path}/launcher.sock"
    with serving(launcher, address), start_gateway(launcher_address=address) as gateway:
        news = list(gateway.admin.Scale(admin_pb2.ScaleRequest(num_groups=2, tensor_parallel_size=4)))
        assert [(each.message, each.num_ready_groups, each.num_groups) for each in news] == [
            ("starting", 1, 2),
            ("done", 2, 2),
        ]
        assert (launcher.requests[0].num_groups, launcher.requests[0].tensor_parallel_size) == (2, 4)


def test_the_launchers_refusals_are_the_clients(start_gateway, tmp_path):
    launcher, address = FakeLauncher(), f"unix:{tmp_path}/launcher.sock"
    with serving(launcher, address), start_gateway(launcher_address=address) as gateway:
        launcher.error = FailedPreconditionError("Ray has no room")
        with pytest.raises(grpc.RpcError) as caught:
            list(gateway.admin.Scale(admin_pb2.ScaleRequest(num_groups=2)))
        assert (caught.value.code(), caught.value.details()) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "Ray has no room",
        )
        launcher.error = InvalidArgumentError("num_groups must be less", "num_groups")
        with pytest.raises(grpc.RpcError) as caught:
            list(gateway.admin.Scale(admin_pb2.ScaleRequest(num_groups=2)))
        [detail] = rpc_status.from_call(caught.value).details
        violation = error_details_pb2.BadRequest()
        assert detail.Unpack(violation)
        assert violation.field_violations[0].field == "num_groups"


def test_who_leaves_is_no_longer_told(start_gateway, tmp_path):
    launcher, address = FakeLauncher(), f"unix:{tmp_path}/launcher.sock"
    with serving(launcher, address), start_gateway(launcher_address=address) as gateway:
        call = gateway.admin.Scale(admin_pb2.ScaleRequest(num_groups=2))
        next(call)
        call.cancel()
        assert launcher.left.wait(5)


def test_without_a_launcher_there_is_a_clear_refusal(start_gateway, tmp_path):
    with start_gateway() as gateway, pytest.raises(grpc.RpcError) as caught:
        list(gateway.admin.Scale(admin_pb2.ScaleRequest(num_groups=2)))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "cannot be scaled" in caught.value.details()
    with (
        start_gateway(launcher_address=f"unix:{tmp_path}/none.sock") as gateway,
        pytest.raises(grpc.RpcError) as caught,
    ):
        list(gateway.admin.Scale(admin_pb2.ScaleRequest(num_groups=2)))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "the launcher does not answer" in caught.value.details()


def test_fields_that_nobody_knows_are_refused(start_gateway):
    newer = admin_pb2.ScaleRequest.FromString(b"\x08\x02\x98\x06\x01")  # field 99
    with start_gateway() as gateway, pytest.raises(grpc.RpcError) as caught:
        list(gateway.admin.Scale(newer))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith("99: octavo.v1.ScaleRequest has no field of this number")
