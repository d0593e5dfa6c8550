"""Every kind of fault once, under 64 streams, by the tool that a user would take: nothing is lost, wrong or leaked."""

import json
import os
import subprocess
import sys

# One line for each kind that the server is to survive.
SCRIPT = """
at 1 kill-rank group=0 rank=1
at 5 raise group=0 rank=1
at 8 drop-reply group=0
at 12 repeat-reply group=0
at 16 stop-rank group=0 rank=0 seconds=1
at 26 stop-rank group=0 rank=0
at 30 drain
"""
OPTIONS = "--device cpu --tensor-parallel-size 2 --num-gateways 2 --step-timeout-s 3 --duration 30 --num-requests 48"
UNNOTICED = {"stop-rank group=0 rank=0 seconds=1"}


def test_no_fault_costs_a_request_or_a_token(tmp_path):
    script, result = tmp_path / "script.txt", tmp_path / "result.json"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "octavo", "bench", "chaos", *OPTIONS.split()]
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
    assert load["requests_finished"] > 64
    assert load["tokens_compared"] > 64 * 16
    # No group and no gateway was ever all gone, and requests wait for one that is rebuilt: nobody is refused.
    assert load["refused_and_asked_again"] == load["broken_by_killed_gateways"] == 0
    assert [fault["fault"] for fault in faults] == SCRIPT.strip().splitlines()[:-1]
    for fault in faults:
        is_noticed = fault["noticed_after_s"] is not None
        assert is_noticed == (fault["fault"].split(maxsplit=2)[2] not in UNNOTICED), fault
        assert fault["whole_after_s"] < 60
    assert (end["leaked_blocks"], end["ended"], end["exit_status"], end["processes_left"]) == (0, "under load", 0, 0)
    assert end["blocks"] > 0
