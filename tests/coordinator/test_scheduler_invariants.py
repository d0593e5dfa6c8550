"""Random traces: no block lost or owned twice, the budget kept, every request ended, tokens in order and once.

Workers are shadows that know only what plans told them, and a group is scheduled only when the engine would wake it.
"""

from array import array
from collections import defaultdict, deque
from collections.abc import Iterator
from itertools import cycle, repeat
from types import SimpleNamespace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from octavo.coordinator.core.batch_plan import BatchPlan
from octavo.coordinator.core.scheduler import Scheduler, SchedulerConfig
from octavo.coordinator.core.sequence import FinishReason, Request, RequestKey, StopConditions
from octavo.errors import OctavoError

STOP_TOKEN = 999


def token_at(key: RequestKey, position: int, stop_at: int) -> int:
    """The 'model': the token at a position depends on request and position only, as with greedy decoding."""
    return STOP_TOKEN if position == stop_at else (key.handle * 31 + position * 7) % 900


class ShadowWorker:
    """A group's slot table as its workers keep it: only plans change it."""

    def __init__(self, block_size: int, num_blocks: int) -> None:
        self._block_size = block_size
        self._blocks = set(range(num_blocks))
        self._slots: dict[int, SimpleNamespace] = {}
        self._decode_slots: list[int] = []

    def apply(self, plan: BatchPlan, trace: "Trace") -> list[int]:
        """Does what proto/worker.proto says, in its order; the step's sampled tokens."""
        for slot in plan.leave_slots:
            del self._slots[slot]
        for join in plan.joins:
            assert join.slot not in self._slots, "a slot is taken twice"
            assert join.token_ids == trace.known_tokens(join.sampling).tobytes()
            self._slots[join.slot] = SimpleNamespace(
                key=join.sampling,
                num_known=len(join.token_ids) // 4,
                num_computed=join.num_computed_tokens,
                block_ids=list(join.block_ids),
            )
        for slot, block_id in zip(plan.append_slots, plan.append_block_ids, strict=True):
            self._slots[slot].block_ids.append(block_id)
        if plan.decode_slots_changed:
            self._decode_slots = list(plan.decode_slots)
        assert self._decode_slots == plan.decode_slots, "the workers would decode other slots"
        self._check_blocks()
        chunks = zip(plan.chunk_slots, plan.chunk_num_tokens, strict=True)
        sampled = [self._compute(slot, n, trace) for slot, n in [*((slot, 1) for slot in self._decode_slots), *chunks]]
        return [token for token in sampled if token is not None]

    def _check_blocks(self) -> None:
        held = [block_id for slot in self._slots.values() for block_id in slot.block_ids]
        assert len(held) == len(set(held)), "a block is in two tables"
        assert set(held) <= self._blocks

    def _compute(self, slot: int, num_tokens: int, trace: "Trace") -> int | None:
        state = self._slots[slot]
        state.num_computed += num_tokens
        assert state.num_computed <= state.num_known, "a token is computed before it is sampled"
        assert state.num_computed <= len(state.block_ids) * self._block_size, "KV without a block"
        if state.num_computed < state.num_known:
            return None
        state.num_known += 1
        return token_at(state.key, state.num_known - 1, trace.stop_at[state.key])


class Trace:
    """A scheduler under test, workers that compute what plans say, and what each request received."""

    def __init__(self, config: SchedulerConfig, num_groups: int, num_blocks: int) -> None:
        self.scheduler = Scheduler(config)
        for group_id in range(num_groups):
            self.scheduler.add_group(group_id, num_blocks)
        self.workers = [ShadowWorker(config.block_size, num_blocks) for _ in range(num_groups)]
        self.results: list[deque[list[int]]] = [deque() for _ in range(num_groups)]  # of the steps in flight
        self.woken: set[int] = set()  # as Engine and GroupRunner wake groups
        self.stop_at: dict[RequestKey, int] = {}
        self.received: dict[RequestKey, list[int]] = defaultdict(list)
        self.ended: dict[RequestKey, FinishReason] = {}
        self.accepted: dict[RequestKey, Request] = {}
        self.durations_us: Iterator[int] = repeat(0)  # of the steps to come, as their workers measure them

    def replay(self, events: list[tuple]) -> None:
        for name, *arguments in events:
            if name in ("schedule", "result"):
                getattr(self, name)(arguments[0] % len(self.scheduler.groups))
            else:
                getattr(self, name)(*arguments)
            self.scheduler.check_invariants()

    def add(self, num_prompt: int, max_tokens: int, stop_after: int, priority: int) -> None:
        key = RequestKey(0, len(self.stop_at))
        request = Request(
            key, array("i", [1] * num_prompt), StopConditions(max_tokens, 0, frozenset([STOP_TOKEN])), priority, key
        )
        self.stop_at[key] = num_prompt + stop_after
        try:
            self.scheduler.add(request)
        except OctavoError:
            return
        self.accepted[key] = request
        self.wake_all()

    def wake_all(self) -> None:
        self.woken = set(self.scheduler.groups)

    def known_tokens(self, key: RequestKey) -> "array[int]":
        return self.accepted[key].prompt_token_ids + array("i", self.received[key])

    def lose(self, group_id: int) -> None:
        self.scheduler.remove_group(group_id)
        self.wake_all()

    def schedule(self, group_id: int) -> None:
        plan = self.scheduler.schedule(group_id)
        if plan is None:
            self.woken.discard(group_id)
            return
        assert 0 < plan.num_tokens <= self.scheduler.config.max_num_batched_tokens
        assert len(set(plan.decode_slots) | set(plan.chunk_slots)) == len(plan.decode_slots) + len(plan.chunk_slots)
        assert len(plan.rows) <= self.scheduler.config.max_num_seqs
        if any(sequence.num_pending_tokens > 1 for sequence in self.scheduler.groups[group_id].running):
            room = self.scheduler.config.max_num_batched_tokens - len(plan.decode_slots)
            assert sum(plan.chunk_num_tokens) >= min(64, room), "a prompt waits, and the step takes hardly any of it"
        tokens = self.workers[group_id].apply(plan, self)
        assert len(tokens) == plan.num_samples
        self.results[group_id].append(tokens)

    def result(self, group_id: int) -> None:
        if not self.scheduler.groups[group_id].inflight:
            return
        tokens, duration_us = self.results[group_id].popleft(), next(self.durations_us)
        for token in self.scheduler.update(group_id, tokens, model_time_us=duration_us).tokens:
            assert token.key not in self.ended, "a token after the end"
            self.received[token.key].append(token.token_id)
            if token.finish_reason:
                self.ended[token.key] = token.finish_reason
        self.woken.add(group_id)
        if self.scheduler.waiting:
            self.wake_all()

    def cancel(self, index: int) -> None:
        open_keys = [key for key in self.accepted if key not in self.ended]
        if open_keys:
            key = open_keys[index % len(open_keys)]
            self.scheduler.cancel(key)
            self.ended[key] = FinishReason.CANCELLED
            self.wake_all()

    def drain(self) -> None:
        """Runs until nothing is woken or in flight; a fixed bound turns starvation into a failure."""
        for _ in range(4000):
            while self.woken:
                self.schedule(min(self.woken))
            busy = [group_id for group_id, group in self.scheduler.groups.items() if group.inflight]
            if not busy:
                break
            for group_id in busy:
                self.result(group_id)
        assert not self.scheduler.unfinished_requests(), "starved, or nobody woke their group"

    def check_outputs(self) -> None:
        for key, request in self.accepted.items():
            num_prompt = len(request.prompt_token_ids)
            tokens = self.received[key]
            assert tokens == [token_at(key, num_prompt + i, self.stop_at[key]) for i in range(len(tokens))]
            if self.ended[key] is FinishReason.STOP:
                assert tokens[-1] == STOP_TOKEN
            elif self.ended[key] is FinishReason.LENGTH:
                limit = self.scheduler.config.max_model_len
                assert len(tokens) == min(request.stop.max_tokens, limit - num_prompt)
        for group in self.scheduler.groups.values():
            assert group.blocks.num_free_blocks == group.blocks.num_blocks


events = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 40), st.integers(1, 20), st.integers(0, 30), st.integers(-1, 1)),
        st.tuples(st.just("schedule"), st.integers(0, 1)),
        st.tuples(st.just("result"), st.integers(0, 1)),
        st.tuples(st.just("cancel"), st.integers(0, 50)),
    ),
    max_size=60,
)
configs = st.builds(
    lambda block_size, max_num_seqs, budget, depth: SchedulerConfig(
        block_size, max_num_seqs, max_num_seqs + budget, max_model_len=48, max_num_waiting=12, num_inflight_steps=depth
    ),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 5),
    st.integers(0, 12),
    st.integers(1, 4),
)


@settings(max_examples=1500, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(configs, st.integers(1, 2), st.integers(1, 20), events)
def test_random_traces(config, num_groups, num_blocks, trace_events):
    trace = Trace(config, num_groups, num_blocks)
    trace.replay(trace_events)
    trace.drain()
    trace.scheduler.check_invariants()
    trace.check_outputs()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(configs, events, st.integers(0, 59))
def test_a_lost_group_loses_no_request(config, trace_events, when):
    trace = Trace(config, num_groups=2, num_blocks=20)
    trace.replay(trace_events[:when])
    trace.lose(1)
    trace.replay(trace_events[when:])
    trace.drain()
    trace.check_outputs()


paced_events = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 900), st.integers(1, 20), st.integers(0, 30), st.integers(-1, 1)),
        st.tuples(st.just("schedule"), st.integers(0, 1)),
        st.tuples(st.just("result"), st.integers(0, 1)),
        st.tuples(st.just("cancel"), st.integers(0, 50)),
    ),
    max_size=60,
)
paced_configs = st.builds(
    lambda budget, depth, target: SchedulerConfig(
        16, 5, budget, max_model_len=1024, max_num_waiting=12, num_inflight_steps=depth, itl_target_ms=target
    ),
    st.integers(5, 2000),
    st.integers(1, 4),
    st.floats(0.5, 100.0),
)
durations_us = st.lists(st.one_of(st.integers(1, 200_000), st.just(0)), min_size=1, max_size=20)


@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(paced_configs, st.integers(1, 2), st.integers(64, 200), paced_events, durations_us)
def test_pacing_starves_nobody(config, num_groups, num_blocks, trace_events, durations):
    """Whatever the steps' durations are said to be."""
    trace = Trace(config, num_groups, num_blocks)
    trace.durations_us = cycle(durations)
    trace.replay(trace_events)
    trace.drain()
    trace.check_outputs()
