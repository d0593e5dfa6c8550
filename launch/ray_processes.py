"""The processes of a Ray that this one started: found, watched, and killed when Ray itself no longer answers."""

import contextlib

import psutil

from ..errors import UnavailableError

# Without these nothing of Ray answers, and its calls wait for a minute.
_VITAL = frozenset({"gcs_server", "raylet"})
_KILL_TIMEOUT_S = 3.0


class RayProcesses:
    """Made before Ray starts: what this process starts between then and `note_started` is Ray's."""

    def __init__(self) -> None:
        self._others = set(psutil.Process().children())
        self._roots: set[psutil.Process] = set()
        self._vital: dict[psutil.Process, str] = {}
        self._found: set[psutil.Process] = set()

    def note_started(self) -> None:
        """Ray's own processes run."""
        self._roots = set(psutil.Process().children()) - self._others
        self._found |= self._roots
        for process in self._roots:
            with contextlib.suppress(psutil.NoSuchProcess):
                if (name := process.name()) in _VITAL:
                    self._vital[process] = name
        self.note_descendants()

    def note_descendants(self) -> None:
        """Ray's processes have started others, actors perhaps: they stay known when their parent dies."""
        for root in self._roots:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._found |= set(root.children(recursive=True))

    def require_alive(self) -> None:
        """Raises UnavailableError if one has ended without which Ray does not answer."""
        for process, name in self._vital.items():
            if not _is_alive(process):
                raise UnavailableError(f"Ray's {name} (process {process.pid}) died; start the server again")

    @property
    def is_intact(self) -> bool:
        """Whether all that Ray started at first still run.

        After a SIGTERM to the whole process group, as `timeout` and systemd send it, the lesser ones are gone at once;
        the vital ones live on for up to 10 s, but no longer answer.
        """
        return all(_is_alive(process) for process in self._roots)

    def kill(self) -> None:
        """All that are left, at once."""
        self.note_descendants()
        for process in self._found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(list(self._found), timeout=_KILL_TIMEOUT_S)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
