"""How the process of a lost rank is ended, and waited for."""

import subprocess
import sys
import threading
import time

import psutil
import pytest
from octavo.launch.rank_process import kill_rank, wait_until_gone

SLEEP = "import time; time.sleep(60)"


@pytest.fixture
def start():
    """start(*arguments) -> a process with these in its command line."""
    started = []

    def start(*arguments):
        started.append(subprocess.Popen([sys.executable, "-c", SLEEP, *arguments]))
        while not psutil.Process(started[-1].pid).cmdline():  # the system fills it in a moment later
            time.sleep(0.001)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_rank_that_is_stopped_is_killed_and_gone(start):
    process = start("ray::RankActor")
    psutil.Process(process.pid).suspend()
    kill_rank(process.pid)
    wait_until_gone(process.pid, timeout_s=10)  # though nobody has collected it
    assert process.wait(0) < 0


def test_another_program_of_that_number_is_left_alone(start):
    process = start()
    kill_rank(process.pid)
    with pytest.raises(TimeoutError, match=f"process {process.pid}, a rank that was lost, has not ended"):
        wait_until_gone(process.pid, timeout_s=0.2)
    assert process.poll() is None


def test_one_that_takes_a_while_to_end_is_waited_for(start):
    process = start("RankActor")
    threading.Timer(0.3, process.kill).start()
    started = time.monotonic()
    wait_until_gone(process.pid, timeout_s=10)
    assert time.monotonic() - started >= 0.25


def test_one_that_is_long_gone_is_gone(start):
    process = start()
    process.kill()
    process.wait()
    kill_rank(process.pid)
    wait_until_gone(process.pid, timeout_s=0)
