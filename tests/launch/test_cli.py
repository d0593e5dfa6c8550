"""The command line: what it prints, and errors as one line with an exit status."""

import io
import json
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import version

import pytest
from octavo.errors import FailedPreconditionError, NotFoundError
from octavo.launch.cli import run
from octavo.launch.config import ServeConfig
from octavo.proto import admin_pb2


def one_line(capsys):
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("octavo: ")
    return captured.err


def test_version(capsys):
    assert run(["version"]) == 0
    assert capsys.readouterr().out.strip() == version("octavo")


def test_help_lists_the_commands(capsys):
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("serve", "generate", "chat", "status", "scale", "version"))


def test_serve_offers_every_option(capsys):
    assert run(["serve", "--help"]) == 0
    out = capsys.readouterr().out
    names = [spec.name for spec in fields(ServeConfig)]
    assert [name for name in names if name != "model" and f"--{name.replace('_', '-')}" not in out] == []
    assert "--config" in out


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        (["serve", "/no/such/model"], 1, "does not exist"),
        (["serve", "--port", "abc"], 2, "--port"),
        (["serve", "--port", "70000"], 1, "port must be in"),
        (["serve", "--device", "tpu"], 2, "--device"),
        (["serve", "--block-sise", "8"], 2, "--block-sise"),
        (["serve", "--config", "/no/such/file.yaml"], 1, "/no/such/file.yaml"),
        (["sevre"], 2, "sevre"),
        (["generate"], 1, "--token-ids"),
        (["generate", "hi", "--token-ids", "1"], 1, "not both"),
        (["generate", "--token-ids", "1;2"], 1, "integers and commas"),
        (["generate", "hi", "--temperature", "-1"], 1, "temperature"),
        (["generate", "hi", "--n", "2"], 1, "set a temperature"),
        (["generate", "hi", "--n", "129", "--temperature", "1"], 1, "n must be in"),
        (["generate", "hi", "--num-beams", "1"], 1, "beam_width"),
        (["generate", "hi", "--num-beams", "2", "--n", "3"], 1, "at least n"),
        (["generate", "hi", "--num-beams", "2", "--temperature", "1"], 1, "--temperature"),
        (["generate", "hi", "--num-beams", "2", "--seed", "1"], 1, "--seed"),
        (["scale", "--num-groups", "0"], 1, "num_groups must be at least 1, got 0"),
        (["scale", "--tensor-parallel-size", "-1"], 1, "tensor_parallel_size must be at least 1, got -1"),
        (["scale", "--num-groups", "x"], 2, "--num-groups"),
        (["scale", "--num-groups", "2", "--address", "unix:/no/such.sock"], 1, "no server answers"),
    ],
)
def test_an_error_is_one_line(capsys, arguments, status, reason):
    assert run(arguments) == status
    assert reason in one_line(capsys)


def test_generate_streams_text(capsys, fake_server, deltas):
    fake_server.answer = lambda request: deltas(" upon a time")
    assert run(["generate", "Once", "--address", fake_server.address, "--max-tokens", "12", "--seed", "3"]) == 0
    assert capsys.readouterr().out == " upon a time\n"
    [request] = fake_server.requests
    assert (request.text, request.sampling_params.max_tokens, request.sampling_params.seed) == ("Once", 12, 3)
    assert request.sampling_params.temperature == 0


def test_generate_prints_token_ids_where_there_is_no_text(capsys, fake_server, deltas):
    def answer(request):
        for response in deltas("abc"):
            response.outputs[0].text = ""
            yield response

    fake_server.answer = answer
    assert run(["generate", "--token-ids", "1,2", "--address", fake_server.address]) == 0
    assert capsys.readouterr().out == "97,98,99\n"


def test_generate_prints_several_outputs(capsys, fake_server, samples):
    fake_server.answer = lambda request: samples(
        " upon", " there", scores=[-0.5, -1] * bool(request.sampling_params.num_beams)
    )
    arguments = ["generate", "Once", "--address", fake_server.address, "--n", "2"]
    assert run([*arguments, "--temperature", "1", "--seed", "3"]) == 0
    assert capsys.readouterr().out == "[0]  upon\n[1]  there\n"
    assert run([*arguments, "--num-beams", "4"]) == 0
    assert capsys.readouterr().out == "[0] (-0.5000)  upon\n[1] (-1.0000)  there\n"
    sampled, searched = (request.sampling_params for request in fake_server.requests)
    assert (sampled.n, sampled.num_beams, sampled.seed) == (2, 0, 3)
    assert (searched.n, searched.num_beams, searched.max_tokens) == (2, 4, 256)


def test_a_servers_refusal_is_one_line(capsys, fake_server):
    def answer(request):
        raise NotFoundError("model 'x' is not served;\nserved: y")

    fake_server.answer = answer
    assert run(["generate", "hi", "--model", "x", "--address", fake_server.address]) == 1
    assert "served: y" in one_line(capsys)


def test_chat_remembers_the_conversation(capsys, monkeypatch, fake_server, deltas):
    fake_server.answer = lambda request: deltas(f"answer {len(request.chat.messages)}")
    monkeypatch.setattr("sys.stdin", io.StringIO("first\n\nsecond\n"))
    assert run(["chat", "--address", fake_server.address, "--system", "be kind"]) == 0
    out = capsys.readouterr().out
    assert "answer 2" in out
    assert "answer 4" in out
    roles = [message.role for message in fake_server.requests[1].chat.messages]
    assert roles == ["system", "user", "assistant", "user"]


def test_a_failed_turn_of_a_chat_is_taken_back(capsys, monkeypatch, fake_server, deltas):
    def answer(request):
        if len(fake_server.requests) == 1:
            raise NotFoundError("gone for a moment")
        return deltas("fine")

    fake_server.answer = answer
    monkeypatch.setattr("sys.stdin", io.StringIO("first\nsecond\n"))
    assert run(["chat", "--address", fake_server.address]) == 0
    out = capsys.readouterr().out
    assert "gone for a moment" in out
    assert "fine" in out
    assert [message.content for message in fake_server.requests[1].chat.messages] == ["second"]


def test_status_shows_groups_ranks_and_counters(capsys, fake_server):
    status = admin_pb2.GetStatusResponse(version="1", model="fake", num_waiting=7, num_gateways=1)
    group = status.groups.add(group_id=0, state=admin_pb2.GROUP_STATE_READY, num_blocks=100, num_free_blocks=75)
    group.ranks.add(rank=0, device="cuda:1", address="host:123")
    group.epoch, group.num_restarts = 961, 953
    group.steps.num_steps = 4
    group.steps.step_time_s = 0.01
    status.counters.num_preemptions = 42
    fake_server.status = status
    assert run(["status", "--address", fake_server.address]) == 0
    out = capsys.readouterr().out
    for shown in ("7 waiting", "ready", "961", "953", "25 (25%)", "cuda:1", "host:123", "2.50", "42"):
        assert shown in out


def test_scale_says_what_happens_and_then_what_went_wrong(capsys, fake_server):
    fake_server.scaling = ["starting 1 group(s)", FailedPreconditionError("no room")]
    assert run(["scale", "--num-groups", "2", "--tensor-parallel-size", "4", "--address", fake_server.address]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines() == ["starting 1 group(s)"]
    assert captured.err.splitlines() == ["octavo: no room"]
    [request] = fake_server.requests
    assert (request.num_groups, request.tensor_parallel_size) == (2, 4)
    fake_server.scaling = ["done"]
    assert run(["scale", "--tensor-parallel-size", "4", "--address", fake_server.address]) == 0
    assert fake_server.requests[1].num_groups == 0


def test_status_of_a_group_that_starts(capsys, fake_server):
    fake_server.status.groups.add(group_id=0, state=admin_pb2.GROUP_STATE_STARTING)
    fake_server.status.groups.add(group_id=1, state=admin_pb2.GROUP_STATE_REBUILDING)
    fake_server.status.groups.add(group_id=2, state=admin_pb2.GROUP_STATE_DRAINING)
    assert run(["status", "--address", fake_server.address]) == 0
    out = capsys.readouterr().out
    assert all(state in out for state in ("starting", "rebuilding", "draining"))


def test_status_shows_what_blocks_hold(capsys, fake_server):
    status = admin_pb2.GetStatusResponse()
    group = status.groups.add(group_id=3, num_blocks=100, num_free_blocks=60, block_size=16)
    group.blocks.num_used, group.blocks.num_shared, group.blocks.num_cached = 40, 7, 25
    group.blocks.num_table_entries, group.blocks.num_empty_places = 50, 24
    group.blocks.num_host, group.blocks.num_host_used, group.blocks.num_in_transfer = 200, 11, 5
    counters = group.block_counters
    counters.num_looked_up_tokens, counters.num_device_hit_tokens, counters.num_host_hit_tokens = 1000, 345, 55
    counters.sum_used, counters.sum_table_entries, counters.sum_empty_places = 900, 1000, 320
    counters.num_copied_blocks, counters.num_evicted_blocks = 71, 72
    counters.num_saved_blocks, counters.num_loaded_blocks = 73, 74
    counters.num_received_blocks = 75
    fake_server.status = status
    assert run(["status", "--blocks", "--address", fake_server.address]) == 0
    out = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert cells == [
        ["blocks", "100 x 16"],
        ["used", "40 (40%)"],
        ["shared", "7"],
        ["free", "60 (60%)"],
        ["cached", "25 (25%)"],
        ["in transfer", "5"],
        ["on the host", "11 of 200"],
        ["entries of block tables", "50"],
        ["empty places", "24"],
        ["fragmentation", "3.0%"],
        ["saved by sharing", "20.0%"],
        ["since the start", ""],
        ["fragmentation, mean", "2.0%"],
        ["saved by sharing, mean", "10.0%"],
        ["prompt tokens looked up", "1000"],
        ["found on the device", "34.5%"],
        ["found on the host", "5.5%"],
        ["blocks copied on write", "71"],
        ["saved to the host", "73"],
        ["loaded from the host", "74"],
        ["cached, then evicted", "72"],
        ["received from other groups", "75"],
    ]


def test_status_of_the_blocks_of_many_groups(capsys, fake_server):
    for group_id in range(10):
        fake_server.status.groups.add(group_id=group_id, num_blocks=123456, num_free_blocks=1, block_size=16)
    assert run(["status", "--blocks", "--address", fake_server.address]) == 0
    out = capsys.readouterr().out
    assert [f"group {group_id}" for group_id in range(10) if f"group {group_id}" not in out] == []
    assert out.count("123456 x 16") == 10


def test_status_of_blocks_without_a_host_tier(capsys, fake_server):
    fake_server.status.groups.add(group_id=0, state=admin_pb2.GROUP_STATE_STARTING)
    assert run(["status", "--blocks", "--address", fake_server.address]) == 0
    assert "none" in capsys.readouterr().out
    fake_server.status.ClearField("groups")
    assert run(["status", "--blocks", "--address", fake_server.address]) == 0
    assert "no worker groups" in capsys.readouterr().out


def test_neither_the_package_nor_the_command_line_loads_torch_or_ray():
    program = (
        "import sys, json, octavo, octavo.launch.cli; octavo.Client, octavo.SamplingParams, octavo.BeamSearchParams;"
        "print(json.dumps([name for name in ('torch', 'ray', 'transformers') if name in sys.modules]))"
    )
    answer = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout) == []
