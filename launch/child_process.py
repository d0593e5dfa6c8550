"""A process of Octavo's own beside this one: coordinator or gateway. Its log lines come through here."""

import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from ..errors import UnavailableError
from .library_logs import quiet_libraries

_NUM_KEPT_LINES = 200
_POLL_S = 0.05


class ChildProcess:
    """Owner of one process. It ends by itself when our end of its stdin closes, so nothing outlives us."""

    def __init__(self, name: str, module: str, config_path: Path, on_log: Callable[[str, str], None]) -> None:
        """Starts `python -m module config_path`. `on_log(name, line)` gets its output, on another thread."""
        self.name = name
        self._on_log = on_log
        self._lines: deque[str] = deque(maxlen=_NUM_KEPT_LINES)
        # A session of its own: Ctrl-C at the terminal is ours to handle, in order. -P: imports do not look in the
        # working directory, where a folder may have a library's name.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(config_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | quiet_libraries(),
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name=f"{name} log", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line.rstrip())
            self._on_log(self.name, line.rstrip())

    @property
    def log(self) -> list[str]:
        """Its last lines."""
        return list(self._lines)

    def require_alive(self) -> None:
        """Raises UnavailableError with the process's last words if it has ended."""
        if self.has_ended:
            remedy = "; start the server again" if self._process.returncode < 0 else ""
            raise UnavailableError(f"{self.describe_end()}{remedy}")

    def describe_end(self) -> str:
        """How it ended, with its last words. It must have."""
        status = self._process.returncode
        self._reader.join(timeout=1)
        if status < 0:
            return f"{self.name} was killed by signal {-status}"
        last_words = self._lines[-1].removeprefix(f"{self.name.split()[0]}: ") if self._lines else "it said nothing"
        return f"{self.name} ended with status {status}: {last_words}"

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def was_drained(self) -> bool:
        """Whether it has ended in order: somebody asked it to."""
        return self._process.poll() == 0

    def kill(self) -> None:
        """Ends it where it is, whatever it does; returns when it has ended."""
        self._process.kill()
        self._process.wait()

    def terminate(self) -> None:
        """Asks it to end; see `wait`."""
        if self._process.poll() is None:
            self._process.terminate()

    def wait(self, timeout_s: float, hurry: threading.Event) -> None:
        """Until it has ended; kills it after `timeout_s`, or when `hurry` is set."""
        deadline = time.monotonic() + timeout_s
        while self._process.poll() is None and time.monotonic() < deadline and not hurry.is_set():
            time.sleep(_POLL_S)
        if self._process.poll() is None:
            self._process.kill()
        self.reap()

    def reap(self) -> None:
        """Takes leave of it once it has ended."""
        self._process.wait()
        self._reader.join(timeout=1)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
