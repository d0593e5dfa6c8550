"""Every kind of fault once, under 32 streams, by the tool that a user would take: nothing is lost, wrong or leaked."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.alone

# Each kind that the server is to survive, on one group and on two. Each comes when all that the one before it led to is
# over, so most of them later than here.
SCRIPT = """
at 0 kill-rank group=0 rank=1
at 3 raise group=0 rank=1
at 4 drop-reply group=0
at 5 repeat-reply group=0
at 6 stop-rank group=0 rank=0 seconds=1
at 7 kill-coordinator
at 8 stop-coordinator seconds=2
at 10 kill-gateway gateway=0
at 11 scale groups=2
at 20 kill-rank group=1 rank=0
at 25 kill-coordinator
at 26 scale groups=1
at 28 stop-rank group=0 rank=0
at 30 drain
"""
OPTIONS = "--device cpu --tensor-parallel-size 2 --num-gateways 2 --step-timeout-s 3 --duration 30"
NUM_STREAMS = 32  # and as many requests: each kind also with a long prompt
# The server knows of a change of scale, and misses nobody who stands still for less than its patience.
UNNOTICED = {"scale groups=2", "scale groups=1", "stop-rank group=0 rank=0 seconds=1", "stop-coordinator seconds=2"}


def test_no_fault_costs_a_request_or_a_token(tmp_path):
    script, result = tmp_path / "script.txt", tmp_path / "result.json"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "octavo", "bench", "chaos", *OPTIONS.split()]
    command += ["--num-streams", str(NUM_STREAMS), "--num-requests", str(NUM_STREAMS)]
    run = subprocess.run(
        [*command, "--script", str(script), "--json", str(result)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    tables = json.loads(result.read_text())["tables"]
    [load], faults, [end] = tables["Load"], tables["Faults"], tables["End"]
    assert load["requests_finished"] > NUM_STREAMS
    assert load["tokens_compared"] > NUM_STREAMS * 16
    # Requests wait for a group that is rebuilt and for a coordinator that follows: nobody is refused. A gateway takes
    # its connections with it, and no more than one request of each stream was on them.
    assert load["refused_and_asked_again"] == 0
    assert 0 < load["broken_by_killed_gateways"] <= NUM_STREAMS
    assert [fault["fault"] for fault in faults] == SCRIPT.strip().splitlines()[:-1]
    for fault in faults:
        is_noticed = fault["noticed_after_s"] is not None
        assert is_noticed == (fault["fault"].split(maxsplit=2)[2] not in UNNOTICED), fault
        assert fault["whole_after_s"] < 60
    assert (end["leaked_blocks"], end["ended"], end["exit_status"], end["processes_left"]) == (0, "under load", 0, 0)
    assert end["blocks"] > 0
