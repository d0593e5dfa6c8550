"""One worker group as the scheduler sees it: its blocks, its slots, the sequences in them, the steps in flight."""

import math
from collections import deque

from .batch_plan import BatchPlan, SlotJoin
from .block_manager import BlockManager
from .ordered_sequences import OrderedSequences
from .sequence import Sequence
from .step_time import StepTimeModel

# From the end of a step on the workers to the start of the one that its result let go: slow, as round trips go.
_ROUND_TRIP_MS = 3.0
_MAX_MORE_STEPS = 2


class WorkerGroup:
    """Owner of a group's slots and of the difference between what the workers know and what they should."""

    def __init__(self, group_id: int, num_blocks: int, block_size: int, max_num_seqs: int) -> None:
        self.group_id = group_id
        self.blocks = BlockManager(num_blocks, block_size)
        self.running = OrderedSequences()
        self.inflight: deque[BatchPlan] = deque()
        self.step_time = StepTimeModel()
        self._last_step_ms = 0.0  # 0: not measured
        self._max_num_seqs = max_num_seqs
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._left_slots: list[int] = []  # to be told to the workers with the next plan
        self._sent_decode_slots: list[int] = []
        self._num_steps = 0

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def has_room_in_flight(self, num_inflight_steps: int) -> bool:
        """Whether one more step may be sent. More than `num_inflight_steps` are, while steps are so short that the
        workers would otherwise be done with them before the next one is there."""
        enough = 0
        if self._last_step_ms:
            enough = min(1 + math.ceil(_ROUND_TRIP_MS / self._last_step_ms), num_inflight_steps + _MAX_MORE_STEPS)
        return len(self.inflight) < max(num_inflight_steps, enough)

    def begin_step(self) -> BatchPlan:
        """An empty plan, to be filled and then given to `dispatch` or forgotten."""
        return BatchPlan(step_id=self._num_steps + 1)

    def join(self, sequence: Sequence, plan: BatchPlan) -> None:
        """Gives `sequence` a slot, and blocks for all its known tokens."""
        sequence.start(self.group_id, self._free_slots.pop())
        self.running.add(sequence)
        block_ids = self.blocks.allocate(sequence, sequence.num_tokens)
        plan.joins.append(
            SlotJoin(
                slot=sequence.slot,
                token_ids=sequence.token_ids.tobytes(),
                num_prompt_tokens=sequence.num_prompt_tokens,
                num_computed_tokens=sequence.num_computed_tokens,
                block_ids=block_ids,
                sampling=sequence.request.sampling,
            )
        )

    def grow(self, sequence: Sequence, num_tokens: int, plan: BatchPlan) -> None:
        """Adds blocks to the table of `sequence`, so that it holds `num_tokens`."""
        added = self.blocks.allocate(sequence, num_tokens)
        plan.append_slots.extend([sequence.slot] * len(added))
        plan.append_block_ids.extend(added)

    def leave(self, sequence: Sequence) -> None:
        """Takes slot and blocks back, before the sequence's own transition."""
        self.running.remove(sequence)
        self.blocks.free(sequence)
        self._free_slots.append(sequence.slot)
        self._left_slots.append(sequence.slot)

    def dispatch(self, plan: BatchPlan) -> BatchPlan:
        """Completes `plan` with what the workers were not yet told, and counts it as sent."""
        self._num_steps = plan.step_id
        plan.leave_slots, self._left_slots = self._left_slots, []
        plan.decode_slots_changed = plan.decode_slots != self._sent_decode_slots
        self._sent_decode_slots = plan.decode_slots
        for row in plan.rows:
            row.sequence.dispatch(row.num_tokens, row.samples)
        self.inflight.append(plan)
        return plan

    def take_result(self, model_time_us: int) -> BatchPlan:
        """The oldest plan in flight has been computed, in so many microseconds; 0: not measured."""
        plan = self.inflight.popleft()
        self._last_step_ms = model_time_us / 1e3
        if plan.chunk_slots and model_time_us:
            self.step_time.observe(len(plan.decode_slots), sum(plan.chunk_num_tokens), model_time_us / 1e3)
        return plan

    def check_invariants(self) -> None:
        self.blocks.check_invariants()
        slots = [sequence.slot for sequence in self.running]
        assert len(set(slots)) == len(slots), "a slot has two sequences"
        assert sorted(slots + self._free_slots) == list(range(self._max_num_seqs)), "a slot leaked"
        for sequence in self.running:
            assert sequence.group_id == self.group_id
            rows = [row for plan in self.inflight for row in plan.rows if row.sequence is sequence and not row.is_stale]
            assert sequence.num_inflight_tokens == sum(row.num_tokens for row in rows)
            assert sequence.num_inflight_samples == sum(row.samples for row in rows)
            needed = sequence.num_computed_tokens + sequence.num_inflight_tokens
            assert self.blocks.num_missing_blocks(sequence, needed) == 0, "KV without a block"
