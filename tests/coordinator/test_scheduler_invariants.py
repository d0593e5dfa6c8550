"""Random traces: no block lost or owned twice, the budget kept, every request ended, tokens in order and once."""

from array import array
from collections import defaultdict

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from octavo.coordinator.core.scheduler import Scheduler, SchedulerConfig
from octavo.coordinator.core.sequence import FinishReason, Request, RequestKey, StopConditions
from octavo.errors import OctavoError

STOP_TOKEN = 999


def token_at(key: RequestKey, position: int, stop_at: int) -> int:
    """The 'model': the token at a position depends on request and position only, as with greedy decoding."""
    return STOP_TOKEN if position == stop_at else (key.handle * 31 + position * 7) % 900


class Trace:
    """A scheduler under test, workers that compute what plans say, and what each request received."""

    def __init__(self, config: SchedulerConfig, num_groups: int, num_blocks: int) -> None:
        self.scheduler = Scheduler(config)
        for group_id in range(num_groups):
            self.scheduler.add_group(group_id, num_blocks)
        self.stop_at: dict[RequestKey, int] = {}
        self.received: dict[RequestKey, list[int]] = defaultdict(list)
        self.ended: dict[RequestKey, FinishReason] = {}
        self.accepted: dict[RequestKey, Request] = {}

    def add(self, num_prompt: int, max_tokens: int, stop_after: int, priority: int) -> None:
        key = RequestKey(0, len(self.stop_at))
        request = Request(
            key, array("i", [1] * num_prompt), StopConditions(max_tokens, 0, frozenset([STOP_TOKEN])), priority
        )
        self.stop_at[key] = num_prompt + stop_after
        try:
            self.scheduler.add(request)
        except OctavoError:
            return
        self.accepted[key] = request

    def schedule(self, group_id: int) -> None:
        plan = self.scheduler.schedule(group_id)
        if plan is not None:
            assert 0 < plan.num_tokens <= self.scheduler.config.max_num_batched_tokens
            assert len(set(plan.decode_slots) | set(plan.chunk_slots)) == len(plan.decode_slots) + len(plan.chunk_slots)
            assert len(plan.rows) <= self.scheduler.config.max_num_seqs

    def result(self, group_id: int) -> None:
        group = self.scheduler.groups[group_id]
        if not group.inflight:
            return
        tokens = []
        for row in group.inflight[0].rows:
            if row.samples:
                key = row.sequence.request.key
                tokens.append(token_at(key, row.sequence.num_tokens, self.stop_at[key]))
        for token in self.scheduler.update(group_id, tokens).tokens:
            assert token.key not in self.ended, "a token after the end"
            self.received[token.key].append(token.token_id)
            if token.finish_reason:
                self.ended[token.key] = token.finish_reason

    def cancel(self, index: int) -> None:
        open_keys = [key for key in self.accepted if key not in self.ended]
        if open_keys:
            key = open_keys[index % len(open_keys)]
            self.scheduler.cancel(key)
            self.ended[key] = FinishReason.CANCELLED

    def drain(self) -> None:
        """Runs until nothing is left; a fixed bound turns starvation into a failure."""
        for _ in range(4000):
            for group_id in self.scheduler.groups:
                self.schedule(group_id)
                self.result(group_id)
            if not self.scheduler.unfinished_requests() and not any(g.inflight for g in self.scheduler.groups.values()):
                return
        raise AssertionError(f"starved: {self.scheduler.unfinished_requests()}")

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
    for name, *arguments in trace_events:
        if name in ("schedule", "result"):
            getattr(trace, name)(arguments[0] % num_groups)
        else:
            getattr(trace, name)(*arguments)
        trace.scheduler.check_invariants()
    trace.drain()
    trace.scheduler.check_invariants()
    trace.check_outputs()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(configs, events, st.integers(0, 59))
def test_a_lost_group_loses_no_request(config, trace_events, when):
    trace = Trace(config, num_groups=2, num_blocks=20)
    for index, (name, *arguments) in enumerate(trace_events):
        if index == when:
            trace.scheduler.remove_group(1)
        if name in ("schedule", "result"):
            getattr(trace, name)(arguments[0] % len(trace.scheduler.groups))
        else:
            getattr(trace, name)(*arguments)
        trace.scheduler.check_invariants()
    trace.drain()
    trace.check_outputs()
