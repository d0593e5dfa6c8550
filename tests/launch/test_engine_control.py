"""What the launcher hears of a group that starts."""

import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from octavo.errors import UnavailableError
from octavo.launch.engine_control import EngineControl, GroupBlocks
from octavo.proto import engine_pb2, engine_pb2_grpc


class FakeEngine(engine_pb2_grpc.EngineServicer):
    progress = ()
    failures = ()
    abandoned = ()

    def AwaitFailure(self, request, context):
        news = [failure for failure in self.failures if failure.epoch not in request.known_epochs]
        if not news:
            threading.Event().wait(context.time_remaining() + 0.1)
        return engine_pb2.AwaitFailureResponse(failures=news)

    def AbandonGroup(self, request, context):
        if request.group_id:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "it has not failed")
        self.abandoned = (request.group_id,)
        return engine_pb2.AbandonGroupResponse()

    def AddGroup(self, request, context):
        yield from self.progress


@pytest.fixture
def engine(tmp_path):
    """(the engine, a control of it)."""
    address = f"unix:{tmp_path}/engine.sock"
    server, engine = grpc.server(ThreadPoolExecutor(1)), FakeEngine()
    engine_pb2_grpc.add_EngineServicer_to_server(engine, server)
    server.add_insecure_port(address)
    server.start()
    control = EngineControl(address)
    yield engine, control
    control.close()
    server.stop(0).wait()


@pytest.mark.parametrize("num_host_blocks", [0, 7])
def test_stages_are_reported_and_blocks_returned(num_host_blocks, engine):
    engine, control = engine
    engine.progress = [
        engine_pb2.AddGroupProgress(stage="connect", duration_s=0.5),
        engine_pb2.AddGroupProgress(stage="warm-up", duration_s=2.0),
        engine_pb2.AddGroupProgress(num_blocks=12, num_host_blocks=num_host_blocks),
    ]
    stages = []
    blocks = control.add_group(engine_pb2.AddGroupRequest(), lambda *stage: stages.append(stage))
    assert stages == [("connect", 0.5), ("warm-up", 2.0)]
    assert blocks == GroupBlocks(12, num_host_blocks)


def test_failures_are_awaited_for_a_while(engine):
    engine, control = engine
    assert list(control.await_failures([], timeout_s=0.2)) == []
    engine.failures = [engine_pb2.GroupFailure(group_id=3, epoch=7, reason="it broke")]
    assert [failure.group_id for failure in control.await_failures([6], timeout_s=5)] == [3]
    assert list(control.await_failures([7], timeout_s=0.2)) == []


def test_a_group_is_given_up(engine):
    engine, control = engine
    control.abandon_group(0)
    assert engine.abandoned == (0,)
    with pytest.raises(UnavailableError, match="worker group 5 could not be given up: it has not failed"):
        control.abandon_group(5)
