"""Who of a step's sequences gets prompt tokens, in which order, and how many there are for all."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from .batch_plan import BatchPlan
from .chunk_budget import ChunkBudget, counted_tokens, paced_num_tokens
from .ordered_sequences import WaitingQueue
from .scheduler_config import SchedulerConfig
from .sequence import Sequence
from .step_time import StepCosts
from .worker_group import WorkerGroup


@dataclass(frozen=True, slots=True)
class Takers:
    """Who else takes prompts, and whose."""

    num_groups: int  # that share the queue
    first_mover: Sequence | None = None  # runs in a group that is to leave, and may come here
    num_mover_tokens: int = 0  # that it has to compute here


class PromptTurns:
    """Of one step of a group: those that run and have several tokens to compute, and the queue behind them."""

    def __init__(self, group: WorkerGroup, waiting: WaitingQueue, takers: Takers, config: SchedulerConfig) -> None:
        self._unfinished = [sequence for sequence in group.running if _has_chunk(sequence, group)]
        self._group, self._waiting, self._takers, self._config = group, waiting, takers, config

    def budget(self, plan: BatchPlan) -> ChunkBudget:
        """For the step's prompt tokens: what it has room for; beside decodes, what leaves them their pace."""
        config, unfinished = self._config, self._unfinished
        num_tokens = config.max_num_batched_tokens - plan.num_tokens
        if not (config.itl_target_ms and plan.decode_slots and self._group.step_time.is_fitted):
            return ChunkBudget(num_tokens)
        next_ones = [*unfinished, *self._newcomers]
        if not next_ones:
            return ChunkBudget(0)
        num_decodes = len(plan.decode_slots)
        costs = self._group.step_time.costs(num_decodes)
        longest = max(sequence.num_tokens for sequence in next_ones)
        price = paced_num_tokens(config.itl_target_ms, costs, num_decodes, self._num_backlog_tokens(costs), longest)
        return ChunkBudget(num_tokens, costs, price, num_decodes)

    @property
    def _newcomers(self) -> list[Sequence]:
        """The first of those who wait, and of those who run elsewhere and are to move."""
        movers = [self._takers.first_mover] if self._takers.first_mover is not None else []
        return [self._waiting.first(), *movers] if self._waiting else movers

    def _num_backlog_tokens(self, costs: StepCosts) -> int:
        """What the group has to compute before nothing waits for it: of its own, its share of the queue's, and the next
        that moves: those behind it run on meanwhile."""
        share = -(-self._waiting.num_counted_tokens // self._takers.num_groups)
        prices = (costs.price(sequence.num_pending_tokens, sequence.num_sent_tokens) for sequence in self._unfinished)
        return share + sum(map(counted_tokens, prices)) + counted_tokens(self._takers.num_mover_tokens)

    def order(self, step_id: int) -> tuple[SequenceOf[Sequence], SequenceOf[Sequence]]:
        """Who gets prompt tokens before newcomers, and who behind them. In every other step a prompt that has more to
        compute than any step holds lets shorter ones pass: they would wait for all of it, and it hardly waits for them.
        """
        if step_id % 2:
            return self._unfinished, ()
        most = self._config.max_num_batched_tokens
        return (
            [sequence for sequence in self._unfinished if sequence.num_pending_tokens <= most],
            [sequence for sequence in self._unfinished if sequence.num_pending_tokens > most],
        )


def _has_chunk(sequence: Sequence, group: WorkerGroup) -> bool:
    return sequence.num_pending_tokens > 1 and group.is_ready(sequence)
