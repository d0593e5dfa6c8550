"""The scheduler: which tokens each step computes. Pure: events in, plans and outputs out, replayable."""

from collections.abc import Collection

from ...errors import OctavoError, ResourceExhaustedError
from .admission import check_fits, check_resumed, find_misfits
from .batch_plan import BatchPlan, ScheduledRow
from .chunk_budget import ChunkBudget, counted_tokens
from .drain import Moves, WantedCopy, is_drained
from .hot_prefixes import HotPrefixes
from .ordered_sequences import OrderedSequences, WaitingQueue
from .outputs import Outputs
from .placement import Queue, belongs
from .prompt_turns import PromptTurns, Takers
from .scheduler_config import SchedulerConfig
from .scheduler_counters import SchedulerCounters
from .sequence import FinishReason, Request, RequestKey, Sequence, SequenceStatus
from .sequence_group import BeamOutput, SequenceGroup
from .step_outcome import AcceptedScores, PromptScores, SampledToken, StepOutcome, StepReport
from .suspects import Suspects
from .worker_group import GroupMemory, WorkerGroup

_RETRY_AFTER_S = 1.0
# Known tokens of the sequences that one plan has join: 4 MiB. Many samples of a long prompt come in several.
_MAX_JOINED_TOKENS = 1 << 20


class Scheduler:
    """Owner of every accepted request, of the waiting queue and of the groups' block tables."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.waiting = WaitingQueue()
        self.groups: dict[int, WorkerGroup] = {}
        self.counters = SchedulerCounters()
        self.suspects = Suspects(self.waiting, self._preempt)
        self._outputs = Outputs(self.groups, self.waiting, self.suspects, self.counters)
        self.moves = Moves(config.copies_blocks)
        self.hot_prefixes = HotPrefixes(config.copies_blocks)

    # Events from outside

    def add_group(self, group_id: int, memory: GroupMemory) -> None:
        assert group_id not in self.groups
        self.groups[group_id] = WorkerGroup(group_id, memory, self.config.block_size, self.config.max_num_seqs)
        self.hot_prefixes.start_anew()

    def remove_group(self, group_id: int, failed_step: int = 0) -> list[RequestKey]:
        """The group is gone, in `failed_step`; 0: in its oldest in flight. Its sequences wait again, with the tokens
        they have. Returns outputs, and beam searches, that end: their steps are what fails groups."""
        group = self.groups[group_id]
        suspects = Suspects.of_step(group.inflight, failed_step)
        for sequence in list(group.running):
            if sequence.is_running:
                self._preempt(sequence, f"group {group_id} is gone")
        del self.groups[group_id]
        self.moves.forget_others(self.groups.values())
        return [self._give_up(sequence) for sequence in self.suspects.judge(group_id, suspects)]

    def drain_group(self, group_id: int, is_draining: bool = True) -> None:
        """The group is to leave, or is not: what runs there moves to others where they have room, and nothing new comes
        unless it fits no other. When it is drained, it may be removed."""
        self.groups[group_id].is_draining = is_draining

    def is_drained(self, group_id: int) -> bool:
        is_empty = is_drained(self.groups[group_id], self.groups.values(), self.waiting)
        return is_empty and not (self.moves.touches(group_id) or self.hot_prefixes.touches(group_id))

    @property
    def has_wanted_copies(self) -> bool:
        """Whether `moves` or `hot_prefixes` want some that nobody has heard of yet."""
        return self.moves.has_wanted or self.hot_prefixes.has_wanted

    def end_copy(self, copy: WantedCopy) -> None:
        """One that `moves` wanted is over, whatever became of it."""
        self.moves.end(copy)
        self.moves.forget_others(self.groups.values())

    @property
    def _lasting_groups(self) -> Collection[WorkerGroup]:
        """Those that do not drain; all, where all do."""
        return [group for group in self.groups.values() if not group.is_draining] or self.groups.values()

    @property
    def has_newcomers(self) -> bool:
        """Whether a sequence may begin in some group: one that waits, or one whose group is to leave."""
        return bool(self.waiting) or any(group.is_draining for group in self.groups.values())

    def add(self, request: Request) -> None:
        """Accepts `request`, or raises InvalidArgumentError or ResourceExhaustedError and forgets it.

        One that was accepted before is not refused for the queue's length, nor for what groups are there so far: see
        `misfits`.
        """
        config = self.config
        samples = SequenceGroup(request, self.counters.num_requests, config.block_size, config.max_model_len)
        check_fits(samples, config, () if request.resumed else self._lasting_groups)
        check_resumed(samples)
        if len(self.waiting) >= config.max_num_waiting and not request.resumed:
            raise ResourceExhaustedError(
                f"{len(self.waiting)} requests are waiting, the most that this server queues; try again later",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._outputs.open(samples)
        for sequence in samples.sequences if not samples.held else samples.sequences[:1]:
            self.waiting.add(sequence)
        self.counters.num_requests += 1
        self.counters.num_prompt_tokens += len(request.prompt_token_ids)

    def cancel(self, key: RequestKey) -> None:
        """Ends an output that nobody reads any more. One that has ended already is none of our business."""
        self._outputs.end(key, FinishReason.CANCELLED)

    def stop(self, key: RequestKey) -> None:
        """Ends an output whose text has reached a stop string, unless it has ended already."""
        self._outputs.end(key, FinishReason.STOP)

    def drop(self, key: RequestKey) -> None:
        """Forgets an output that nobody can serve; who calls tells its reader."""
        self._outputs.end(key, None)

    def unfinished_requests(self) -> list[RequestKey]:
        """Keys of all unfinished outputs."""
        return self._outputs.keys

    def misfits(self) -> dict[RequestKey, OctavoError]:
        """Requests that none of the groups could serve, and why; they hold up the others, and are to be dropped."""
        return find_misfits(self._outputs.requests, self.config, self.groups.values())

    def samples(self, key: RequestKey) -> SequenceGroup:
        """The request with that unfinished output."""
        return self._outputs.samples(key)

    # Steps

    def schedule(self, group_id: int) -> BatchPlan | None:
        """The group's next step; None if enough are in flight or there is nothing to do."""
        group = self.groups[group_id]
        if not group.has_room_in_flight(self.config.num_inflight_steps):
            return None
        queue = self.suspects.queue_for(group)
        if queue is None:
            return None
        if group.must_preempt_early:
            self._preempt(group.running.last(), "to be saved before blocks run out")
        if queue is self.waiting:
            self.moves.ask(group, self.groups.values(), *self._front)
        plan = group.begin_step()
        preempted = self._schedule_decodes(group, plan)
        turns = PromptTurns(group, self.waiting, self._takers(group), self.config)
        budget, (first, last) = turns.budget(plan), turns.order(plan.step_id)
        self._schedule_chunks(group, first, plan, budget)
        if not preempted:
            self._admit_waiting(group, plan, budget, queue)
        self._schedule_chunks(group, last, plan, budget)
        group.save_blocks()
        if not (plan.rows or group.blocks.has_unsent_transfers or group.must_ask):
            return None
        group.dispatch(plan)
        self._let_samples_follow(plan)
        return plan

    def expected_ms(self, group_id: int) -> float:
        """How long the group's step in flight should take where the next one is better planned towards its end, so that
        it has what comes meanwhile; 0: the next may be planned now."""
        return self.groups[group_id].expected_ms if self.config.itl_target_ms else 0.0

    def update(self, group_id: int, report: StepReport) -> StepOutcome:
        """Takes the result of the group's oldest step in flight."""
        group = self.groups[group_id]
        plan = group.take_result(report.model_time_us, report.finished_transfers)
        outcome = StepOutcome(plan, scores=self._accept_scores(plan, report.scores))
        sampled = 0
        for row in plan.rows:
            if not row.is_stale:
                row.sequence.computed(row.num_tokens)
                if row.samples:
                    self._take_sample(row.sequence, report, sampled, outcome)
            sampled += row.samples
        return outcome

    def _take_sample(self, sequence: Sequence, report: StepReport, row: int, outcome: StepOutcome) -> None:
        sequence.sampled()
        if row in report.failed_rows:
            outcome.failed.append(self._fail(sequence))
        elif sequence.samples.beams is None:
            outcome.tokens.append(self._append(sequence, report.token_ids[row], row))
        else:
            sequence.samples.beams.take(sequence, report.candidates(row), report.token_ids[row])
            if sequence.samples.beams.is_complete:
                outcome.beams.extend(self._advance_beams(sequence.samples))

    def _accept_scores(self, plan: BatchPlan, scores: Collection[PromptScores]) -> list[AcceptedScores]:
        accepted = []
        for index, chunk in enumerate(scores):
            row = plan.rows[len(plan.decode_slots) + chunk.chunk]
            if not row.is_stale:
                num_skipped = row.sequence.score_prompt(chunk.start, chunk.num_rows)
                accepted.append(AcceptedScores(row.sequence.key, index, num_skipped))
        return accepted

    # Decisions

    @property
    def _front(self) -> tuple[Sequence | None, Queue]:
        """Who waits first, and behind it how many."""
        first = self.waiting.first() if self.waiting else None
        return first, Queue(len(self.waiting), self.config.max_num_batched_tokens)

    def _takers(self, group: WorkerGroup) -> Takers:
        mover = self.moves.first(group, self.groups.values())
        if mover is None:
            return Takers(len(self._lasting_groups))
        num_found = len(group.find_prefix(mover)) * self.config.block_size
        return Takers(len(self._lasting_groups), mover, mover.num_tokens - num_found)

    def _schedule_decodes(self, group: WorkerGroup, plan: BatchPlan) -> bool:
        """A row for each sequence with one token to compute; returns whether blocks ran out and one was preempted."""
        num_preemptions = self.counters.num_preemptions
        for sequence in list(group.running):
            if not sequence.is_running or sequence.num_pending_tokens != 1 or not group.is_ready(sequence):
                continue
            beams = sequence.samples.beams
            missing = group.blocks.num_missing_blocks(sequence, sequence.num_sent_tokens + 1)
            if (missing or beams) and not self._make_room(sequence, group):
                continue
            self._add_decode(sequence, group, plan)
            if beams is not None:
                for parent, child in beams.take_forks():
                    group.fork(parent, child, plan)
                    self._add_decode(child, group, plan)
        return self.counters.num_preemptions > num_preemptions

    @staticmethod
    def _add_decode(sequence: Sequence, group: WorkerGroup, plan: BatchPlan) -> None:
        group.introduce(sequence, plan)
        if group.blocks.num_missing_blocks(sequence, sequence.num_sent_tokens + 1):
            group.grow(sequence, sequence.num_sent_tokens + 1, plan)
        plan.decode_slots.append(sequence.slot)
        plan.rows.append(ScheduledRow(sequence, sequence.num_preemptions, 1, samples=True))

    def _make_room(self, sequence: Sequence, group: WorkerGroup) -> bool:
        """Frees the blocks that the next token of `sequence` needs, and with it those of the beams beside it, by
        preempting the last in order; False if `sequence` itself had to go."""
        while self._num_missing_blocks(sequence, group) > group.blocks.num_free_blocks:
            self._preempt(group.running.last(), "out of blocks")
            if not sequence.is_running:
                return False
        return True

    @staticmethod
    def _num_missing_blocks(sequence: Sequence, group: WorkerGroup) -> int:
        beams = sequence.samples.beams
        together = [sequence] if beams is None else [beam for beam in sequence.samples.sequences if beam.is_running]
        missing = sum(group.blocks.num_missing_blocks(each, each.num_sent_tokens + 1) for each in together)
        return missing + (len(beams.forks) if beams is not None else 0)  # each fork begins a block of its own

    def _schedule_chunks(
        self, group: WorkerGroup, sequences: Collection[Sequence], plan: BatchPlan, budget: ChunkBudget
    ) -> None:
        """To the sequences that have several tokens to compute, the first in order first."""
        for sequence in sequences:
            if budget.is_spent:
                break
            self._add_prompt_tokens(sequence, group, budget, plan)

    def _admit_waiting(
        self, group: WorkerGroup, plan: BatchPlan, budget: ChunkBudget, waiting: OrderedSequences
    ) -> None:
        """Slots and blocks to waiting sequences, strictly in order: one that does not fit holds the others back. What a
        draining group runs comes in the queue's order, too."""
        is_queue = waiting is self.waiting
        groups = self.groups.values() if is_queue else [group]
        while not budget.is_spent and plan.num_joined_tokens < _MAX_JOINED_TOKENS:
            first, queue = self._front
            moving = self.moves.next(group, groups, first, queue) if is_queue else None
            if moving:
                self._preempt(moving, f"to group {group.group_id}, as its own is to leave")
            if not waiting:
                break
            sequence = waiting.first()
            if not moving and not belongs(sequence, group, groups, queue):
                break
            waiting.remove(sequence)
            together = [sequence] if sequence.samples.beams is None else [sequence, *sequence.samples.take_held()]
            for each in together:
                group.admit(each, plan)
                self._note_found(each, group)
                if group.is_ready(each) and not budget.is_spent:
                    self._add_prompt_tokens(each, group, budget, plan)

    def _note_found(self, sequence: Sequence, group: WorkerGroup) -> None:
        """Once for each request: other samples, and what was preempted, find what is their own."""
        if sequence.num_published_blocks and sequence.index == 0 and not sequence.num_preemptions:
            names = sequence.block_names(sequence.num_published_blocks)
            self.hot_prefixes.note(names, group, self.groups.values())

    def _add_prompt_tokens(self, sequence: Sequence, group: WorkerGroup, budget: ChunkBudget, plan: BatchPlan) -> None:
        context = sequence.num_sent_tokens
        num_tokens = budget.take(sequence.num_pending_tokens, context)
        if sequence.num_pending_tokens == 1 and not plan.chunk_slots:
            # Steps of decodes alone are the fastest. Behind chunks it could be one that reads what they write.
            self._add_decode(sequence, group, plan)
            return
        group.introduce(sequence, plan)
        samples = num_tokens == sequence.num_pending_tokens
        plan.num_context_tokens += context
        plan.num_attended_tokens += num_tokens * context + num_tokens * (num_tokens - 1) // 2
        plan.chunk_slots.append(sequence.slot)
        plan.chunk_num_tokens.append(num_tokens)
        plan.rows.append(ScheduledRow(sequence, sequence.num_preemptions, num_tokens, samples))
        group.blocks.publish(sequence, context + num_tokens)

    def _let_samples_follow(self, plan: BatchPlan) -> None:
        """Where the plan computes the end of a prompt, the request's other samples may take slots."""
        for row in plan.rows:
            if row.sequence.samples.held and row.samples and row.sequence.samples.beams is None:
                for sample in row.sequence.samples.take_held():
                    self.waiting.add(sample)

    # Transitions

    def _preempt(self, sequence: Sequence, why: str) -> None:
        """Takes slot and blocks from a running sequence, and from the beams beside it; they wait, with their tokens."""
        samples, group = sequence.samples, self.groups[sequence.group_id]
        together = [sequence] if samples.beams is None else [each for each in samples.sequences if each.is_running]
        for each in together:
            group.leave(each)
            each.preempt(why)
            group.blocks.save_first(each)
        if samples.beams is not None:
            samples.beams.interrupt()
            sequence, *samples.held = samples.sequences
        self.waiting.add(sequence)
        self.counters.num_preemptions += 1

    def _append(self, sequence: Sequence, token_id: int, row: int) -> SampledToken:
        self.counters.num_output_tokens += 1
        reason = sequence.append(token_id)
        is_first = sequence.num_output_tokens == 1
        num_cached_tokens = sequence.samples.num_cached_tokens if is_first else 0
        if reason is not None:
            self._outputs.complete(sequence, reason)
        elif sequence.num_tokens >= (sequence.num_published_blocks + 1) * self.config.block_size:
            self._publish(sequence)
        return SampledToken(sequence.key, token_id, reason, row, num_cached_tokens)

    def _fail(self, sequence: Sequence) -> RequestKey:
        """Nothing could be sampled for it: what its blocks hold is not to be found again. Returns what ended."""
        self.groups[sequence.group_id].blocks.forget(sequence)
        return self._give_up(sequence)

    def _give_up(self, sequence: Sequence) -> RequestKey:
        key = sequence.key if sequence.samples.beams is None else sequence.request.key
        self.drop(key)
        return key

    def _publish(self, sequence: Sequence) -> None:
        """Lets others find the blocks that the known tokens of a running sequence fill."""
        num_tokens = min(sequence.num_tokens, sequence.num_sent_tokens)
        self.groups[sequence.group_id].blocks.publish(sequence, num_tokens)

    # Beams

    def _advance_beams(self, samples: SequenceGroup) -> list[BeamOutput]:
        """All beams of a request know their candidates: the search goes on. Its outputs, if it has ended."""
        assert samples.beams is not None
        sampled = samples.beams.sampled
        dropped, tokens = samples.beams.advance()
        if not tokens:
            return self._outputs.complete_beams(samples)
        for sequence in dropped:
            self._outputs.finish(sequence, FinishReason.CANCELLED)
        for sequence, token_id in tokens.items():
            if token_id != sampled[sequence]:
                self.groups[sequence.group_id].amend(sequence, token_id)
            sequence.append(token_id)
            self._publish(sequence)
        return []

    # Checks

    def check_invariants(self) -> None:
        """For tests: raises AssertionError if any state contradicts another."""
        running = [sequence for group in self.groups.values() for sequence in group.running]
        for group in self.groups.values():
            group.check_invariants()
            for plan in group.inflight:
                assert plan.num_tokens <= self.config.max_num_batched_tokens, "over the token budget"
        tried = self.suspects.queued
        self.moves.check_invariants()
        self.hot_prefixes.check_invariants()
        held = self._outputs.check_invariants([*running, *self.waiting, *tried])
        for sequence in (*self.waiting, *held, *tried):
            assert sequence.status is SequenceStatus.WAITING
        assert self.waiting.num_counted_tokens == sum(counted_tokens(each.num_tokens) for each in self.waiting)
