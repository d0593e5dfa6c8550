"""A server under attack: `octavo serve` as a process of its own, and the processes that belong to it."""

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
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from ...errors import UnavailableError
from ...launch.signals import StopSignals
from ..serving import free_port
from .orders import ORDERS_VARIABLE, Orders

_START_TIMEOUT_S = 300.0
_END_TIMEOUT_S = 30.0  # beyond what running requests have
_PROCESSES_END_S = 10.0
_POLL_S = 0.05
_NUM_KEPT_LINES = 400
_READY = "Ctrl-C stops it"


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What a server that has ended should not have left."""

    exit_status: int
    processes: Sequence[str] = field(default_factory=list)
    files: Sequence[str] = field(default_factory=list)
    is_port_open: bool = False

    @property
    def is_clean(self) -> bool:
        return self.exit_status == 0 and not self.processes and not self.files and not self.is_port_open


class ChaosServer:
    """Owner of the launcher's process and of the directory that it works in."""

    def __init__(self, options: Sequence[str], directory: Path, log: Path | None = None) -> None:
        """Starts `octavo serve OPTIONS` on a free port. `directory` must be short: sockets' paths are bounded. What the
        server says goes to `log` too."""
        self.port = free_port()
        self.address = f"localhost:{self.port}"
        self._directory, self._orders = directory, directory / "orders"
        self._orders.mkdir()
        command = [sys.executable, "-m", f"{__package__}.faulty_server", "serve", *options]
        self._launcher = subprocess.Popen(
            [*command, "--port", "0", "--grpc-port", str(self.port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | {"TMPDIR": str(directory), ORDERS_VARIABLE: str(self._orders)},
            start_new_session=True,  # Ctrl-C is for us: what the load has open is finished first
        )
        self._lines: deque[str] = deque(maxlen=_NUM_KEPT_LINES)
        self._log = log
        self._is_ready = threading.Event()
        self._reader = threading.Thread(target=self._read, name="server's output", daemon=True)
        self._reader.start()
        self._family: set[psutil.Process] = set()
        self._shared_files: set[str] = set()

    def _read(self) -> None:
        assert self._launcher.stdout is not None
        with open(self._log or os.devnull, "w") as log:
            for line in self._launcher.stdout:
                log.write(line)
                log.flush()
                self._lines.append(line.rstrip())
                if _READY in line:
                    self._is_ready.set()

    @property
    def lines(self) -> list[str]:
        """The last ones of what it said."""
        return list(self._lines)

    def wait_until_ready(self) -> None:
        """Raises UnavailableError, with its own words, if it does not start."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._is_ready.wait(_POLL_S):
            self.require_alive()
            if time.monotonic() > deadline:
                raise UnavailableError(f"the server did not start within {_START_TIMEOUT_S:.0f} s")

    def require_alive(self) -> None:
        """Raises UnavailableError with its last words if the launcher has ended."""
        if (status := self._launcher.poll()) is not None:
            self._reader.join(1)
            said = [line for line in self.lines if line.startswith("octavo: ")] or self.lines[-1:] or ["nothing"]
            raise UnavailableError(f"the server ended with status {status} and said: {said[-1]}")

    # Its processes

    def family(self) -> dict[psutil.Process, str]:
        """The processes that live now, and what each is: launcher, coordinator, gateway, rank or ray."""
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self._launcher.pid)
            found = {launcher: "launcher"} | {child: _kind_of(child) for child in launcher.children(recursive=True)}
            living = {process: kind for process, kind in found.items() if kind}
            self._family |= living.keys()
            return living
        return {}

    def processes_of(self, kind: str) -> list[psutil.Process]:
        """Oldest first."""
        return sorted(
            (process for process, its_kind in self.family().items() if its_kind == kind),
            key=lambda process: (process.create_time(), process.pid),
        )

    def gateways(self) -> list[psutil.Process]:
        """In the order of their numbers."""
        return sorted(self.processes_of("gateway"), key=lambda process: process.cmdline()[-1])

    def rank_at(self, address: str) -> psutil.Process:
        """The rank that listens there. Raises UnavailableError if none does."""
        port = int(address.rpartition(":")[2])
        for process in self.processes_of("rank"):
            if port in _listening_ports(process):
                return process
        raise UnavailableError(f"no rank of the server listens on port {port}")

    def orders_for(self, process: psutil.Process) -> Orders:
        return Orders(self._orders, process.pid)

    # Its end

    def terminate(self) -> None:
        """SIGTERM to the launcher: it drains."""
        for process in self.family():
            self._shared_files |= _shared_files_of(process)
        self._launcher.send_signal(signal.SIGTERM)

    def wait_until_ended(self, shutdown_timeout_s: float) -> Leftovers:
        """After `terminate`. What is left is ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._launcher.wait(shutdown_timeout_s + _END_TIMEOUT_S)
        status = self._launcher.poll()
        processes = [process for process in self._family if process.pid != self._launcher.pid or status is None]
        _, alive = psutil.wait_procs(processes, timeout=_PROCESSES_END_S if status is not None else 0)
        left = [_describe(process) for process in alive]
        is_port_open = _is_open(self.port)
        self.kill()
        files = [*map(str, self._directory.glob("octavo-*")), *(path for path in self._shared_files if _exists(path))]
        return Leftovers(self._launcher.wait() if status is None else status, left, files, is_port_open)

    def kill(self) -> None:
        """All processes that were ever seen, at once."""
        self.family()
        for process in self._family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._launcher.wait()
        self._reader.join(1)


@contextlib.contextmanager
def running_server(options: Sequence[str], log: Path | None = None) -> Iterator[ChaosServer]:
    """One that is ready. Nothing of it is left behind, however the body ends: also by SIGINT or SIGTERM."""
    with tempfile.TemporaryDirectory(prefix="o", dir="/tmp") as directory, StopSignals() as signals:
        server = ChaosServer(options, Path(directory), log)
        try:
            server.wait_until_ready()
            yield server
        finally:
            signals.begin_stop()
            server.kill()


_PATTERNS = {"coordinator": r"octavo\.coordinator", "gateway": r"octavo\.gateway", "rank": "RankActor"}


def _kind_of(process: psutil.Process) -> str:
    """Empty if it has ended."""
    try:
        command = " ".join(process.cmdline())
        if process.status() == psutil.STATUS_ZOMBIE:
            return ""
    except psutil.NoSuchProcess:
        return ""
    return next((kind for kind, pattern in _PATTERNS.items() if re.search(pattern, command)), "ray")


def _listening_ports(process: psutil.Process) -> set[int]:
    try:
        return {place.laddr.port for place in process.net_connections() if place.status == psutil.CONN_LISTEN}
    except psutil.NoSuchProcess:
        return set()


def _shared_files_of(process: psutil.Process) -> set[str]:
    """Files in /dev/shm that it maps; those that are unlinked already go with it."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        return {line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line and not line.endswith("(deleted)")}  # noqa: S108
    return set()


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {process.name()}"
    except psutil.NoSuchProcess:
        return str(process.pid)


def _exists(path: str) -> bool:
    return Path(path).exists()


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
