"""Block tables: which blocks of a group hold the KV of which sequence, shared where sequences begin alike."""

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from itertools import islice

from .block_pool import BlockPool
from .host_tier import HostTier
from .prefix_cache import PrefixCache
from .sequence import Sequence
from .transfers import StepTransfers, Transfers


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


@dataclass(slots=True)
class BlockCounters:
    """Totals since the group started."""

    num_looked_up_tokens: int = 0  # of sequences that took a slot
    num_device_hit_tokens: int = 0
    num_host_hit_tokens: int = 0
    num_copied_blocks: int = 0
    num_saved_blocks: int = 0
    num_loaded_blocks: int = 0
    num_evicted_blocks: int = 0  # cached ones that were given to others
    num_received_blocks: int = 0  # copied from other groups


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """Where the first blocks of a sequence lie: those on the device first, then those on the host."""

    names: list[bytes]  # of device blocks, then host blocks
    device_blocks: list[int]
    host_blocks: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)


class BlockManager:
    """Owner of the block tables of one worker group, and of what is known of its blocks' content."""

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self.cache = PrefixCache()
        self.host = HostTier(num_host_blocks) if num_host_blocks else None
        self.transfers = Transfers()
        self.counters = BlockCounters()
        self.num_table_entries = 0
        self.num_cached_blocks = 0  # free blocks in which a prefix may be found
        self.num_saving_blocks = 0  # blocks that only a save still holds
        self._tables: dict[Sequence, list[int]] = {}
        self._loading: dict[int, int] = {}  # device blocks to which content is on its way, and the step that sent it
        self._next = StepTransfers()  # of the step that is being planned
        self._copied: Counter[int] = Counter()  # blocks that copies own, and how many
        self._sources: list[int] = []  # those that the step that is being planned copies from, where nobody else may be
        # Free blocks with content that the host was not offered since they were last used, the longest unused first.
        self._unsaved: OrderedDict[int, None] = OrderedDict()

    @property
    def num_blocks(self) -> int:
        return self.pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        return self.pool.num_free

    # What a sequence finds

    def find_prefix(self, sequence: Sequence, use_host: bool) -> PrefixHit:
        """The longest run of cached blocks at the start of `sequence`, which leaves it a token to compute."""
        if not sequence.reads_cache:
            return PrefixHit([], [])
        names = sequence.block_names((sequence.num_tokens - 1) // self.block_size)
        device_blocks = self.cache.find_run(names)
        host_blocks = self._find_on_host(names, len(device_blocks)) if use_host and self.host else []
        return PrefixHit(names[: len(device_blocks) + len(host_blocks)], device_blocks, host_blocks)

    def _find_on_host(self, names: list[bytes], start: int) -> list[int]:
        assert self.host is not None
        found = []
        for name in names[start:]:
            if (host_id := self.host.find(name)) is None:
                break
            found.append(host_id)
        return found

    def num_needed_blocks(self, hit: PrefixHit, num_tokens: int) -> int:
        """Free blocks that a sequence of `num_tokens` takes, with what it found."""
        num_taken = self.pool.count_free(hit.device_blocks)
        return num_blocks_for(num_tokens, self.block_size) - len(hit.device_blocks) + num_taken

    # Tables

    def begin(self, sequence: Sequence, hit: PrefixHit, step_id: int) -> int:
        """Gives `sequence` a table that begins with what it found; the caller checked the room.

        What lies on the host is loaded by step `step_id`. Returns the last step whose transfers the sequence must wait
        for; 0: none.
        """
        self._retain(hit.device_blocks)
        self._forget_unsaved(hit.device_blocks)
        table = list(hit.device_blocks)
        self._tables[sequence] = table
        self.num_table_entries += len(table)
        waits_for = max((self._loading.get(block_id, 0) for block_id in table if self._loading), default=0)
        if hit.host_blocks:
            self._load(self.allocate(sequence, len(hit) * self.block_size), hit, step_id)
            waits_for = step_id
        if sequence.reads_cache:
            self.counters.num_looked_up_tokens += sequence.num_tokens
        self.counters.num_device_hit_tokens += len(hit.device_blocks) * self.block_size
        self.counters.num_host_hit_tokens += len(hit.host_blocks) * self.block_size
        if self.host:
            for name in reversed(hit.names):  # a prefix without its start is of no use: that is to go last
                self.host.touch(name)
        sequence.num_published_blocks = len(hit)
        return waits_for

    def _load(self, block_ids: list[int], hit: PrefixHit, step_id: int) -> None:
        """Others may share the blocks at once: who finds them waits for the same step."""
        assert self.host is not None
        names = hit.names[len(hit.device_blocks) :]
        for name, block_id, host_id in zip(names, block_ids, hit.host_blocks, strict=True):
            self._next.loads.append((name, block_id, host_id))
            self._loading[block_id] = step_id
            self.host.pin(name)
            self.cache.publish(name, block_id)
        self.pool.retain(block_ids)  # by the transfer
        self.counters.num_loaded_blocks += len(block_ids)

    def num_missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks that `sequence` lacks to hold `num_tokens` tokens."""
        missing = num_tokens - len(self._tables.get(sequence, ())) * self.block_size
        return num_blocks_for(missing, self.block_size) if missing > 0 else 0

    def allocate(self, sequence: Sequence, num_tokens: int) -> list[int]:
        """Grows the table of `sequence` to hold `num_tokens`; returns the added ids. The caller checked the room."""
        added = self._take(self.num_missing_blocks(sequence, num_tokens))
        self._tables.setdefault(sequence, []).extend(added)
        self.num_table_entries += len(added)
        return added

    def _take(self, num_blocks: int) -> list[int]:
        block_ids = self.pool.allocate(num_blocks)
        for block_id in block_ids:
            if self.cache.forget(block_id) is not None:
                self.num_cached_blocks -= 1
                self.counters.num_evicted_blocks += 1
        self._forget_unsaved(block_ids)
        return block_ids

    def _forget_unsaved(self, block_ids: list[int]) -> None:
        for block_id in block_ids if self._unsaved else ():
            self._unsaved.pop(block_id, None)

    def table(self, sequence: Sequence) -> list[int]:
        return self._tables[sequence]

    def share(self, parent: Sequence, child: Sequence, num_tokens: int) -> None:
        """Gives `child` a table of the full blocks that hold the first `num_tokens` tokens of `parent`."""
        shared = self._tables[parent][: num_tokens // self.block_size]
        self.pool.retain(shared)
        self._tables[child] = list(shared)
        self.num_table_entries += len(shared)
        child.num_published_blocks = min(parent.num_published_blocks, len(shared))

    def copy_partial(self, parent: Sequence, child: Sequence, num_tokens: int) -> tuple[int, int]:
        """Copy on write: `child`, which holds the full blocks of the first `num_tokens` tokens of `parent`, is about to
        write into the next one. Returns the block to copy and the child's own."""
        index = num_tokens // self.block_size
        assert len(self._tables[child]) == index
        (own,) = self.allocate(child, num_tokens)
        self.counters.num_copied_blocks += 1
        return self._tables[parent][index], own

    def copy_last(self, sequence: Sequence) -> tuple[int, int] | None:
        """Copy on write: all tokens of `sequence`, which holds all its blocks but the last, fill blocks, and the last
        one is there, too; but its last token is computed again, for the sample. Returns the block to copy and the
        sequence's own; None if this is not so, or there is no room for both."""
        index = len(self._tables[sequence])
        if (index + 1) * self.block_size != sequence.num_tokens or self.block_size == 1 or not sequence.reads_cache:
            return None
        source = self.find_computed(sequence.block_names(index + 1)[index])
        if source is None or self.pool.num_free < 1 + self.pool.count_free([source]):
            return None
        self.hold([source])  # what the step takes otherwise must not be this
        self._sources.append(source)
        (own,) = self.allocate(sequence, sequence.num_tokens)
        self.counters.num_copied_blocks += 1
        self.counters.num_device_hit_tokens += self.block_size - 1
        return source, own

    def publish(self, sequence: Sequence, num_tokens: int) -> None:
        """Lets others find the blocks that the first `num_tokens` tokens fill: known, and computed before later rows.

        A chunk may read what rows before it in the same step write: layer by layer, keys and values are written first.
        """
        num_full = num_tokens // self.block_size
        if num_full <= sequence.num_published_blocks:
            return
        names = sequence.block_names(num_full)
        table = self._tables[sequence]
        for index in range(sequence.num_published_blocks, num_full):
            self.cache.publish(names[index], table[index])
        sequence.num_published_blocks = num_full

    def forget(self, sequence: Sequence) -> None:
        """Lets nobody find what `sequence` has computed or read any more: also blocks that it only copied from."""
        for name in sequence.block_names(sequence.num_tokens // self.block_size):
            if (block_id := self.cache.find(name)) is not None:
                self.cache.forget(block_id)
                self._forget_unsaved([block_id])
                self.num_cached_blocks -= self.pool.count_free([block_id])
            if self.host:
                self.host.forget(name)

    def free(self, sequence: Sequence, keep: bool = True) -> None:
        """Gives back all blocks of `sequence`, the last first: a later prefix wants the first ones longest. Without
        `keep` nobody will ask for what is in those that nobody else has."""
        table = self._tables.pop(sequence)
        self.num_table_entries -= len(table)
        sequence.num_published_blocks = 0
        if not keep:
            for block_id in table:
                if self.pool.ref_count(block_id) == 1:
                    self.cache.forget(block_id)
        self._release(table[::-1])

    def _retain(self, block_ids: list[int]) -> None:
        """Adds an owner to blocks with a name."""
        self.num_cached_blocks -= self.pool.count_free(block_ids)
        self.pool.retain(block_ids)

    def _release(self, block_ids: list[int]) -> None:
        """One after the other. A block in which nothing can be found is the next to be taken."""
        freed = self.pool.release(block_ids, [name is None for name in self.cache.names_of(block_ids)])
        names = self.cache.names_of(freed)
        self.num_cached_blocks += len(names) - names.count(None)
        if self.host:
            for block_id, name in zip(freed, names, strict=True):
                if name is not None and self.host.find(name) is None:
                    self._unsaved[block_id] = None

    # Transfers

    def save_first(self, sequence: Sequence) -> None:
        """What `sequence`, which will come back, just gave up goes to the host before all else."""
        names = sequence.block_names(sequence.num_tokens // self.block_size)
        for name in reversed(names):
            block_id = self.cache.find(name)
            if block_id is not None and block_id in self._unsaved:
                self._unsaved.move_to_end(block_id, last=False)

    def save(self, num_blocks: int) -> None:
        """Has the host keep what free blocks hold, of at most so many: those that were not used for longest."""
        assert self.host is not None
        for block_id in list(islice(self._unsaved, num_blocks)):
            name = self.cache.name_of(block_id)
            assert name is not None
            if (host_id := self.host.place(name)) is None:
                return
            del self._unsaved[block_id]
            self.host.pin(name)
            self._retain([block_id])  # by the transfer: it is not taken while it is read
            self.num_saving_blocks += 1
            self._next.saves.append((name, block_id, host_id))
            self.counters.num_saved_blocks += 1

    def send_transfers(self, step_id: int) -> StepTransfers:
        """What the step carries. Later ones may write to what it copies from."""
        self.let_go(self._sources)
        self._sources.clear()
        sent, self._next = self._next, StepTransfers()
        self.transfers.send(step_id, sent)
        return sent

    @property
    def has_unsent_transfers(self) -> bool:
        return len(self._next) > 0

    def finish_transfers(self, step_id: int) -> None:
        """All transfers up to those of `step_id` have ended."""
        for ended in self.transfers.finish(step_id):
            for name, block_id, _ in ended.saves:
                self._unpin(name)
                self.num_saving_blocks -= 1
                self._release([block_id])  # saves come in the order of last use, and so do blocks that are free again
            for name, block_id, _ in ended.loads:
                self._unpin(name)
                del self._loading[block_id]
                self._release([block_id])

    def _unpin(self, name: bytes) -> None:
        assert self.host is not None
        self.host.unpin(name)

    # Copies, mostly between groups: each is an owner of the blocks that it reads, writes, or wants beside them

    def find_computed(self, name: bytes) -> int | None:
        """The block of that name, unless its content is still on its way from the host."""
        block_id = self.cache.find(name)
        return None if block_id is None or block_id in self._loading else block_id

    def hold(self, block_ids: list[int]) -> None:
        """Of named blocks, for a copy within the group or between two."""
        self._retain(block_ids)
        self._forget_unsaved(block_ids)
        self._copied.update(block_ids)

    def take_unnamed(self, num_blocks: int) -> list[int]:
        """Free blocks, for a copy to fill; the caller checked the room. Plans in flight may still use them."""
        block_ids = self._take(num_blocks)
        self._copied.update(block_ids)
        return block_ids

    def receive(self, name: bytes, block_id: int) -> None:
        """A copy has filled the block."""
        self.cache.publish(name, block_id)
        self.counters.num_received_blocks += 1

    def let_go(self, block_ids: list[int]) -> None:
        """The copy is over."""
        for block_id in reversed(block_ids):
            self._copied[block_id] -= 1
            self._release([block_id])

    # Checks

    def check_invariants(self) -> None:
        assert not self._sources, "a copy was planned, and not sent"
        self.pool.check_invariants()
        self.cache.check_invariants()
        free = self.pool.next_free(self.num_blocks)
        assert self.num_cached_blocks == sum(self.cache.name_of(block_id) is not None for block_id in free)
        if self.host:
            self.host.check_invariants()
        owners = Counter(block_id for table in self._tables.values() for block_id in table)
        assert owners.total() == self.num_table_entries
        owners.update(self._copied)
        for transfers in (*(sent for _, sent in self.transfers.pending()), self._next):
            owners.update(block_id for _, block_id, _ in (*transfers.saves, *transfers.loads))
        for block_id in range(self.num_blocks):
            assert owners[block_id] == self.pool.ref_count(block_id), f"block {block_id} leaked or lost an owner"
