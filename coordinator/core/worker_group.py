"""One worker group as the scheduler sees it: its blocks, its slots, the sequences in them, the steps in flight."""

import math
from collections import deque
from dataclasses import dataclass

from .batch_plan import BatchPlan, SlotJoin
from .block_manager import BlockManager, PrefixHit
from .ordered_sequences import OrderedSequences
from .sequence import Sequence
from .sequence_group import SequenceGroup
from .step_time import StepTimeModel

# From the end of a step on the workers to the start of the one that its result let go: slow, as round trips go.
_ROUND_TRIP_MS = 3.0
_MAX_MORE_STEPS = 2
_DECODE_MEMORY = 8  # steps; what they take changes slowly, as sequences grow
# Tokens of the blocks on their way to the host at once: of an 8B model 128 MiB, some 3 ms. They are not free meanwhile.
_MAX_SAVED_TOKENS = 1024
# Steps from the moment that blocks are short to the one in which those of a preempted sequence are on the host.
_SAVE_STEPS = 4


@dataclass(frozen=True, slots=True)
class GroupMemory:
    """What a group's workers have room for, the same on each."""

    num_blocks: int
    num_host_blocks: int = 0
    host_block_ms: float = 0.0  # measured: to move one block between device and host; 0: not measured


@dataclass(slots=True)
class GroupTotals:
    """Sums over a group's steps, for means over an interval."""

    num_steps: int = 0
    sum_used: int = 0
    sum_table_entries: int = 0
    sum_empty_places: int = 0


class WorkerGroup:
    """Owner of a group's slots and of the difference between what the workers know and what they should."""

    def __init__(self, group_id: int, memory: GroupMemory, block_size: int, max_num_seqs: int) -> None:
        self.group_id = group_id
        self.is_draining = False  # it is to leave; only the Scheduler says so
        self.blocks = BlockManager(memory.num_blocks, block_size, memory.num_host_blocks)
        self.running = OrderedSequences()
        self.inflight: deque[BatchPlan] = deque()
        self.step_time = StepTimeModel()
        self.totals = GroupTotals()
        self._host_block_ms = memory.host_block_ms
        self._last_step_ms = 0.0  # 0: not measured
        self._decodes_ms: deque[float] = deque(maxlen=_DECODE_MEMORY)  # of the last steps without prompt tokens
        self._max_num_seqs = max_num_seqs
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._reserved_slots: dict[SequenceGroup, int] = {}  # for beams to come
        self._left_slots: list[int] = []  # to be told to the workers with the next plan
        self._amends: dict[int, int] = {}  # likewise
        self._sent_decode_slots: list[int] = []
        self._num_steps = 0
        self._num_held_tokens = 0  # of running sequences: computed or in flight

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots) - sum(self._reserved_slots.values())

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs here, and nothing is on its way."""
        return not (len(self.running) or self.inflight or self.blocks.transfers.last_step)

    @property
    def num_used_blocks(self) -> int:
        """Blocks that some table has."""
        return self.blocks.num_blocks - self.blocks.num_free_blocks - self.blocks.num_saving_blocks

    @property
    def num_empty_places(self) -> int:
        """Places for tokens, in all tables, that have none."""
        return self.blocks.num_table_entries * self.blocks.block_size - self._num_held_tokens

    def has_room_in_flight(self, num_inflight_steps: int) -> bool:
        """Whether one more step may be sent. More than `num_inflight_steps` are, while steps are so short that the
        workers would otherwise be done with them before the next one is there."""
        enough = 0
        if self._last_step_ms:
            enough = min(1 + math.ceil(_ROUND_TRIP_MS / self._last_step_ms), num_inflight_steps + _MAX_MORE_STEPS)
        return len(self.inflight) < max(num_inflight_steps, enough)

    @property
    def expected_ms(self) -> float:
        """How long the step in flight should take if it is the only one, rather less than more; 0: not known."""
        if len(self.inflight) != 1:
            return 0.0
        (plan,) = self.inflight
        if not plan.rows:
            return 0.0
        if not plan.chunk_slots:
            return min(self._decodes_ms, default=0.0)
        return self.step_time.expected_ms(plan.load) if self.step_time.is_fitted else 0.0

    @property
    def num_sent_steps(self) -> int:
        """The last step that was sent."""
        return self._num_steps

    @property
    def num_finished_steps(self) -> int:
        """The last step whose result, and all before, have come."""
        return self._num_steps - len(self.inflight)

    def begin_step(self) -> BatchPlan:
        """An empty plan, to be filled and then given to `dispatch`, or forgotten if nothing was."""
        return BatchPlan(step_id=self._num_steps + 1)

    # Sequences come and go

    def find_prefix(self, sequence: Sequence) -> PrefixHit:
        return self.blocks.find_prefix(sequence, use_host=self.moves_pay)

    @property
    def moves_pay(self) -> bool:
        """Whether it is cheaper to bring a block from the host than to compute its tokens, by what both took."""
        if self.blocks.host is None:
            return False
        if not (self._host_block_ms and self.step_time.is_fitted):
            return True
        return self._host_block_ms < self.blocks.block_size * self.step_time.costs(num_decodes=0).token_ms

    def admit(self, sequence: Sequence, plan: BatchPlan) -> None:
        """Gives `sequence` a slot, and blocks for all its known tokens; what is found of them need not be computed."""
        self._take_slot(sequence)
        hit = self.find_prefix(sequence)
        sequence.waits_for_step = self.blocks.begin(sequence, hit, plan.step_id)
        sequence.num_computed_tokens = len(hit) * self.blocks.block_size
        if not sequence.waits_for_step and sequence.samples.beams is None:
            self._begin_with_a_copy(sequence, plan)
        self.blocks.allocate(sequence, sequence.num_tokens)
        self._num_held_tokens += sequence.num_computed_tokens
        if sequence.samples.num_cached_tokens < 0:
            sequence.samples.num_cached_tokens = min(sequence.num_computed_tokens, sequence.num_prompt_tokens)

    def _begin_with_a_copy(self, sequence: Sequence, plan: BatchPlan) -> None:
        """Copy on write of a block of which `sequence`, behind its full blocks that were found, shares the content."""
        if (found := self._copy_last_block(sequence, plan) or self._copy_from_sibling(sequence, plan)) is not None:
            copy, sequence.num_computed_tokens = found
            plan.copies.append(copy)

    def _copy_from_sibling(self, sequence: Sequence, plan: BatchPlan) -> tuple[tuple[int, int], int] | None:
        """What another sample of the request has computed of the prompt, beyond its full blocks; and the tokens that
        are computed with it."""
        num_tokens = sequence.num_prompt_tokens - 1  # the last one is computed for its sample
        if not sequence.reads_cache or not 0 < num_tokens - sequence.num_computed_tokens < self.blocks.block_size:
            return None
        newcomers = {join.slot for join in plan.joins}  # what they begin with may be computed in this very step
        for sibling in sequence.samples.sequences:
            is_here = sibling.group_id == self.group_id and sibling.is_joined and sibling.slot not in newcomers
            if is_here and sibling.num_sent_tokens >= num_tokens:
                return self.blocks.copy_partial(sibling, sequence, num_tokens), num_tokens
        return None

    def _copy_last_block(self, sequence: Sequence, plan: BatchPlan) -> tuple[tuple[int, int], int] | None:
        """So that of tokens which all are in cached blocks one alone is computed; as _copy_from_sibling."""
        if plan.chunk_slots:
            return None  # they may be what computes the block, behind the step's copies
        copy = self.blocks.copy_last(sequence)
        return None if copy is None else (copy, sequence.num_tokens - 1)

    def fork(self, parent: Sequence, child: Sequence, plan: BatchPlan) -> None:
        """`child`, which has one token more than what `parent` has computed, runs on with its blocks."""
        self._take_slot(child)
        num_tokens = child.num_tokens - 1
        self.blocks.share(parent, child, num_tokens)
        if num_tokens % self.blocks.block_size:
            plan.copies.append(self.blocks.copy_partial(parent, child, num_tokens))
        child.num_computed_tokens = num_tokens
        self._num_held_tokens += num_tokens

    def is_ready(self, sequence: Sequence) -> bool:
        """Whether all its blocks are there: none is on its way from the host."""
        return sequence.waits_for_step <= self.blocks.transfers.finished_step

    def introduce(self, sequence: Sequence, plan: BatchPlan) -> None:
        """Tells the workers of `sequence`, unless they know it."""
        if sequence.is_joined:
            return
        sequence.is_joined = True
        plan.joins.append(
            SlotJoin(
                slot=sequence.slot,
                token_ids=sequence.token_ids.tobytes(),
                num_prompt_tokens=sequence.num_prompt_tokens,
                num_computed_tokens=sequence.num_computed_tokens,
                block_ids=list(self.blocks.table(sequence)),
                sampling=sequence.request.sampling,
                index=sequence.index,
            )
        )

    def grow(self, sequence: Sequence, num_tokens: int, plan: BatchPlan) -> None:
        """Adds blocks to the table of `sequence`, so that it holds `num_tokens`."""
        added = self.blocks.allocate(sequence, num_tokens)
        plan.append_slots.extend([sequence.slot] * len(added))
        plan.append_block_ids.extend(added)

    def amend(self, sequence: Sequence, token_id: int) -> None:
        """The newest token of `sequence` is to be this one, not the one that was sampled."""
        self._amends[sequence.slot] = token_id

    def leave(self, sequence: Sequence, keep: bool = True) -> None:
        """Takes slot and blocks back, before the sequence's own transition. Without `keep` nobody will ask for what its
        blocks hold."""
        self.running.remove(sequence)
        self.blocks.free(sequence, keep)
        self._num_held_tokens -= sequence.num_sent_tokens
        self._free_slots.append(sequence.slot)
        self._amends.pop(sequence.slot, None)
        if sequence.is_joined:
            self._left_slots.append(sequence.slot)
        if sequence.samples in self._reserved_slots:
            self._reserve(sequence.samples, 1)

    def _take_slot(self, sequence: Sequence) -> None:
        sequence.start(self.group_id, self._free_slots.pop())
        self.running.add(sequence)
        if sequence.samples.beams is not None:
            self._reserve(sequence.samples, -1)

    def _reserve(self, samples: SequenceGroup, change: int) -> None:
        """Slots for all beams, from the first to take one until the last has left its own."""
        assert samples.beams is not None
        num_beams = samples.beams.num_beams
        self._reserved_slots[samples] = self._reserved_slots.get(samples, num_beams) + change
        if self._reserved_slots[samples] == num_beams:
            del self._reserved_slots[samples]

    # Steps

    @property
    def num_spare_blocks(self) -> int:
        """Free blocks that newcomers leave to those that run: one, or the next block border would preempt the
        newcomer; with a host tier, as many as the running ones take while a preempted one's are saved."""
        if not len(self.running):
            return 0
        return self._num_blocks_of_steps(_SAVE_STEPS) if self.moves_pay else 1

    @property
    def must_preempt_early(self) -> bool:
        """Whether the last sequence is to go now, so that its blocks are on the host when other requests take them."""
        if not (self.running and self.moves_pay) or self.running.first().samples is self.running.last().samples:
            return False
        return self.blocks.num_free_blocks + self.blocks.num_saving_blocks < self._num_blocks_of_steps(_SAVE_STEPS // 2)

    def _num_blocks_of_steps(self, num_steps: int) -> int:
        """Blocks that the running sequences take in so many steps."""
        return -(-num_steps * len(self.running) // self.blocks.block_size) + 1

    def save_blocks(self) -> None:
        """Has the host keep what free blocks hold, while they are; enough stay free for the next step."""
        if self.moves_pay and not self.is_draining:
            room = self.blocks.num_free_blocks - self._num_blocks_of_steps(1)
            most = max(1, _MAX_SAVED_TOKENS // self.blocks.block_size) - self.blocks.transfers.num_blocks
            self.blocks.save(max(0, min(room, most)))

    @property
    def must_ask(self) -> bool:
        """Whether a step without rows is to bring word of transfers, since no other step in flight will."""
        return not self.inflight and self.blocks.transfers.last_step > 0

    def dispatch(self, plan: BatchPlan) -> BatchPlan:
        """Completes `plan` with what the workers were not yet told, and counts it as sent."""
        self._num_steps = plan.step_id
        plan.leave_slots, self._left_slots = self._left_slots, []
        plan.amends, self._amends = self._amends, {}
        plan.decode_slots_changed = plan.decode_slots != self._sent_decode_slots
        self._sent_decode_slots = plan.decode_slots
        plan.transfers = self.blocks.send_transfers(plan.step_id)
        plan.finished_transfers = self.blocks.transfers.finished_step
        for row in plan.rows:
            row.sequence.dispatch(row.num_tokens, row.samples)
            self._num_held_tokens += row.num_tokens
        self.inflight.append(plan)
        self._count_step()
        return plan

    def _count_step(self) -> None:
        totals = self.totals
        totals.num_steps += 1
        totals.sum_used += self.num_used_blocks
        totals.sum_table_entries += self.blocks.num_table_entries
        totals.sum_empty_places += self.num_empty_places

    def take_result(self, model_time_us: int, finished_transfers: int = 0) -> BatchPlan:
        """The oldest plan in flight has been computed, in so many microseconds; 0: not measured."""
        plan = self.inflight.popleft()
        self.blocks.finish_transfers(finished_transfers)
        self._last_step_ms = model_time_us / 1e3
        if plan.chunk_slots and model_time_us:
            self.step_time.observe(plan.load, model_time_us / 1e3)
        elif plan.rows and model_time_us:
            self._decodes_ms.append(model_time_us / 1e3)
        return plan

    def check_invariants(self) -> None:
        self.blocks.check_invariants()
        slots = [sequence.slot for sequence in self.running]
        assert len(set(slots)) == len(slots), "a slot has two sequences"
        assert sorted(slots + self._free_slots) == list(range(self._max_num_seqs)), "a slot leaked"
        assert self.num_free_slots >= 0, "more slots are reserved than there are"
        assert self._num_held_tokens == sum(sequence.num_sent_tokens for sequence in self.running)
        for sequence in self.running:
            assert sequence.group_id == self.group_id
            rows = [row for plan in self.inflight for row in plan.rows if row.sequence is sequence and not row.is_stale]
            assert sequence.num_inflight_tokens == sum(row.num_tokens for row in rows)
            assert sequence.num_inflight_samples == sum(row.samples for row in rows)
            assert self.blocks.num_missing_blocks(sequence, sequence.num_sent_tokens) == 0, "KV without a block"
