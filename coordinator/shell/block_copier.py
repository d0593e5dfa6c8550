"""Runs copies of KV blocks between groups, beside their steps: of sequences that are to move, and of hot prefixes."""

import asyncio
import logging
from collections.abc import Callable, Sequence

from ...errors import OctavoError
from ...proto import worker_pb2
from ..core.block_copies import BlockCopies, BlockCopy
from ..core.scheduler import Scheduler
from ..core.sequence import Sequence as RunningSequence
from .codec import pack
from .worker_link import WorkerLink

_log = logging.getLogger(__name__)


class BlockCopier:
    """Owner of the copies on their way. All methods run on the engine's event loop."""

    def __init__(self, scheduler: Scheduler, link_of: Callable[[int], WorkerLink]) -> None:
        """`link_of`: the wires to a group that serves."""
        self._scheduler, self._link_of = scheduler, link_of
        self._copies = BlockCopies(scheduler.groups)
        self._news = asyncio.Event()  # replaced each time that it is set
        self._finishing: set[asyncio.Task[int]] = set()
        self._lanes: dict[int, asyncio.Lock] = {}  # by target: its ranks receive one copy at a time

    def notice(self) -> None:
        """A step has ended, or a group is lost."""
        self._news.set()
        self._news = asyncio.Event()

    async def copy_sequence_blocks(self, sequence: RunningSequence, from_group: int, to_group: int) -> int:
        """Copies the full blocks of a sequence that runs in one group into the prefix cache of another, where it finds
        them once it is placed there; it runs on meanwhile. Returns how many came: fewer, or none, where that fails, has
        no room, or costs more than to compute them again. Raises nothing."""

        def names() -> Sequence[bytes]:  # once it is its turn
            if sequence.group_id != from_group or not sequence.reads_cache:
                return ()
            num_tokens = min(sequence.num_tokens, sequence.num_sent_tokens)
            return sequence.block_names(num_tokens // self._scheduler.groups[from_group].blocks.block_size)

        return await self._copy_blocks(names, from_group, to_group)

    async def copy_prefix(self, names: Sequence[bytes], from_group: int, to_group: int) -> int:
        """As copy_sequence_blocks, for what the one group has of blocks of these names; nobody waits for them, so they
        come only where there is more than room enough, and not between groups of which one is to leave."""

        def wanted() -> Sequence[bytes]:  # once it is its turn
            leaves = any(self._scheduler.groups[group_id].is_draining for group_id in (from_group, to_group))
            return () if leaves else names

        return await self._copy_blocks(wanted, from_group, to_group, in_abundance=True)

    async def _copy_blocks(
        self, names: Callable[[], Sequence[bytes]], from_group: int, to_group: int, in_abundance: bool = False
    ) -> int:
        async with self._lanes.setdefault(to_group, asyncio.Lock()):
            groups = self._scheduler.groups
            if from_group not in groups or to_group not in groups:
                return 0
            source, target = self._link_of(from_group), self._link_of(to_group)
            if len(source.endpoints) != len(target.endpoints):  # shards of other heads
                return 0
            copy = self._copies.begin(names(), groups[from_group], groups[to_group], in_abundance)
            return 0 if copy is None else await self._run(copy, source, target)

    async def _run(self, copy: BlockCopy, source: WorkerLink, target: WorkerLink) -> int:
        try:
            while not self._copies.is_ready(copy) and not self._copies.is_over(copy):
                await self._news.wait()
        except asyncio.CancelledError:
            self._copies.drop(copy)
            raise
        if self._copies.is_over(copy):
            self._copies.drop(copy)
            return 0
        # What ranks write to is not let go before they have answered, whatever becomes of who waits here.
        finishing = asyncio.create_task(self._finish(copy, source, target))
        self._finishing.add(finishing)
        finishing.add_done_callback(self._finishing.discard)
        return await asyncio.shield(finishing)

    async def _finish(self, copy: BlockCopy, source: WorkerLink, target: WorkerLink) -> int:
        way = f"group {copy.source.group_id} to group {copy.target.group_id}"
        try:
            answer = await target.receive_blocks(source, _encode(copy))
        except OctavoError as error:
            _log.warning("%d KV blocks were not copied from %s: %s", len(copy.names), way, error)
            self._copies.abandon(copy)
            return 0
        if answer.failure:
            _log.warning("%d KV blocks were not copied from %s: %s", len(copy.names), way, answer.failure)
            self._copies.drop(copy)
            return 0
        return self._copies.finish(copy, answer.duration_us / 1e3)


def _encode(copy: BlockCopy) -> worker_pb2.ReceiveBlocksRequest:
    """But for what hangs on the rank."""
    return worker_pb2.ReceiveBlocksRequest(
        source_block_ids=pack(copy.source_blocks, "<i4"),
        block_ids=pack(copy.target_blocks, "<i4"),
        after_step=copy.target.num_finished_steps,
        source_after_step=copy.source.num_finished_steps,
    )
