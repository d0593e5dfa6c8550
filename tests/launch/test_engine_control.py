"""What the launcher hears of a group that starts."""

import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from octavo.errors import FailedPreconditionError, NotFoundError, OctavoError, UnavailableError
from octavo.internal_channel import ANSWERED
from octavo.launch.engine_control import CoordinatorLostError, EngineControl, GroupBlocks
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

    def RemoveGroup(self, request, context):
        yield engine_pb2.RemoveGroupProgress(num_running=3)
        context.set_trailing_metadata([ANSWERED] if request.group_id else [])
        codes = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION]
        context.abort(codes[request.group_id % 3], "so it is")

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


def test_an_answer_that_says_no_is_told_from_none(engine):
    _, control = engine
    found = []
    for group_id in range(4):
        with pytest.raises(OctavoError, match="so it is") as caught:
            control.remove_group(group_id, lambda num_running: None)
        found.append(caught.type)
    assert found == [CoordinatorLostError, NotFoundError, FailedPreconditionError, UnavailableError]


def test_nobody_at_the_address_is_no_answer(tmp_path):
    control = EngineControl(f"unix:{tmp_path}/nobody.sock")
    with pytest.raises(CoordinatorLostError, match="the coordinator does not answer"):
        control.status()
    with pytest.raises(CoordinatorLostError, match="worker group 1 did not start"):
        control.add_group(engine_pb2.AddGroupRequest(group_id=1), lambda stage, duration_s: None)
    control.close()
