"""Random traces: no block lost or owned twice, the budget kept, every request ended, tokens in order and once.

Workers are shadows that know only what plans told them, and a group is scheduled only when the engine would wake it.
"""

import random
from array import array
from collections import defaultdict, deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import cycle, repeat

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from octavo.coordinator.core.batch_plan import SlotJoin
from octavo.coordinator.core.beam_search import BeamSearch, BeamSearchParams
from octavo.coordinator.core.scheduler import Scheduler
from octavo.coordinator.core.scheduler_config import SchedulerConfig
from octavo.coordinator.core.sequence import FinishReason, Request, RequestKey, StopConditions
from octavo.coordinator.core.step_outcome import StepReport
from octavo.coordinator.core.worker_group import GroupMemory
from octavo.errors import OctavoError

from .shadow import ShadowResult, ShadowWorker, candidates_after

STOP_TOKEN = 999


def token_at(key: RequestKey, position: int, stop_at: int) -> int:
    """The 'model': the token at a position depends on output and position only, as with greedy decoding."""
    return STOP_TOKEN if position == stop_at else (key.handle * 31 + position * 7) % 900


def beams_alone(request: Request, max_model_len: int) -> list[list[int]]:
    """The outputs of a beam search that nothing disturbs."""
    prompt = list(request.prompt_token_ids)
    max_tokens = min(request.stop.max_tokens, max_model_len - len(prompt))
    search = BeamSearch(request.beam_search, request.stop.stop_token_ids, max_tokens)
    beams: list[list[int]] = [[]]
    while beams:
        found = [candidates_after(prompt + beam, num_candidates(request)) for beam in beams]
        beams = [[*beams[each.parent], each.token_id] for each in search.advance(found, beams)]
    return [list(hypothesis.token_ids) for hypothesis in search.finished[: request.num_samples]]


def num_candidates(request: Request) -> int:
    return request.beam_search.num_candidates(len(request.stop.stop_token_ids)) if request.beam_search else 0


@dataclass(frozen=True)
class Shape:
    """What kind of request: how much of its prompt others share, outputs, beams (0: sampled)."""

    num_shared: int = 0
    num_outputs: int = 1
    num_beams: int = 0


class Trace:
    """A scheduler under test, workers that compute what plans say, and what each request received."""

    def __init__(self, config: SchedulerConfig, num_groups: int, num_blocks: int, num_host_blocks: int = 0) -> None:
        self.scheduler = Scheduler(config)
        self.workers: list[ShadowWorker] = []
        self.results: list[deque[ShadowResult]] = []  # of the steps in flight
        for _ in range(num_groups):
            self.add_group(num_blocks, num_host_blocks)
        self.woken: set[int] = set()  # as Engine and GroupRunner wake groups
        self.stop_at: dict[RequestKey, int] = {}
        self.received: dict[RequestKey, list[int]] = defaultdict(list)
        self.ended: dict[RequestKey, FinishReason] = {}
        self.accepted: dict[RequestKey, Request] = {}  # by the key of each output
        self.requests: list[Request] = []
        self.num_added = 0
        self.num_cached_tokens: dict[RequestKey, int] = {}
        self.lags: Iterator[int] = repeat(0)  # steps by which word of transfers is late
        self.durations_us: Iterator[int] = repeat(0)  # of the steps to come, as their workers measure them

    def add_group(self, num_blocks: int, num_host_blocks: int = 0) -> None:
        self.scheduler.add_group(len(self.workers), GroupMemory(num_blocks, num_host_blocks))
        self.workers.append(ShadowWorker(self.scheduler.config.block_size, num_blocks, num_host_blocks, self.sample))
        self.results.append(deque())

    def replay(self, events: list[tuple]) -> None:
        for name, *arguments in events:
            if name in ("schedule", "result", "fail"):
                group_ids = list(self.scheduler.groups)
                getattr(self, name)(group_ids[arguments[0] % len(group_ids)])
            else:
                getattr(self, name)(*arguments)
            self.scheduler.check_invariants()

    def add(self, num_prompt: int, max_tokens: int, stop_after: int, priority: int, shape: Shape = Shape()) -> None:
        key = RequestKey(0, 4 * self.num_added)
        self.num_added += 1
        prompt = [1] * min(shape.num_shared, num_prompt)
        prompt += [key.handle % 900 + 2] * (num_prompt - len(prompt))
        stops = frozenset([7, 8]) if shape.num_beams else frozenset([STOP_TOKEN])
        request = Request(
            key, array("i", prompt), StopConditions(max_tokens, 0, stops), priority, key,
            num_samples=shape.num_outputs,
            beam_search=BeamSearchParams(shape.num_beams, length_penalty=0.5) if shape.num_beams else None,
        )  # fmt: skip
        try:
            self.scheduler.add(request)
        except OctavoError:
            return
        self.requests.append(request)
        for index in range(shape.num_outputs):
            self.accepted[key.output(index)] = request
            self.stop_at[key.output(index)] = num_prompt + stop_after + index
        self.wake_all()

    def wake_all(self) -> None:
        self.woken = set(self.scheduler.groups)

    def sample(self, key: RequestKey, token_ids: list[int]) -> int:
        return token_at(key, len(token_ids), self.stop_at[key])

    def of_join(self, join: SlotJoin) -> tuple[RequestKey, int]:
        """Which output joins, after a check of the tokens it brings."""
        request = self.accepted[join.sampling]
        key = request.key if request.beam_search else request.key.output(join.index)
        known = request.prompt_token_ids + array("i", self.received[key])
        if not request.beam_search:
            assert join.token_ids == known.tobytes()
        return key, num_candidates(request)

    def lose(self, group_id: int) -> None:
        self.scheduler.remove_group(group_id)
        self.wake_all()

    def schedule(self, group_id: int) -> None:
        plan = self.scheduler.schedule(group_id)
        if plan is None:
            self.woken.discard(group_id)
            return
        group = self.scheduler.groups[group_id]
        assert plan.num_tokens <= self.scheduler.config.max_num_batched_tokens
        assert plan.rows or len(plan.transfers) or group.blocks.transfers.last_step, "a step for nothing"
        assert len(set(plan.decode_slots) | set(plan.chunk_slots)) == len(plan.decode_slots) + len(plan.chunk_slots)
        assert len(plan.rows) <= self.scheduler.config.max_num_seqs
        if any(sequence.num_pending_tokens > 1 and group.is_ready(sequence) for sequence in group.running):
            room = self.scheduler.config.max_num_batched_tokens - len(plan.decode_slots)
            assert sum(plan.chunk_num_tokens) >= min(64, room), "a prompt waits, and the step takes hardly any of it"
        result = self.workers[group_id].apply(plan, self.of_join)
        assert len(result.token_ids) == plan.num_samples
        self.results[group_id].append(result)

    def fail(self, group_id: int) -> None:
        """A result whose first sampling row has nothing to sample from."""
        self.result(group_id, failed_rows={0})

    def result(self, group_id: int, failed_rows: Collection[int] = ()) -> None:
        if not self.scheduler.groups[group_id].inflight:
            return
        result, duration_us = self.results[group_id].popleft(), next(self.durations_us)
        lag = next(self.lags) if result.has_rows else 0
        finished = self.workers[group_id].finish_transfers(max(0, result.step_id - lag))
        report = StepReport(result.token_ids, (), result.candidates.__getitem__, duration_us, finished, failed_rows)
        outcome = self.scheduler.update(group_id, report)
        for token in outcome.tokens:
            self.take(token.key, [token.token_id], token.finish_reason)
            if token.num_cached_tokens:
                self.num_cached_tokens[token.key] = token.num_cached_tokens
        for output in outcome.beams:
            self.take(output.key, output.token_ids, output.finish_reason)
        for key in outcome.failed:
            self.note_cancelled(key)
        self.woken.add(group_id)
        if self.scheduler.has_newcomers:
            self.wake_all()

    def take(self, key: RequestKey, token_ids, reason: FinishReason | None) -> None:
        assert key not in self.ended, "a token after the end"
        self.received[key] += token_ids
        if reason:
            self.ended[key] = reason

    def cancel(self, index: int) -> None:
        open_keys = [key for key in self.accepted if key not in self.ended]
        if open_keys:
            key = open_keys[index % len(open_keys)]
            self.scheduler.cancel(key)
            self.note_cancelled(key)
            self.wake_all()

    def note_cancelled(self, key: RequestKey) -> None:
        request = self.accepted[key]
        ended = [request.key.output(i) for i in range(request.num_samples)] if request.beam_search else [key]
        assert not self.ended.keys() & set(ended)
        self.ended |= dict.fromkeys(ended, FinishReason.CANCELLED)

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
            if request.beam_search is None:
                self.check_sampled(key, request)
        for request in self.requests:
            keys = [request.key.output(index) for index in range(request.num_samples)]
            if request.beam_search and self.ended[keys[0]] is not FinishReason.CANCELLED:
                alone = beams_alone(request, self.scheduler.config.max_model_len)
                assert [self.received[key] for key in keys] == alone
        for group in self.scheduler.groups.values():
            assert group.blocks.num_free_blocks == group.blocks.num_blocks

    def check_sampled(self, key: RequestKey, request: Request) -> None:
        num_prompt = len(request.prompt_token_ids)
        tokens = self.received[key]
        assert tokens == [token_at(key, num_prompt + i, self.stop_at[key]) for i in range(len(tokens))]
        if self.ended[key] is FinishReason.STOP:
            assert tokens[-1] == STOP_TOKEN
        elif self.ended[key] is FinishReason.LENGTH:
            limit = self.scheduler.config.max_model_len
            assert len(tokens) == min(request.stop.max_tokens, limit - num_prompt)


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


shapes = st.one_of(
    st.builds(Shape, st.integers(0, 40), st.integers(1, 3)),
    st.integers(2, 4).flatmap(
        lambda num_beams: st.builds(Shape, st.integers(0, 40), st.integers(1, num_beams), st.just(num_beams))
    ),
)
shaped_events = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"), st.integers(1, 40), st.integers(1, 20), st.integers(0, 30), st.integers(-1, 1), shapes
        ),
        st.tuples(st.just("schedule"), st.integers(0, 1)),
        st.tuples(st.just("result"), st.integers(0, 1)),
        st.tuples(st.just("fail"), st.integers(0, 1)),
        st.tuples(st.just("cancel"), st.integers(0, 50)),
    ),
    max_size=60,
)


@settings(max_examples=1500, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    configs,
    st.integers(1, 2),
    st.integers(1, 40),
    st.integers(0, 12),
    st.lists(st.integers(0, 3), min_size=1, max_size=5),
    shaped_events,
)
def test_shared_forked_saved_and_loaded_blocks_hold_the_right_tokens(
    config, num_groups, num_blocks, num_host_blocks, lags, trace_events
):
    trace = Trace(config, num_groups, num_blocks, num_host_blocks)
    trace.lags = cycle(lags)
    trace.replay(trace_events)
    trace.drain()
    trace.scheduler.check_invariants()
    trace.check_outputs()


@pytest.mark.parametrize("seed", range(150))
def test_long_traces_under_pressure(seed):
    """As above, of more requests than hypothesis likes to draw, so many that blocks are short all the time."""
    draw = random.Random(seed)
    config = SchedulerConfig(
        block_size=draw.choice([1, 2, 4]), max_num_seqs=draw.randint(4, 8), max_num_batched_tokens=draw.randint(8, 24),
        max_model_len=48, max_num_waiting=12, num_inflight_steps=draw.randint(1, 4),
    )  # fmt: skip
    num_blocks = draw.randint(60, 130) // config.block_size
    trace = Trace(config, draw.randint(1, 2), num_blocks, num_host_blocks=draw.choice([0, 10, 40]))
    trace.lags = cycle([draw.randint(0, 3) for _ in range(5)])
    for _ in range(250):
        kind = draw.choices(["add", "schedule", "result", "fail", "cancel"], [3, 5, 5, 0.2, 0.3])[0]
        if kind == "add":
            num_beams = draw.choice([0, 0, 2, 3, 4])
            shape = Shape(draw.choice([0, 12, 30]), draw.randint(1, min(3, num_beams or 3)), num_beams)
            event = (kind, draw.randint(1, 40), draw.randint(1, 20), draw.randint(0, 30), draw.randint(-1, 1), shape)
        else:
            event = (kind, draw.randint(0, 50))
        trace.replay([event])
    trace.drain()
    trace.scheduler.check_invariants()
    trace.check_outputs()


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
