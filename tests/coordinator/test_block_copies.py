"""Copies between groups: no plan touches what is copied, nobody reads what was not, and no block is lost on the way."""

import random
from array import array
from collections import deque
from dataclasses import dataclass, field
from itertools import cycle

import pytest
from octavo.coordinator.core.block_copies import BlockCopies, BlockCopy
from octavo.coordinator.core.copy_costs import CopyCosts
from octavo.coordinator.core.scheduler import Scheduler
from octavo.coordinator.core.scheduler_config import SchedulerConfig
from octavo.coordinator.core.sequence import Request, RequestKey, StopConditions
from octavo.coordinator.core.step_outcome import StepReport
from octavo.coordinator.core.step_time import StepLoad
from octavo.coordinator.core.worker_group import GroupMemory

from .shadow import ShadowWorker
from .test_scheduler_invariants import Shape, Trace

_FOR_EVER = 1 << 60  # a guard that no finished transfer lifts


@dataclass
class ActiveCopy:
    copy: BlockCopy
    workers: tuple[ShadowWorker, ShadowWorker]  # of source and target, as they were when it began
    read: list[list[int | None]] = field(default_factory=list)  # what the source sends, once it does


class CopyTrace(Trace):
    """Plans reach the workers only when their results are due, so what is in flight is still to be written."""

    def __init__(self, config: SchedulerConfig, num_groups: int, num_blocks: int, num_host_blocks: int = 0) -> None:
        super().__init__(config, num_groups, num_blocks, num_host_blocks)
        self.copies = BlockCopies(self.scheduler.groups)
        self.active: list[ActiveCopy] = []
        self.plans = [deque() for _ in range(num_groups)]
        self.sizes = (num_blocks, num_host_blocks)
        self.num_received = 0

    def schedule(self, group_id: int) -> None:
        if group_id not in self.scheduler.groups:
            return
        plan = self.scheduler.schedule(group_id)
        if plan is None:
            self.woken.discard(group_id)
        else:
            self.plans[group_id].append((plan, iter([self.of_join(join) for join in plan.joins])))

    def result(self, group_id: int, failed_rows=()) -> None:
        if group_id in self.scheduler.groups and self.plans[group_id]:
            plan, keys = self.plans[group_id].popleft()
            self.results[group_id].append(self.workers[group_id].apply(plan, lambda _: next(keys)))
            super().result(group_id, failed_rows)

    def lose(self, group_id: int) -> None:
        """And it comes back at once, in another incarnation."""
        super().lose(group_id)
        num_blocks, num_host_blocks = self.sizes
        self.plans[group_id].clear()
        self.results[group_id].clear()
        self.workers[group_id] = ShadowWorker(
            self.scheduler.config.block_size, num_blocks, num_host_blocks, self.sample
        )
        self.scheduler.add_group(group_id, GroupMemory(num_blocks, num_host_blocks))
        self.wake_all()

    def copy(self, source_id: int, index: int) -> None:
        """Of the sequences that run in a group."""
        groups = self.scheduler.groups
        source, target = groups[source_id], groups[1 - source_id]
        if not (running := [each for each in source.running if each.reads_cache]):
            return
        sequence = running[index % len(running)]
        names = sequence.block_names(min(sequence.num_tokens, sequence.num_sent_tokens) // source.blocks.block_size)
        if copy := self.copies.begin(names, source, target):
            workers = self.workers[source_id], self.workers[1 - source_id]
            self.active.append(ActiveCopy(copy, workers))

    def go_on(self, index: int, fails: bool) -> None:
        """With one of the copies: it begins when it may, and ends some time later."""
        if not self.active:
            return
        active = self.active[index % len(self.active)]
        if self.copies.is_over(active.copy):
            self.finish(active, fails=True)
        elif active.read:
            self.finish(active, fails)
        elif self.copies.is_ready(active.copy):
            self.begin(active)

    def begin(self, active: ActiveCopy) -> None:
        source, target = active.workers
        active.read = [list(source._blocks[block_id]) for block_id in active.copy.source_blocks]
        assert all(None not in content for content in active.read), "a block is copied before it is computed"
        for block_id in active.copy.target_blocks:
            # A rank waits for what it moved in steps whose results are there; none moves such a block later.
            group = active.copy.target
            assert target._guarded.get(block_id, 0) <= min(
                group.num_finished_steps, group.blocks.transfers.finished_step
            )
            target._guarded[block_id] = _FOR_EVER
            target._blocks[block_id] = [None] * len(target._blocks[block_id])

    def finish(self, active: ActiveCopy, fails: bool) -> None:
        self.active.remove(active)
        source, target = active.workers
        for content, source_block, target_block in zip(
            active.read, active.copy.source_blocks, active.copy.target_blocks, strict=bool(active.read)
        ):
            assert source._blocks[source_block] == content, "a block was written while it was copied"
            assert target._blocks[target_block] == [None] * len(content), "a block was written while it was copied to"
            del target._guarded[target_block]
            if not fails and active.read:
                target._blocks[target_block] = content
        if fails:
            self.copies.drop(active.copy)
        else:
            self.num_received += self.copies.finish(active.copy, 0.001)
        self.wake_all()

    def drain(self) -> None:
        for _ in range(2000):
            while self.woken:
                self.schedule(min(self.woken))
            for index in range(len(self.active)):
                self.go_on(index, fails=False)
            busy = [group_id for group_id, group in self.scheduler.groups.items() if group.inflight]
            for group_id in busy:
                self.result(group_id)
            if not (busy or self.active or self.woken):
                break
        assert not self.scheduler.unfinished_requests(), "starved, or nobody woke their group"


def run_trace(seed: int) -> CopyTrace:
    draw = random.Random(seed)
    config = SchedulerConfig(
        block_size=draw.choice([1, 2, 4]), max_num_seqs=draw.randint(4, 8), max_num_batched_tokens=draw.randint(8, 24),
        max_model_len=48, max_num_waiting=12, num_inflight_steps=draw.randint(1, 4),
    )  # fmt: skip
    num_blocks = draw.randint(60, 160) // config.block_size
    trace = CopyTrace(config, 2, num_blocks, num_host_blocks=draw.choice([0, 0, 10, 40]))
    trace.lags = cycle([draw.randint(0, 3) for _ in range(5)])
    loss = draw.choice([0, 0, 0.1])
    for _ in range(300):
        kind = draw.choices(
            ["add", "schedule", "result", "fail", "cancel", "copy", "go_on", "lose"], [3, 5, 5, 0.2, 0.3, 2, 4, loss]
        )[0]
        if kind == "add":
            num_beams = draw.choice([0, 0, 0, 2])
            shape = Shape(draw.choice([0, 12, 30]), draw.randint(1, min(3, num_beams or 3)), num_beams)
            event = (kind, draw.randint(1, 40), draw.randint(1, 20), draw.randint(0, 30), draw.randint(-1, 1), shape)
        elif kind == "copy":
            event = (kind, draw.randint(0, 1), draw.randint(0, 50))
        elif kind == "go_on":
            event = (kind, draw.randint(0, 50), draw.random() < 0.2)
        elif kind == "lose":
            event = (kind, draw.randint(0, 1))
        else:
            event = (kind, draw.randint(0, 50))
        trace.replay([event])
    trace.drain()
    trace.scheduler.check_invariants()
    trace.check_outputs()
    return trace


@pytest.mark.parametrize("first_seed", range(0, 120, 12))
def test_copies_beside_everything_else(first_seed):
    traces = [run_trace(seed) for seed in range(first_seed, first_seed + 12)]
    assert sum(trace.num_received for trace in traces) > 30


def two_groups(num_blocks=32, num_running=1, num_prompt=17) -> tuple[Scheduler, BlockCopies]:
    """Blocks of 4 tokens; the first group has computed prompts that begin alike in 8 tokens."""
    scheduler = Scheduler(SchedulerConfig(4, 8, 64, max_model_len=64, max_num_waiting=9, num_inflight_steps=2))
    scheduler.add_group(0, GroupMemory(32))
    for index in range(num_running):
        prompt = array("i", [1] * 8 + [2 + index] * (num_prompt - 8))
        scheduler.add(Request(RequestKey(0, index), prompt, StopConditions(40), sampling=index))
    scheduler.schedule(0)
    scheduler.add_group(1, GroupMemory(num_blocks))
    return scheduler, BlockCopies(scheduler.groups)


def end_step(scheduler: Scheduler, group_id: int = 0) -> None:
    plan = scheduler.groups[group_id].inflight[0]
    scheduler.update(group_id, StepReport([7] * plan.num_samples))


def begin(scheduler: Scheduler, copies: BlockCopies, index: int = 0) -> BlockCopy | None:
    source, target = scheduler.groups[0], scheduler.groups[1]
    sequence = list(source.running)[index]
    return copies.begin(sequence.block_names(sequence.num_sent_tokens // 4), source, target)


def test_a_sequence_that_moves_finds_what_was_copied():
    scheduler, copies = two_groups()
    copy = begin(scheduler, copies)
    assert not copies.is_ready(copy), "the step that computes the blocks is in flight"
    end_step(scheduler)
    assert copies.is_ready(copy)
    assert scheduler.groups[1].blocks.num_free_blocks == 32 - 4
    assert copies.finish(copy, 1.0) == 4
    scheduler.check_invariants()
    assert scheduler.groups[1].blocks.num_free_blocks == 32
    scheduler.remove_group(0)
    plan = scheduler.schedule(1)
    assert [join.num_computed_tokens for join in plan.joins] == [16]
    assert plan.joins[0].block_ids[:4] == copy.target_blocks


def test_what_the_target_has_is_not_copied_and_stays_meanwhile():
    scheduler, copies = two_groups(num_running=2)
    end_step(scheduler)
    first = begin(scheduler, copies, 0)
    copies.finish(first, 1.0)
    second = begin(scheduler, copies, 1)
    assert second.kept_blocks == first.target_blocks[:2]
    assert len(second.names) == 2
    assert all(scheduler.groups[1].blocks.pool.ref_count(block_id) == 1 for block_id in second.kept_blocks)
    assert begin(scheduler, copies, 0) is None
    copies.drop(second)
    scheduler.check_invariants()
    assert scheduler.groups[1].blocks.num_free_blocks == 32


def test_only_what_has_room_is_copied():
    scheduler, copies = two_groups(num_blocks=3)
    end_step(scheduler)
    copy = begin(scheduler, copies)
    assert len(copy.names) == 3
    assert begin(scheduler, copies) is None
    copies.finish(copy, 1.0)
    scheduler.check_invariants()


@pytest.mark.parametrize(("in_abundance", "num_copied"), [(False, 4), (True, 0)])
def test_what_nobody_waits_for_leaves_as_much_as_it_takes(in_abundance, num_copied):
    scheduler, copies = two_groups(num_blocks=7)
    end_step(scheduler)
    names = scheduler.groups[0].running.first().block_names(4)
    copy = copies.begin(names, scheduler.groups[0], scheduler.groups[1], in_abundance)
    assert len(copy.names if copy else []) == num_copied
    if copy:
        copies.finish(copy, 1.0)
    scheduler.check_invariants()


def test_a_copy_to_blocks_that_a_plan_in_flight_writes_waits_for_it():
    scheduler, copies = two_groups(num_blocks=12)
    end_step(scheduler)
    prompt = array("i", [9] * 41)
    key = RequestKey(0, 9)
    scheduler.add(Request(key, prompt, StopConditions(3), sampling=9))
    scheduler.schedule(1)
    scheduler.cancel(key)  # its blocks are free, and about to be written
    copy = begin(scheduler, copies)
    assert not copies.is_ready(copy)
    end_step(scheduler, 1)
    assert copies.is_ready(copy)


def test_a_lost_group_ends_the_copy_and_its_successor_knows_nothing_of_it():
    for lost in (0, 1):
        scheduler, copies = two_groups()
        end_step(scheduler)
        copy = begin(scheduler, copies)
        scheduler.remove_group(lost)
        scheduler.add_group(lost, GroupMemory(32))
        assert copies.is_over(copy)
        copies.finish(copy, 1.0) if lost == 0 else copies.drop(copy)
        scheduler.check_invariants()
        assert scheduler.groups[lost].blocks.num_free_blocks == 32
        assert scheduler.groups[lost].blocks.num_cached_blocks == 0


def test_what_may_still_be_written_stays_out_of_use():
    scheduler, copies = two_groups()
    end_step(scheduler)
    copy = begin(scheduler, copies)
    copies.abandon(copy)
    scheduler.check_invariants()
    assert scheduler.groups[1].blocks.num_free_blocks == 32 - 4
    assert scheduler.groups[0].blocks.pool.num_shared == 0


def test_what_the_source_has_forgotten_does_not_spread():
    scheduler, copies = two_groups()
    end_step(scheduler)
    copy = begin(scheduler, copies)
    sequence = next(iter(scheduler.groups[0].running))
    scheduler.groups[0].blocks.forget(sequence)
    assert copies.finish(copy, 1.0) == 0
    scheduler.check_invariants()
    assert scheduler.groups[1].blocks.num_cached_blocks == 0


def costs_of(*observed: tuple[int, float], token_ms=0.1):
    """Of copies (blocks, milliseconds) to a group whose blocks of 4 tokens are computed in 4 * token_ms."""
    scheduler, _ = two_groups()
    source, target = scheduler.groups[0], scheduler.groups[1]
    for num_tokens in (100, 1000):
        for _ in range(20):
            target.step_time.observe(StepLoad(0, num_tokens), 1 + num_tokens * token_ms)
    costs = CopyCosts()
    for num_blocks, duration_ms in observed:
        costs.observe(source, target, num_blocks, duration_ms)
    return lambda num_blocks: costs.pays(source, target, num_blocks)


def test_the_first_copy_is_tried():
    assert costs_of()(1)


@pytest.mark.parametrize(
    ("observed", "expected"),
    [
        ([(10, 1.0)], {10: True, 1: True, 20: True}),
        ([(10, 5.0)], {10: False, 20: False, 21: True}),  # 4 ms to compute; more is unknown land
        ([(1, 3.0), (100, 13.0)], {1: False, 5: False, 20: True, 100: True}),  # 3 ms, and 0.1 ms each
        ([(100, 80.0), (1, 1.0)], {1: False, 100: False, 200: False}),
    ],
)
def test_a_copy_is_to_be_cheaper_than_computing(observed, expected):
    assert {num_blocks: costs_of(*observed)(num_blocks) for num_blocks in expected} == expected


def test_what_was_dear_once_is_tried_again():
    pays = costs_of((10, 8.0))
    assert [pays(10) for _ in range(30)].index(True) > 5
