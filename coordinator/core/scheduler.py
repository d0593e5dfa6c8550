"""The scheduler: which tokens each step computes. Pure: events in, plans and outputs out, replayable."""

from collections.abc import Collection
from dataclasses import dataclass, field

from ...errors import InvalidArgumentError, ResourceExhaustedError
from .batch_plan import BatchPlan, ScheduledRow
from .block_manager import num_blocks_for
from .chunk_budget import paced_num_tokens
from .ordered_sequences import WaitingQueue
from .sequence import FinishReason, Request, RequestKey, Sequence, SequenceStatus
from .worker_group import WorkerGroup

_RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Bounds of scheduling; the same for each group."""

    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_num_waiting: int
    num_inflight_steps: int = 2
    itl_target_ms: float = 0.0  # for which a step that decodes takes smaller chunks; 0: none

    def __post_init__(self) -> None:
        # A budget below the slots could be eaten by decodes alone, and prompts would starve.
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InvalidArgumentError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs})",
                field="max_num_batched_tokens",
            )


@dataclass(slots=True)
class SchedulerCounters:
    """Totals since the start."""

    num_requests: int = 0
    num_finished: int = 0
    num_cancelled: int = 0
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What a step gave one sequence. `row` is its index among the step's sampling rows."""

    key: RequestKey
    token_id: int
    finish_reason: FinishReason | None
    row: int


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Prompt logprobs of one chunk: `num_rows` of them, the first about the token at position `start`."""

    chunk: int  # index into the plan's chunk_slots
    start: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class AcceptedScores:
    """What is new in the PromptScores at `index`: all but the first `num_skipped` rows."""

    key: RequestKey
    index: int
    num_skipped: int


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What a step's result means."""

    plan: BatchPlan
    tokens: list[SampledToken] = field(default_factory=list)
    scores: list[AcceptedScores] = field(default_factory=list)


class Scheduler:
    """Owner of every accepted request, of the waiting queue and of the groups' block tables."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.waiting = WaitingQueue()
        self.groups: dict[int, WorkerGroup] = {}
        self.counters = SchedulerCounters()
        self._sequences: dict[RequestKey, Sequence] = {}

    # Events from outside

    def add_group(self, group_id: int, num_blocks: int) -> None:
        assert group_id not in self.groups
        self.groups[group_id] = WorkerGroup(group_id, num_blocks, self.config.block_size, self.config.max_num_seqs)

    def remove_group(self, group_id: int) -> None:
        """The group is gone. Its sequences wait again, with the tokens they have."""
        for sequence in list(self.groups[group_id].running):
            self._preempt(sequence, f"group {group_id} is gone")
        del self.groups[group_id]

    def add(self, request: Request) -> None:
        """Accepts `request`, or raises InvalidArgumentError or ResourceExhaustedError and forgets it."""
        sequence = Sequence(request, self.counters.num_requests, self.config.max_model_len)
        self._check_fits(sequence)
        if len(self.waiting) >= self.config.max_num_waiting:
            raise ResourceExhaustedError(
                f"{len(self.waiting)} requests are waiting, the most that this server queues; try again later",
                retry_after_s=_RETRY_AFTER_S,
            )
        assert request.key not in self._sequences
        self._sequences[request.key] = sequence
        self.waiting.add(sequence)
        self.counters.num_requests += 1
        self.counters.num_prompt_tokens += sequence.num_prompt_tokens

    def cancel(self, key: RequestKey) -> None:
        """Ends a request that nobody reads any more. One that has ended already is none of our business."""
        self.counters.num_cancelled += self._end(key, FinishReason.CANCELLED)

    def stop(self, key: RequestKey) -> None:
        """Ends a request whose text has reached a stop string, unless it has ended already."""
        self.counters.num_finished += self._end(key, FinishReason.STOP)

    def drop(self, key: RequestKey) -> None:
        """Forgets a request that nobody can serve; who calls tells its reader, and counts it."""
        self._end(key, FinishReason.CANCELLED)

    def _end(self, key: RequestKey, reason: FinishReason) -> bool:
        """Whether it was still there to end."""
        sequence = self._sequences.get(key)
        if sequence is not None:
            self._finish(sequence, reason)
        return sequence is not None

    def unfinished_requests(self) -> list[RequestKey]:
        return list(self._sequences)

    def sequence(self, key: RequestKey) -> Sequence:
        return self._sequences[key]

    # Steps

    def schedule(self, group_id: int) -> BatchPlan | None:
        """The group's next step; None if enough are in flight or there is nothing to compute."""
        group = self.groups[group_id]
        if not group.has_room_in_flight(self.config.num_inflight_steps):
            return None
        plan = group.begin_step()
        preempted = self._schedule_decodes(group, plan)
        unfinished = [sequence for sequence in group.running if sequence.num_pending_tokens > 1]
        budget = self._chunk_budget(group, plan, unfinished)
        budget = self._schedule_chunks(unfinished, plan, budget)
        if not preempted:
            self._admit_waiting(group, plan, budget)
        return group.dispatch(plan) if plan.rows else None

    def update(
        self, group_id: int, token_ids: list[int], scores: Collection[PromptScores] = (), model_time_us: int = 0
    ) -> StepOutcome:
        """Takes the result of the group's oldest step in flight: sampled tokens in row order, and prompt logprobs.

        `model_time_us` is how long its workers were at it; 0: not measured.
        """
        plan = self.groups[group_id].take_result(model_time_us)
        outcome = StepOutcome(plan, scores=self._accept_scores(plan, scores))
        sampled = 0
        for row in plan.rows:
            if not row.is_stale:
                row.sequence.computed(row.num_tokens)
                if row.samples:
                    outcome.tokens.append(self._append(row.sequence, token_ids[sampled], sampled))
            sampled += row.samples
        return outcome

    def _accept_scores(self, plan: BatchPlan, scores: Collection[PromptScores]) -> list[AcceptedScores]:
        accepted = []
        for index, chunk in enumerate(scores):
            row = plan.rows[len(plan.decode_slots) + chunk.chunk]
            if not row.is_stale:
                num_skipped = row.sequence.score_prompt(chunk.start, chunk.num_rows)
                accepted.append(AcceptedScores(row.sequence.request.key, index, num_skipped))
        return accepted

    # Decisions

    def _schedule_decodes(self, group: WorkerGroup, plan: BatchPlan) -> bool:
        """A row for each sequence with one token to compute; returns whether blocks ran out and one was preempted."""
        num_preemptions = self.counters.num_preemptions
        for sequence in list(group.running):
            if not sequence.is_running or sequence.num_pending_tokens != 1:
                continue
            num_tokens = sequence.num_computed_tokens + sequence.num_inflight_tokens + 1
            if group.blocks.num_missing_blocks(sequence, num_tokens):
                if not self._make_room(sequence, group):
                    continue
                group.grow(sequence, num_tokens, plan)
            plan.decode_slots.append(sequence.slot)
            plan.rows.append(ScheduledRow(sequence, sequence.num_preemptions, 1, samples=True))
        return self.counters.num_preemptions > num_preemptions

    def _make_room(self, sequence: Sequence, group: WorkerGroup) -> bool:
        """Frees a block for `sequence` by preempting the last in order; False if that was `sequence` itself."""
        while group.blocks.num_free_blocks == 0:
            last = group.running.last()
            self._preempt(last, "out of blocks")
            if last is sequence:
                return False
        return True

    def _chunk_budget(self, group: WorkerGroup, plan: BatchPlan, unfinished: list[Sequence]) -> int:
        """Prompt tokens for the step: what it has room for; beside decodes, what leaves them their pace."""
        num_tokens = self.config.max_num_batched_tokens - plan.num_tokens
        if not (self.config.itl_target_ms and plan.decode_slots and group.step_time.is_fitted):
            return num_tokens
        num_backlog_tokens = self._num_backlog_tokens(unfinished)
        if num_backlog_tokens == 0:
            return 0
        num_decodes = len(plan.decode_slots)
        costs = group.step_time.costs(num_decodes)
        return min(num_tokens, paced_num_tokens(self.config.itl_target_ms, costs, num_decodes, num_backlog_tokens))

    def _num_backlog_tokens(self, unfinished: list[Sequence]) -> int:
        """Tokens that a group has to compute before nothing waits for it: of its own, and its share of the queue's."""
        share = -(-self.waiting.num_tokens // len(self.groups))
        return share + sum(sequence.num_pending_tokens for sequence in unfinished)

    def _schedule_chunks(self, unfinished: list[Sequence], plan: BatchPlan, budget: int) -> int:
        """To the sequences that have several tokens to compute, the first in order first. Returns what is left."""
        for sequence in unfinished:
            if budget == 0:
                break
            budget -= self._add_chunk(sequence, budget, plan)
        return budget

    def _admit_waiting(self, group: WorkerGroup, plan: BatchPlan, budget: int) -> None:
        """Slots and blocks to waiting sequences, strictly in order: one that does not fit holds the others back."""
        while budget > 0 and self.waiting and self._belongs(self.waiting.first(), group):
            sequence = self.waiting.first()
            self.waiting.remove(sequence)
            group.join(sequence, plan)
            budget -= self._add_chunk(sequence, budget, plan)

    @staticmethod
    def _add_chunk(sequence: Sequence, budget: int, plan: BatchPlan) -> int:
        num_tokens = min(sequence.num_pending_tokens, budget)
        samples = num_tokens == sequence.num_pending_tokens
        plan.chunk_slots.append(sequence.slot)
        plan.chunk_num_tokens.append(num_tokens)
        plan.rows.append(ScheduledRow(sequence, sequence.num_preemptions, num_tokens, samples))
        return num_tokens

    def _belongs(self, sequence: Sequence, group: WorkerGroup) -> bool:
        """Whether `group` is to take `sequence`: of the groups with room for it, one with less than its share of all.

        A share, so that a group fills itself in one step while others are busy, and leaves as much to them.
        """
        candidates = [each for each in self.groups.values() if self._has_room(each, sequence)]
        num_sequences = len(self.waiting) + sum(len(each.running) for each in candidates)
        return group in candidates and len(group.running) * len(candidates) < num_sequences

    @staticmethod
    def _has_room(group: WorkerGroup, sequence: Sequence) -> bool:
        """For all its known tokens, and for a block more if others run there.

        Without that block the newcomer would be preempted at the next block border.
        """
        needed = group.blocks.num_missing_blocks(sequence, sequence.num_tokens) + bool(group.running)
        return group.num_free_slots > 0 and needed <= group.blocks.num_free_blocks

    # Transitions

    def _preempt(self, sequence: Sequence, why: str) -> None:
        self.groups[sequence.group_id].leave(sequence)
        sequence.preempt(why)
        self.waiting.add(sequence)
        self.counters.num_preemptions += 1

    def _append(self, sequence: Sequence, token_id: int, row: int) -> SampledToken:
        self.counters.num_output_tokens += 1
        reason = sequence.append(token_id)
        if reason is not None:
            self._finish(sequence, reason)
            self.counters.num_finished += 1
        return SampledToken(sequence.request.key, token_id, reason, row)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.is_running:
            self.groups[sequence.group_id].leave(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.finish(reason)
        del self._sequences[sequence.request.key]

    # Checks

    def _check_fits(self, sequence: Sequence) -> None:
        limit = self.config.max_model_len
        if not 0 < sequence.num_prompt_tokens < limit:
            raise InvalidArgumentError(
                f"the prompt has {sequence.num_prompt_tokens} tokens; it must have at least 1 and leave room for "
                f"one more within the context length of {limit}",
                field="prompt",
            )
        # The last token's KV is never written.
        needed = num_blocks_for(sequence.max_num_tokens - 1, self.config.block_size)
        available = max((group.blocks.num_blocks for group in self.groups.values()), default=0)
        if self.groups and needed > available:
            raise InvalidArgumentError(
                f"prompt plus max_tokens need {needed} KV blocks of {self.config.block_size} tokens; "
                f"a group has {available}",
                field="max_tokens",
            )

    def check_invariants(self) -> None:
        """For tests: raises AssertionError if any state contradicts another."""
        running = [sequence for group in self.groups.values() for sequence in group.running]
        assert {id(sequence) for sequence in self._sequences.values()} == {id(s) for s in (*running, *self.waiting)}
        assert len(self._sequences) == len(running) + len(self.waiting), "a sequence is in two places"
        for group in self.groups.values():
            group.check_invariants()
            for plan in group.inflight:
                assert plan.num_tokens <= self.config.max_num_batched_tokens, "over the token budget"
        for sequence in self.waiting:
            assert sequence.status is SequenceStatus.WAITING
        assert self.waiting.num_tokens == sum(sequence.num_tokens for sequence in self.waiting)
