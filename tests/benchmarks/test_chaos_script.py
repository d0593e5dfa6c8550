"""Scripts of faults: what they say, what is refused, and that random ones come again with their seed."""

import pytest
from octavo.benchmarks.chaos.command import DEFAULT_FAULTS, serve_options
from octavo.benchmarks.chaos.random_script import RandomFaults, make_script
from octavo.benchmarks.chaos.script import FAULT_KINDS, Fault, Shape, check_script, parse_script
from octavo.errors import InvalidArgumentError
from octavo.launch.cli import run as run_octavo
from octavo.launch.config import ServeConfig

TWO_GROUPS = Shape(num_groups=2, tensor_parallel_size=2, num_gateways=2)

SCRIPT = """
# every kind
at 1 kill-rank group=0 rank=1
at 2.5 stop-rank group=1 rank=0 seconds=1.5   # and goes on
at 3 stop-rank group=1 rank=0
at 4 raise group=0 rank=1
at 5 drop-reply group=0
at 5 repeat-reply group=1
at 6 kill-coordinator
at 7 stop-coordinator seconds=2
at 8 kill-gateway gateway=1
at 9 scale groups=3
at 10 kill-rank group=2 rank=0
at 11 scale groups=1 ranks=4
at 12 kill-rank group=0 rank=3
at 13 drain
"""


def test_a_script_has_every_kind_and_is_written_as_it_is_read():
    faults = parse_script(SCRIPT)
    assert {fault.kind for fault in faults} == set(FAULT_KINDS)
    assert faults[1] == Fault(2.5, "stop-rank", {"group": 1, "rank": 0, "seconds": 1.5})
    assert faults[2].seconds is None
    assert parse_script("\n".join(map(str, faults))) == faults
    check_script(faults, TWO_GROUPS)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("kill-rank", "line 1: a fault is written as: at SECONDS KIND name=number ..."),
        ("at 1 explode", "line 1: 'explode' is not a fault; known are kill-rank, "),
        ("at soon drain", "line 1: the time must be a number, got 'soon'"),
        ("at -1 drain", "line 1: the time must be 0 or more, got '-1'"),
        ("at nan drain", "line 1: the time must be 0 or more, got 'nan'"),
        ("at 1 kill-rank group=0", "line 1: kill-rank needs rank="),
        ("at 1 kill-rank", "line 1: kill-rank needs group= and rank="),
        ("at 1 drop-reply group=0 rank=0", "line 1: drop-reply takes no rank="),
        ("at 1 drop-reply group", "line 1: 'group' is not name=number"),
        ("at 1 drop-reply group=0.5", "line 1: group must be whole, got '0.5'"),
        ("at 1 drop-reply group=0 group=0", "line 1: drop-reply has an argument twice"),
        ("at 2 drop-reply group=0\nat 1 drain", "'at 1 drain' comes after 'at 2 drop-reply group=0'; write faults in"),
        ("at 1 drain\nat 2 drop-reply group=0", "'at 2 drop-reply group=0' comes after drain, which ends the server"),
    ],
)
def test_what_is_wrong_with_a_script_is_one_line(line, message):
    with pytest.raises(InvalidArgumentError) as caught:
        parse_script(line)
    assert str(caught.value).startswith(f"fault script: {message}")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("at 1 kill-rank group=2 rank=0", "the server has 2 group(s) then, counted from 0"),
        ("at 1 kill-rank group=0 rank=2", "the server has 2 rank(s) then"),
        ("at 1 kill-gateway gateway=2", "the server has 2 gateway(s) then"),
        ("at 1 scale groups=1\nat 2 drop-reply group=1", "the server has 1 group(s) then"),
        ("at 1 scale groups=1 ranks=1\nat 2 raise group=0 rank=1", "the server has 1 rank(s) then"),
        ("at 1 scale groups=0", "a server has at least 1 group of 1 rank"),
        ("at 1 scale groups=1 ranks=0", "a server has at least 1 group of 1 rank"),
    ],
)
def test_a_fault_of_what_is_not_there_is_refused(script, message):
    with pytest.raises(InvalidArgumentError, match="fault script: ") as caught:
        check_script(parse_script(script), TWO_GROUPS)
    assert message in str(caught.value)


@pytest.mark.parametrize("seed", range(20))
def test_random_faults_are_a_script_that_the_server_can_run(seed):
    kinds = tuple(FAULT_KINDS)
    wanted = RandomFaults(kinds, duration_s=600, interval_s=10, step_timeout_s=5, seed=seed)
    faults = make_script(wanted, TWO_GROUPS)
    check_script(faults, TWO_GROUPS)
    assert parse_script("\n".join(map(str, faults))) == faults
    assert faults == make_script(wanted, TWO_GROUPS)
    assert {fault.kind for fault in faults} == set(kinds)
    assert faults[-1] == Fault(600, "drain")
    assert 30 < len(faults) < 120


def test_other_seeds_are_other_faults():
    shape = Shape(1, 2, 1)
    first, second = (make_script(RandomFaults(("kill-rank", "raise"), 300, 10, 5, seed), shape) for seed in (1, 2))
    assert first != second


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--faults kill-rank,explode", "--faults takes kill-rank, "),
        ("--interval 0", "interval must be over 0 seconds"),
        ("--duration 0", "duration must be over 0 seconds"),
        ("--duration nan", "duration must be over 0 seconds"),
        ("--num-streams 0", "num_streams must be at least 1"),
        ("--num-requests 0", "num_requests must be at least 1"),
        ("--script /nowhere/script.txt", "--script /nowhere/script.txt: "),
        ("--max-model-len 100", "the load's requests take up to 860 tokens"),
        ("--ray-address auto", "they must be on this machine"),
        ("--tensor-parallel-size 0", "tensor_parallel_size must be in"),
        ("--json /nowhere/x/y.json", "not a file in an existing directory"),
    ],
)
def test_bad_options_are_one_line_before_anything_starts(options, message, capsys):
    assert run_octavo(["bench", "chaos", *options.split()]) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


def test_the_script_that_is_run_is_written_down(tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr("octavo.benchmarks.chaos.command.run_chaos", lambda settings, say: runs.append(settings))
    monkeypatch.setattr("octavo.benchmarks.chaos.command.add_tables", lambda outcome, report: None)
    monkeypatch.setattr("octavo.benchmarks.chaos.command.require_kept", lambda outcome: None)
    saved = tmp_path / "script.txt"
    options = ["--tensor-parallel-size", "2", "--duration", "100", "--seed", "7"]
    assert run_octavo(["bench", "chaos", *options, "--save-script", str(saved)]) == 0
    assert saved.read_text().startswith("# random, seed 7, 1 group(s) of 2\nat 5 ")
    assert run_octavo(["bench", "chaos", *options, "--script", str(saved)]) == 0
    assert runs[0].script == runs[1].script
    assert {fault.kind for fault in runs[0].script} == set(DEFAULT_FAULTS.split(","))


def test_the_server_gets_the_options_that_differ_from_its_own():
    config = ServeConfig(
        model="x", tensor_parallel_size=2, enable_prefix_caching=False, num_gpu_blocks_override=100, grpc_port=7
    )
    options = ["x", "--tensor-parallel-size", "2", "--num-gpu-blocks-override", "100", "--no-enable-prefix-caching"]
    assert serve_options(config) == options
