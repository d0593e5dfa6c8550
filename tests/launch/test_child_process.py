"""Processes beside the launcher: their last words, their end."""

import threading

import pytest
from google.protobuf import json_format
from octavo.errors import UnavailableError
from octavo.launch.child_process import ChildProcess
from octavo.launch.engine_control import EngineControl
from octavo.launch.library_logs import quiet_libraries
from octavo.proto import engine_pb2


@pytest.fixture
def engine_config(tmp_path):
    config = engine_pb2.EngineConfig(
        address=f"unix:{tmp_path}/engine.sock",
        model="none",
        vocab_size=10,
        max_model_len=64,
        block_size=16,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        max_num_waiting=4,
        num_inflight_steps=2,
    )
    path = tmp_path / "engine.json"
    path.write_text(json_format.MessageToJson(config))
    return path, config.address


def test_a_process_that_ends_is_reported_with_its_last_words(tmp_path):
    lines = []
    child = ChildProcess("gateway 0", "octavo.gateway", tmp_path / "none.json", lambda *line: lines.append(line))
    child.wait(30, threading.Event())
    with pytest.raises(UnavailableError, match=r"gateway 0 ended with status 1: cannot read .*none\.json"):
        child.require_alive()
    assert [name for name, _ in lines] == ["gateway 0"]
    assert len(child.log) == 1


def test_a_coordinator_comes_up_answers_and_ends(engine_config):
    path, address = engine_config
    child = ChildProcess("coordinator", "octavo.coordinator", path, lambda *line: None)
    control = EngineControl(address)
    control.wait_until_up(child.require_alive)
    assert control.status().model == "none"
    worker = engine_pb2.WorkerEndpoint(address="127.0.0.1:1", device="cpu")
    with pytest.raises(UnavailableError, match="worker group 0 did not start: rank 0"):
        control.add_group(engine_pb2.AddGroupRequest(workers=[worker]), lambda stage, duration_s: None)
    control.close()
    child.terminate()
    child.wait(20, threading.Event())
    with pytest.raises(UnavailableError, match="ended with status 0"):
        child.require_alive()


@pytest.mark.parametrize("chosen", [None, "INFO"])
def test_libraries_say_no_more_than_errors_unless_they_are_told_to(chosen, monkeypatch):
    for name in ("GRPC_VERBOSITY", "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    if chosen is not None:
        monkeypatch.setenv("GRPC_VERBOSITY", chosen)
    assert quiet_libraries() == {"GRPC_VERBOSITY": chosen or "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def test_hurry_ends_a_wait(engine_config):
    path, address = engine_config
    child = ChildProcess("coordinator", "octavo.coordinator", path, lambda *line: None)
    control = EngineControl(address)
    control.wait_until_up(child.require_alive)
    control.close()
    hurry = threading.Event()
    hurry.set()
    child.wait(1000, hurry)
    with pytest.raises(UnavailableError, match="was killed by signal 9"):
        child.require_alive()
