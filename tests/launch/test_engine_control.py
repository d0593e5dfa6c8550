"""What the launcher hears of a group that starts."""

from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from octavo.launch.engine_control import EngineControl, GroupBlocks
from octavo.proto import engine_pb2, engine_pb2_grpc


class FakeEngine(engine_pb2_grpc.EngineServicer):
    progress = ()

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
