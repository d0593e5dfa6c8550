"""Requests that fail their group each time end alone, with three failures each; chance ends nobody."""

from array import array
from itertools import count

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from octavo.coordinator.core.beam_search import BeamSearchParams, Candidates
from octavo.coordinator.core.scheduler import Scheduler
from octavo.coordinator.core.scheduler_config import SchedulerConfig
from octavo.coordinator.core.sequence import Request, RequestKey, StopConditions
from octavo.coordinator.core.step_outcome import StepReport
from octavo.coordinator.core.worker_group import GroupMemory

MEMORY = GroupMemory(64)
MAX_TOKENS = 5


class Groups:
    """Groups that are rebuilt at once when they fail. Of each request is said where its steps fail, if they do."""

    def __init__(self, num_groups: int, num_inflight_steps: int = 2) -> None:
        config = SchedulerConfig(4, 6, 24, 64, 1000, num_inflight_steps=num_inflight_steps)
        self.scheduler = Scheduler(config)
        for group_id in range(num_groups):
            self.scheduler.add_group(group_id, MEMORY)
        self.fails_at: dict[RequestKey, int] = {}
        self.tokens: dict[RequestKey, int] = {}
        self.ended: set[RequestKey] = set()
        self.num_failures = 0
        self._handles = count(0, 10)

    def add(self, num_prompt: int, fails_at: int | None = None, num_samples: int = 1, num_beams: int = 0) -> Request:
        """`fails_at`: the number of its tokens from which on its steps fail."""
        key = RequestKey(0, next(self._handles))
        request = Request(
            key,
            array("i", range(num_prompt)),
            StopConditions(MAX_TOKENS),
            num_samples=num_samples,
            beam_search=BeamSearchParams(num_beams) if num_beams else None,
            salt=str(key).encode(),
        )
        self.scheduler.add(request)
        if fails_at is not None:
            self.fails_at[key] = num_prompt + fails_at
        return request

    def step(self, group_id: int, fails: bool = False) -> bool:
        """Sends what may be sent, and answers the oldest step, or fails; returns whether there was one."""
        while self.scheduler.schedule(group_id) is not None:
            self.scheduler.check_invariants()
        inflight = self.scheduler.groups[group_id].inflight
        if not inflight:
            return False
        if fails or any(map(self._fails, inflight[0].rows)):
            self.fail(group_id)
        else:
            self.answer(group_id)
        self.scheduler.check_invariants()
        return True

    def _fails(self, row) -> bool:
        fails_at = self.fails_at.get(row.sequence.request.key)
        return not row.is_stale and fails_at is not None and row.sequence.num_tokens >= fails_at

    def fail(self, group_id: int) -> None:
        self.num_failures += 1
        self.ended |= set(self.scheduler.remove_group(group_id))
        self.scheduler.check_invariants()
        self.scheduler.add_group(group_id, MEMORY)

    def answer(self, group_id: int) -> None:
        plan = self.scheduler.groups[group_id].inflight[0]
        likeliest = Candidates(range(7, 27), [-1.0 - index for index in range(20)])
        report = StepReport([7] * plan.num_samples, (), lambda row: likeliest, 0, plan.step_id)
        for token in self.scheduler.update(group_id, report).tokens:
            self.tokens[token.key] = self.tokens.get(token.key, 0) + 1

    def run(self) -> None:
        for _ in range(3000):
            were_busy = [self.step(group_id) for group_id in list(self.scheduler.groups)]
            if not any(were_busy):
                break
        assert not self.scheduler.unfinished_requests(), "starved"


@st.composite
def shapes(draw):
    """Arguments of `add`."""
    num_beams = draw(st.sampled_from([0, 0, 3]))
    fails_at = draw(st.one_of(st.none(), st.none(), st.integers(0, MAX_TOKENS - 1)))
    return draw(st.integers(1, 30)), fails_at, draw(st.integers(1, 3)), num_beams


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(shapes(), min_size=1, max_size=10),
    st.integers(1, 2),
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 1), st.booleans()), max_size=30),
)
def test_who_fails_each_time_ends_and_nobody_else(asked, num_groups, num_inflight_steps, steps):
    groups = Groups(num_groups, num_inflight_steps)
    requests = [groups.add(*shape) for shape in asked]
    num_by_chance = 0
    for group_id, fails in steps:
        before = groups.num_failures
        if group_id < num_groups:
            # Not as a third: one that hits a trial looks as if the request were at fault.
            groups.step(group_id, fails and before < 2)
            num_by_chance += fails and before < groups.num_failures < 3
    groups.run()
    poisons = [request for request in requests if request.key in groups.fails_at]
    assert {key.handle // 10 for key in groups.ended} == {request.key.handle // 10 for request in poisons}
    for request in requests:
        if request not in poisons and request.beam_search is None:
            outputs = [request.key.output(index) for index in range(request.num_samples)]
            assert [groups.tokens[key] for key in outputs] == [MAX_TOKENS] * len(outputs)
    counters = groups.scheduler.counters
    assert (counters.num_failed, counters.num_finished) == (len(poisons), len(requests) - len(poisons))
    assert groups.num_failures <= num_by_chance + sum(
        most_failures_of(request, groups.fails_at[request.key]) for request in poisons
    )


def most_failures_of(request: Request, fails_at: int) -> int:
    """Three for each output that has to be found by itself."""
    has_own_tokens = fails_at > len(request.prompt_token_ids) and not request.beam_search
    return 3 * (request.num_samples if has_own_tokens else 1)


def test_a_busy_group_holds_a_trial_if_no_other_comes():
    groups = Groups(2)
    bad = groups.add(3, fails_at=0)
    groups.step(0)
    long_ones = [groups.add(3) for _ in range(3)]
    groups.step(1)  # group 1 has them, and the request that failed group 0
    assert groups.num_failures == 2
    groups.scheduler.remove_group(0)  # and it stays away
    groups.run()
    assert groups.ended == {bad.key}
    assert [groups.tokens[request.key] for request in long_ones] == [MAX_TOKENS] * 3


def test_one_that_is_accused_may_be_cancelled():
    groups = Groups(1)
    bad, well = groups.add(3, fails_at=0), groups.add(3)
    groups.step(0)
    groups.step(0)
    assert len(groups.scheduler.suspects.queued) == 2
    groups.scheduler.cancel(bad.key)
    groups.scheduler.check_invariants()
    groups.run()
    assert groups.num_failures == 2
    assert groups.tokens == {well.key: MAX_TOKENS}


def test_one_on_trial_may_be_cancelled():
    groups = Groups(1)
    bad, well = groups.add(3, fails_at=0), groups.add(3)
    groups.step(0)
    groups.step(0)
    assert [row.sequence.key for row in groups.scheduler.schedule(0).rows] == [bad.key]
    groups.scheduler.cancel(bad.key)
    groups.run()
    assert groups.tokens == {well.key: MAX_TOKENS}
