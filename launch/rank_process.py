"""The end of a rank's process, seen from its own machine."""

import contextlib
import os
import signal
import time

import psutil

_POLL_S = 0.01


def kill_rank(process_id: int) -> None:
    """At once, also if it is stopped. Another program that has the number by now is left alone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        if any("RankActor" in part for part in psutil.Process(process_id).cmdline()):
            os.kill(process_id, signal.SIGKILL)


def wait_until_gone(process_id: int, timeout_s: float) -> None:
    """Until all that the process held is free again, its memory on a GPU too: the system lets go of that before the
    number. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while not _is_gone(process_id):
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {process_id}, a rank that was lost, has not ended within {timeout_s:.0f} s")
        time.sleep(_POLL_S)


def _is_gone(process_id: int) -> bool:
    """A zombie that nobody collects holds nothing, once its last thread has ended."""
    try:
        process = psutil.Process(process_id)
        return bool(process.status() == psutil.STATUS_ZOMBIE and process.num_threads() <= 1)
    except psutil.NoSuchProcess:
        return True
