"""Groups that leave under random traces: nothing is lost, nothing comes to them, and they are empty in the end."""

from itertools import cycle

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from octavo.coordinator.core.placement import could_hold
from octavo.coordinator.core.scheduler_config import SchedulerConfig

from .test_scheduler_invariants import Trace, configs, durations_us, paced_configs, paced_events, shaped_events


class DrainTrace(Trace):
    """Groups of sizes of their own, of which some are to leave; removed as soon as nothing of them is left, as by the
    engine."""

    def __init__(self, config, sizes, num_host_blocks):
        super().__init__(config, 0, 0)
        for num_blocks in sizes:
            self.add_group(num_blocks, num_host_blocks)

    def leave(self, group_id):
        self.scheduler.drain_group(group_id)
        self.wake_all()

    def schedule(self, group_id):
        group = self.scheduler.groups[group_id]
        requests = {sequence.samples for sequence in group.running}
        super().schedule(group_id)
        if group.is_draining:
            newcomers = [sequence.samples for sequence in group.running if sequence.samples not in requests]
            assert not any(map(self.fits_elsewhere, newcomers)), "a request came to a group that is to leave"
        self.remove_drained()

    def fits_elsewhere(self, samples):
        return any(could_hold(group, samples) for group in self.scheduler.groups.values() if not group.is_draining)

    def result(self, group_id, failed_rows=()):
        super().result(group_id, failed_rows)
        self.remove_drained()

    def remove_drained(self):
        for group_id, group in list(self.scheduler.groups.items()):
            if group.is_draining and self.scheduler.is_drained(group_id):
                assert group.blocks.num_free_blocks == group.blocks.num_blocks
                self.scheduler.remove_group(group_id)
                self.woken.discard(group_id)


def run(config, sizes, num_host_blocks, lags, trace_events, when, durations=(0,)):
    """The first group stays; the others leave after so many events."""
    trace = DrainTrace(config, sizes, num_host_blocks)
    trace.durations_us = cycle(durations)
    trace.lags = cycle(lags)
    for index, event in enumerate(trace_events):
        for group_id, moment in enumerate(when, start=1):
            if moment == index and group_id in trace.scheduler.groups:
                trace.leave(group_id)
        trace.replay([event])
    for group_id in range(1, len(sizes)):
        if group_id in trace.scheduler.groups:
            trace.leave(group_id)
    trace.drain()
    trace.scheduler.check_invariants()
    trace.remove_drained()
    assert list(trace.scheduler.groups) == [0], "a group did not go"
    trace.check_outputs()
    return trace


lags = st.lists(st.integers(0, 3), min_size=1, max_size=5)
moments = st.lists(st.integers(0, 59), min_size=2, max_size=2)


@settings(max_examples=1000, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(configs, st.integers(1, 40), st.integers(1, 2), st.integers(0, 12), lags, shaped_events, moments)
def test_what_runs_moves_and_nothing_is_lost(config, num_blocks, num_leaving, num_host, lags, trace_events, when):
    run(config, [num_blocks] * (1 + num_leaving), num_host, lags, trace_events, when[:num_leaving])


@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(configs, st.lists(st.integers(1, 60), min_size=3, max_size=3), lags, shaped_events, moments)
def test_groups_of_different_sizes_each_hold_what_no_other_can(config, sizes, lags, trace_events, when):
    run(config, sizes, 0, lags, trace_events, when)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(paced_configs, st.integers(64, 200), paced_events, moments, durations_us)
def test_what_moves_keeps_the_pace_of_decodes_and_comes_all_the_same(config, size, trace_events, when, durations):
    run(config, [size] * 3, 0, [0], trace_events, when, durations)


def test_the_only_prompt_beside_decodes_may_be_one_that_moves():
    config = SchedulerConfig(
        16, 8, 2048, max_model_len=1024, max_num_waiting=12, num_inflight_steps=1, itl_target_ms=10.0
    )
    trace = DrainTrace(config, [200, 200], 0)
    trace.durations_us = cycle([10_000, 20_000, 15_000])
    for num_prompt in (100, 300, 200, 50, 400, 150):
        trace.replay([("add", num_prompt, 60, 70, 0)])
        for _ in range(6):
            trace.replay([("schedule", 0), ("schedule", 1), ("result", 0), ("result", 1)])
    assert all(group.step_time.is_fitted for group in trace.scheduler.groups.values())
    assert all(group.running for group in trace.scheduler.groups.values())
    trace.leave(1)
    trace.drain()
    assert list(trace.scheduler.groups) == [0]
    trace.check_outputs()


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(configs, lags, shaped_events, st.integers(0, 59), st.integers(0, 59))
def test_a_group_that_fails_while_it_leaves_loses_nothing(config, lags, trace_events, when, how_long):
    trace = DrainTrace(config, [20, 20], 0)
    trace.replay(trace_events[:when])
    trace.leave(1)
    for event in trace_events[when : when + how_long]:
        trace.replay([event])
    if 1 in trace.scheduler.groups:
        trace.lose(1)
    trace.replay(trace_events[when + how_long :])
    trace.drain()
    trace.check_outputs()


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(configs, shaped_events, st.integers(0, 59), st.integers(0, 59))
def test_a_group_that_is_to_leave_and_then_is_not_serves_on(config, trace_events, when, how_long):
    trace = DrainTrace(config, [20, 20], 0)
    trace.replay(trace_events[:when])
    trace.leave(1)
    for event in trace_events[when : when + how_long]:
        trace.replay([event])
    if 1 in trace.scheduler.groups:
        trace.lose(0)
        trace.scheduler.drain_group(1, is_draining=False)
        trace.scheduler.groups[1].is_draining = False
        trace.wake_all()
    [left] = trace.scheduler.groups
    trace.drain()
    assert left in trace.scheduler.groups
    trace.check_outputs()
