"""Sequences move with their blocks, under random traces: groups leave and come back, copies fail and end late, groups
are lost meanwhile. Workers are shadows, which know what each place of each block holds."""

import random
from itertools import cycle

import pytest
from octavo.coordinator.core.drain import WantedCopy
from octavo.coordinator.core.scheduler_config import SchedulerConfig

from .test_block_copies import ActiveCopy, CopyTrace
from .test_scheduler_invariants import Shape


class MoveTrace(CopyTrace):
    """Copies are made because the scheduler wants them; a group that has left comes back at once."""

    def __init__(self, config, num_groups, num_blocks, num_host_blocks=0) -> None:
        super().__init__(config, num_groups, num_blocks, num_host_blocks)
        self.wanted: list[WantedCopy] = []
        self.purposes = {}  # of copies on their way
        self.num_left = 0

    def leave(self, group_id: int) -> None:
        if not any(group.is_draining for group in self.scheduler.groups.values()):
            self.scheduler.drain_group(group_id)
            self.wake_all()

    def schedule(self, group_id: int) -> None:
        super().schedule(group_id)
        self.wanted += self.scheduler.moves.take_wanted()
        self.let_go()

    def result(self, group_id: int, failed_rows=()) -> None:
        super().result(group_id, failed_rows)
        self.let_go()

    def lose(self, group_id: int) -> None:
        if any(group.is_draining for group in self.scheduler.groups.values()):  # the other is all that there is
            self.scheduler.drain_group(1 - group_id, is_draining=False)
        super().lose(group_id)

    def let_go(self) -> None:
        for group_id, group in list(self.scheduler.groups.items()):
            if group.is_draining and self.scheduler.is_drained(group_id):
                assert group.blocks.num_free_blocks == group.blocks.num_blocks
                self.num_left += 1
                super().lose(group_id)

    def go_on(self, index: int, fails: bool) -> None:
        if self.wanted and (index % 2 or not self.active):
            self.start(self.wanted.pop(0))
        else:
            super().go_on(index, fails)

    def start(self, wanted: WantedCopy) -> None:
        """As the shell does."""
        groups, sequence = self.scheduler.groups, wanted.sequence
        source, target = groups[wanted.source_id], groups[wanted.target_id]
        copy = None
        if sequence.group_id == wanted.source_id:
            num_tokens = min(sequence.num_tokens - 1, sequence.num_sent_tokens)
            copy = self.copies.begin(sequence.block_names(num_tokens // source.blocks.block_size), source, target)
        if copy is None:
            self.end(wanted)
        else:
            workers = self.workers[wanted.source_id], self.workers[wanted.target_id]
            self.active.append(ActiveCopy(copy, workers))
            self.purposes[copy] = wanted

    def finish(self, active: ActiveCopy, fails: bool) -> None:
        super().finish(active, fails)
        self.end(self.purposes.pop(active.copy))

    def end(self, wanted: WantedCopy) -> None:
        self.scheduler.end_copy(wanted)
        self.wake_all()
        self.let_go()

    def drain(self) -> None:
        for _ in range(2000):
            while self.woken:
                self.schedule(min(self.woken))
            if not (self.wanted or self.active or any(group.inflight for group in self.scheduler.groups.values())):
                break
            if self.wanted:
                self.start(self.wanted.pop(0))
            elif self.active:
                self.go_on(0, fails=False)
            for group_id in list(self.scheduler.groups):
                self.result(group_id)
        assert not self.scheduler.unfinished_requests(), "starved, or nobody woke their group"
        self.let_go()


def run_trace(seed: int) -> MoveTrace:
    draw = random.Random(seed)
    config = SchedulerConfig(
        block_size=draw.choice([1, 2, 4]), max_num_seqs=draw.randint(2, 8), max_num_batched_tokens=draw.randint(8, 24),
        max_model_len=48, max_num_waiting=12, num_inflight_steps=draw.randint(1, 4), copies_blocks=True,
    )  # fmt: skip
    num_blocks = draw.randint(60, 160) // config.block_size
    trace = MoveTrace(config, 2, num_blocks, num_host_blocks=draw.choice([0, 0, 10, 40]))
    trace.lags = cycle([draw.randint(0, 3) for _ in range(5)])
    loss = draw.choice([0, 0, 0.1])
    for _ in range(400):
        kind = draw.choices(
            ["add", "schedule", "result", "fail", "cancel", "leave", "go_on", "lose"], [2, 5, 5, 0.1, 0.2, 0.3, 3, loss]
        )[0]
        if kind == "add":
            num_beams = draw.choice([0, 0, 0, 2])
            shape = Shape(draw.choice([0, 12, 30]), draw.randint(1, min(3, num_beams or 3)), num_beams)
            event = (kind, draw.randint(1, 40), draw.randint(1, 20), draw.randint(0, 30), draw.randint(-1, 1), shape)
        elif kind in ("leave", "lose"):
            event = (kind, draw.randint(0, 1))
        elif kind == "go_on":
            event = (kind, draw.randint(0, 50), draw.random() < 0.2)
        else:
            event = (kind, draw.randint(0, 50))
        trace.replay([event])
    trace.drain()
    trace.scheduler.check_invariants()
    trace.check_outputs()
    assert not trace.scheduler.moves._copying
    assert not any(group.is_draining for group in trace.scheduler.groups.values()), "a group did not go"
    return trace


@pytest.mark.parametrize("first_seed", range(0, 120, 12))
def test_what_moves_finds_its_blocks_and_nothing_is_lost(first_seed):
    traces = [run_trace(seed) for seed in range(first_seed, first_seed + 12)]
    assert sum(trace.num_received for trace in traces) > 30
    assert sum(trace.num_left for trace in traces) > 12
