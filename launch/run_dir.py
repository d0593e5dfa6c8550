"""The directory of one server's sockets, configurations and Ray files, which lives as long as its launcher."""

import fcntl
import shutil
import tempfile
from pathlib import Path

from google.protobuf import json_format
from google.protobuf.message import Message

_PREFIX = "octavo-"
_LOCK = "lock"
# A Unix socket's path has at most 107 bytes, and Ray adds about 70 to the directory's.
_MAX_BYTES = 35


class RunDir:
    """Owner of the directory. Its lock says that the launcher lives; what a killed one left is removed by the next."""

    def __init__(self, parent: Path | None = None) -> None:
        """Under `parent`; by default the system's place for temporary files, or /tmp if that path is too long."""
        parent = parent or _default_parent()
        _remove_abandoned(parent)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        unlocked = self.path / f"{_LOCK}.new"
        self._lock = unlocked.open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unlocked.rename(self.path / _LOCK)  # seen by others only now that it is held

    def socket(self, name: str) -> str:
        """The gRPC address of a Unix socket in it."""
        return f"unix:{self.path}/{name}.sock"

    def write(self, name: str, config: Message) -> Path:
        """A process's configuration, in protobuf's JSON form."""
        path = self.path / f"{name.replace(' ', '-')}.json"
        path.write_text(json_format.MessageToJson(config))
        return path

    def remove(self) -> None:
        """With all that is in it, also what Ray's last processes still write."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _default_parent() -> Path:
    parent = Path(tempfile.gettempdir())
    fits = len(str(parent / f"{_PREFIX}12345678").encode()) <= _MAX_BYTES
    return parent if fits else Path("/tmp")  # noqa: S108 - mkdtemp makes it private


def _remove_abandoned(parent: Path) -> None:
    for lock in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        try:
            with lock.open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
        except OSError:  # held by a live launcher, another user's, or removed meanwhile: not ours to remove
            continue
