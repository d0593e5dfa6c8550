"""The thread on which one copy between ranks runs, beside the threads that drive the device."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ..errors import UnavailableError

T = TypeVar("T")

_LET_GO_S = 5.0  # how long an aborted copy may take to give its thread back


@dataclass(frozen=True, slots=True)
class CopySettings:
    """What all copies of a rank have in common."""

    device: torch.device
    num_threads: int  # CPU threads of torch's operations
    host: str  # this machine's address


class CopyThread:
    """Runs functions one after another. One that does not end when it is to is left alone."""

    def __init__(self, settings: CopySettings) -> None:
        self._executor = ThreadPoolExecutor(1, "copy", initializer=_prepare, initargs=(settings,))

    async def run(self, function: Callable[[], T], until: asyncio.Future[Any], abort: Callable[[], None]) -> T:
        """The function's result. When `until` is done first, or this call is cancelled, `abort` is to end it.

        Raises UnavailableError if it does not end then.
        """
        running = asyncio.get_running_loop().run_in_executor(self._executor, function)
        try:
            await asyncio.wait({running, until}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not running.done():
                abort()
                await asyncio.wait({running}, timeout=_LET_GO_S)
        if not running.done():
            running.add_done_callback(_note_failure)
            raise UnavailableError("the copy was broken off, and its thread is stuck")
        return running.result()

    async def complete(self, function: Callable[[], T]) -> T:
        """As `run`, of what is to be done whatever happens: returns, or is cancelled, when it is."""
        running = asyncio.get_running_loop().run_in_executor(self._executor, function)
        try:
            await asyncio.wait({running})
        finally:
            await asyncio.wait({running})
        return running.result()

    async def close(self, last: Callable[[], None]) -> bool:
        """Runs `last` behind what runs; whether both have ended. They are not waited for beyond reason."""
        ending = asyncio.get_running_loop().run_in_executor(self._executor, last)
        self._executor.shutdown(wait=False)
        ending.add_done_callback(_note_failure)
        await asyncio.wait({ending}, timeout=_LET_GO_S)
        return ending.done()


def _note_failure(running: asyncio.Future[Any]) -> None:
    """Nobody waits for it any more."""
    if not running.cancelled():
        running.exception()


def _prepare(settings: CopySettings) -> None:
    torch.set_num_threads(settings.num_threads)  # as on the device thread: some libraries know but one number
    if settings.device.type == "cuda":
        torch.cuda.set_device(settings.device)
