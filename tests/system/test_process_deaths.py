"""One process of a running server that is not replaced is killed: the server says so in one line and ends, and leaves
nothing behind. Ranks that are replaced: test_rank_deaths.py."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from .ports import free_port

START_TIMEOUT_S = 120
END_TIMEOUT_S = 25
PREFIX = "octavo: "


def shared_memory_of(process: psutil.Process) -> set[str]:
    """Files in /dev/shm that it maps; those that are unlinked already go with it."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        return {line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line and not line.endswith("(deleted)")}
    return set()


class Server:
    """`octavo serve` in a process group of its own, its run directory under `parent`."""

    def __init__(self, parent, *more_options: str, num_ranks: int = 2) -> None:
        self.parent = parent
        self.grpc_port = free_port()
        options = ["--device", "cpu", "--port", "0", "--grpc-port", str(self.grpc_port), "--max-restarts", "0"]
        options += ["--tensor-parallel-size", str(num_ranks), *more_options]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "octavo", "serve", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"TMPDIR": str(parent), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._wait_until_ready()
        assert list(parent.glob("octavo-*"))
        self.family = psutil.Process(self.process.pid).children(recursive=True)
        self.shared_memory = {path for process in self.family for path in shared_memory_of(process)}

    def _read(self) -> None:
        with self.process.stdout as lines:
            self.lines.extend(lines)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not any("Ctrl-C stops it" in line for line in self.lines):
            assert self.process.poll() is None, self.lines
            assert time.monotonic() < deadline, self.lines
            time.sleep(0.1)

    def kill_one(self, pattern: str) -> None:
        """The first whose name or command line has the pattern."""
        names = {process: f"{process.name()} {' '.join(process.cmdline())}" for process in self.family}
        victims = [process for process, name in names.items() if re.search(pattern, name)]
        assert victims, names
        victims[0].kill()

    def wait(self) -> int:
        """Until it has ended with all its processes, and left nothing; its exit status."""
        status = self.process.wait(END_TIMEOUT_S)
        self.check_that_all_ended(3)
        assert list(self.parent.glob("octavo-*")) == []
        return status

    def check_that_all_ended(self, timeout_s: float) -> None:
        """Processes, the port, shared memory."""
        _, alive = psutil.wait_procs(self.family, timeout=timeout_s)
        assert not alive, alive
        self._reader.join(5)
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", self.grpc_port)) != 0
        assert not [path for path in self.shared_memory if Path(path).exists()]

    def close(self) -> None:
        for process in [self.process, *self.family]:
            if isinstance(process, psutil.Process) and not process.is_running():
                continue
            process.kill()
        self.process.wait()


@pytest.fixture
def server(request):
    """Of two ranks, or as many as a test asks for."""
    with tempfile.TemporaryDirectory(prefix="o", dir="/tmp") as parent:  # short: a socket's path is bounded
        started = Server(Path(parent), num_ranks=getattr(request, "param", 2))
        try:
            yield started
        finally:
            started.close()


@pytest.mark.parametrize(
    ("server", "pattern", "said"),
    [
        (2, "RankActor", "rank . of group 0 died|worker group 0 failed: ."),
        (1, "octavo.gateway", "gateway 0 was killed by signal 9"),
        (1, "octavo.coordinator", "coordinator was killed by signal 9"),
        (1, "gcs_server", "Ray's gcs_server .* died"),
        (2, "^raylet", "Ray's raylet .* died"),
    ],
    indirect=["server"],
    ids=["rank", "gateway", "coordinator", "gcs", "raylet"],
)
def test_a_process_that_dies_ends_the_server_with_one_line(server, pattern, said):
    server.kill_one(pattern)
    assert server.wait() == 1
    errors = [line for line in server.lines if line.startswith(PREFIX)]
    assert len(errors) == 1, server.lines
    assert re.search(said, errors[0]), errors


def test_sigterm_to_the_process_group_ends_the_server(server):
    os.killpg(server.process.pid, signal.SIGTERM)
    assert server.wait() == 0
    assert [line for line in server.lines if line.startswith(PREFIX)] == []


PROGRAM = """
import threading, time
import psutil
from octavo import LLM, SamplingParams
from octavo.errors import UnavailableError

def kill():
    time.sleep(1)
    [victim] = [child for child in psutil.Process().children() if "octavo.coordinator" in child.cmdline()]
    victim.kill()

with LLM(device="cpu", max_model_len=1024) as llm:
    threading.Thread(target=kill).start()
    started = time.monotonic()
    try:
        while True:
            llm.generate(["Once upon a time"] * 8, SamplingParams(max_tokens=900, ignore_eos=True), use_tqdm=False)
    except UnavailableError as error:
        print(f"{time.monotonic() - started:.0f} s: {error}")
"""


def test_an_llm_has_nothing_come_back_and_names_what_died():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    said = re.search(r"^(\d+) s: coordinator was killed by signal 9", run.stdout, re.MULTILINE)
    assert said, run.stdout
    assert int(said[1]) < 30  # a server's gateways would wait for a minute
