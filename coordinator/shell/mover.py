"""Has blocks copied from group to group, as the scheduler wants it: of sequences before they move, of hot prefixes."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from ..core.drain import WantedCopy
from ..core.hot_prefixes import WantedPrefix
from ..core.scheduler import Scheduler
from .block_copier import BlockCopier


class Mover:
    """Owner of the copies that were asked for and are not over. All methods run on the engine's event loop."""

    def __init__(self, scheduler: Scheduler, copier: BlockCopier, wake_groups: Callable[[], None]) -> None:
        self._scheduler, self._copier, self._wake_groups = scheduler, copier, wake_groups
        self._copying: set[asyncio.Task[None]] = set()

    def begin(self) -> None:
        """What the scheduler wants by now."""
        for wanted in self._scheduler.moves.take_wanted():
            self._start(self._copy(wanted))
        for prefix in self._scheduler.hot_prefixes.take_wanted():
            self._start(self._copy_prefix(prefix))

    def _start(self, copy: Coroutine[Any, Any, None]) -> None:
        copying = asyncio.create_task(copy)
        self._copying.add(copying)
        copying.add_done_callback(self._copying.discard)

    async def _copy(self, wanted: WantedCopy) -> None:
        """Whatever becomes of it, the sequence is to move: without its blocks it is computed again."""
        try:
            await self._copier.copy_sequence_blocks(wanted.sequence, wanted.source_id, wanted.target_id)
        finally:
            self._scheduler.end_copy(wanted)
            self._wake_groups()  # of the target, which may be idle, and of those in which blocks were let go

    async def _copy_prefix(self, wanted: WantedPrefix) -> None:
        try:
            await self._copier.copy_prefix(wanted.names, wanted.source_id, wanted.target_id)
        finally:
            self._scheduler.hot_prefixes.end(wanted)
            self._wake_groups()  # as above

    async def close(self) -> None:
        for copying in self._copying:
            copying.cancel()
        await asyncio.gather(*self._copying, return_exceptions=True)
