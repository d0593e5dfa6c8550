"""A coordinator that follows another: it is told what readers have of their outputs, and goes on behind that."""

import itertools
import random
from array import array

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from octavo.coordinator.core.scheduler import Scheduler
from octavo.coordinator.core.scheduler_config import SchedulerConfig
from octavo.coordinator.core.sequence import FinishReason, Request, RequestKey, ResumedOutput, StopConditions
from octavo.coordinator.core.step_outcome import PromptScores, StepReport
from octavo.coordinator.core.worker_group import GroupMemory
from octavo.errors import InvalidArgumentError, ResourceExhaustedError
from octavo.proto import engine_pb2

from .test_scheduler_invariants import Shape, Trace, configs, shaped_events

CONFIG = SchedulerConfig(
    block_size=4, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=40, max_num_waiting=2, num_inflight_steps=2
)


class InterruptedTrace(Trace):
    """At any point the scheduler and its block tables are gone, and the next one is told what was received."""

    def interrupt(self, num_groups: int, num_blocks: int, num_lost: int) -> None:
        """The last `num_lost` tokens of some outputs had not reached their readers."""
        after = Trace(self.scheduler.config, num_groups, num_blocks)
        self.scheduler, self.workers, self.results = after.scheduler, after.workers, after.results
        for worker in self.workers:
            worker._sample = self.sample
        for number, request in enumerate(self.requests):
            self.resume(number, request, num_lost if number % 2 else 0)
        self.scheduler.check_invariants()
        self.wake_all()

    def resume(self, number: int, request: Request, num_lost: int) -> None:
        keys = [request.key.output(index) for index in range(request.num_samples)]
        resumed = []
        for index, key in enumerate(keys):
            if key in self.ended:
                continue
            del self.received[key][len(self.received[key]) - min(num_lost, len(self.received[key])) :]
            resumed.append(ResumedOutput(index, array("i", self.received[key])))
        if resumed:
            again = {name: getattr(request, name) for name in Request.__slots__} | {"resumed": tuple(resumed)}
            self.requests[number] = Request(**again)
            self.accepted |= dict.fromkeys(keys, self.requests[number])
            self.scheduler.add(self.requests[number])


@settings(max_examples=600, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(configs, st.integers(1, 2), shaped_events, st.lists(st.integers(0, 59), max_size=3), st.integers(0, 3))
def test_interrupted_anywhere_requests_get_what_they_would_have(config, num_groups, trace_events, stops, num_lost):
    """Outputs are checked against those of an undisturbed run, and workers check each read."""
    num_blocks = 4 * 48 // config.block_size + 4  # of the most beams, so that none is refused
    trace = InterruptedTrace(config, num_groups, num_blocks)
    for index, event in enumerate(trace_events):
        if index in stops:
            trace.interrupt(num_groups, num_blocks, num_lost)
        trace.replay([event])
    trace.interrupt(num_groups, num_blocks, num_lost)
    trace.drain()
    trace.scheduler.check_invariants()
    trace.check_outputs()


@pytest.mark.parametrize("seed", range(60))
def test_interrupted_again_and_again_under_pressure(seed):
    draw = random.Random(seed)
    config = SchedulerConfig(
        block_size=draw.choice([1, 2, 4]), max_num_seqs=draw.randint(4, 8), max_num_batched_tokens=draw.randint(8, 24),
        max_model_len=48, max_num_waiting=12, num_inflight_steps=draw.randint(1, 4),
    )  # fmt: skip
    num_blocks = 4 * 48 // config.block_size + 4
    trace = InterruptedTrace(config, 1, num_blocks)
    for _ in range(250):
        kind = draw.choices(["add", "schedule", "result", "cancel", "interrupt"], [3, 6, 6, 0.3, 0.3])[0]
        if kind == "interrupt":
            trace.interrupt(1, num_blocks, draw.randint(0, 3))
            continue
        arguments = [draw.randint(0, 50)]
        if kind == "add":
            num_beams = draw.choice([0, 0, 2, 3, 4])
            shape = Shape(draw.choice([0, 12, 30]), draw.randint(1, min(3, num_beams or 3)), num_beams)
            arguments = [draw.randint(1, 40), draw.randint(1, 20), draw.randint(0, 30), draw.randint(-1, 1), shape]
        trace.replay([(kind, *arguments)])
    trace.drain()
    trace.check_outputs()


def new_request(resumed=(), num_prompt=8, max_tokens=10, handle=0, **fields) -> Request:
    stop = StopConditions(max_tokens, fields.pop("min_tokens", 0), frozenset([9]))
    outputs = tuple(ResumedOutput(index, array("i", tokens), *rest) for index, tokens, *rest in resumed)
    return Request(RequestKey(0, handle), array("i", range(num_prompt)), stop, resumed=outputs, **fields)


def scheduler_of(num_blocks=64) -> Scheduler:
    scheduler = Scheduler(CONFIG)
    scheduler.add_group(0, GroupMemory(num_blocks))
    return scheduler


def test_samples_wait_as_after_a_preemption_and_the_plan_has_their_tokens():
    scheduler = scheduler_of()
    scheduler.add(new_request([(0, [4, 5]), (2, [6])], num_samples=3))
    assert [(each.index, list(each.token_ids[8:])) for each in scheduler.waiting] == [(0, [4, 5]), (2, [6])]
    plan = scheduler.schedule(0)
    joins = {join.index: np.frombuffer(join.token_ids, "=i4").tolist() for join in plan.joins}
    assert joins == {0: [*range(8), 4, 5], 2: [*range(8), 6]}
    assert {join.num_prompt_tokens for join in plan.joins} == {8}
    scheduler.check_invariants()


def test_samples_without_tokens_begin_as_new_ones_do():
    scheduler = scheduler_of()
    scheduler.add(new_request([(0, []), (1, []), (2, [])], num_samples=3))
    assert [each.index for each in scheduler.waiting] == [0]  # the others follow
    scheduler.check_invariants()


def test_the_bound_of_the_queue_is_not_for_what_was_accepted():
    scheduler = scheduler_of()
    for handle in range(4):
        scheduler.add(new_request([(0, [4])], handle=handle))
    with pytest.raises(ResourceExhaustedError):
        scheduler.add(new_request(handle=9))


def test_cached_tokens_are_told_with_the_first_token_only():
    scheduler = scheduler_of()
    scheduler.add(new_request())
    scheduler.add(new_request([(0, [4])], handle=5))
    counts = []
    for _ in range(3):
        plan = scheduler.schedule(0)
        outcome = scheduler.update(0, StepReport([1] * sum(row.samples for row in plan.rows)))
        counts += [token.num_cached_tokens for token in outcome.tokens if token.key.handle == 5]
    assert counts
    assert not any(counts)


def test_prompt_logprobs_go_on_behind_those_that_were_received():
    scheduler = scheduler_of()
    scheduler.add(new_request([(0, [], 3)], reads_cache=False))
    scheduler.schedule(0)
    outcome = scheduler.update(0, StepReport([1], [PromptScores(0, 1, 7)]))
    assert [scores.num_skipped for scores in outcome.scores] == [3]


@pytest.mark.parametrize(
    "fields",
    [
        {"resumed": [(0, [1]), (0, [1])]},
        {"resumed": [(1, [1])]},
        {"resumed": [(0, [1] * 10)]},
        {"resumed": [(0, [1] * 30)], "max_tokens": 100, "num_prompt": 10},
        {"resumed": [(0, [1, 9])]},
        {"resumed": [(0, [], 8)]},
        {"resumed": [(1, [], 1)], "num_samples": 2},
    ],
    ids=["twice", "no such output", "all tokens", "the context", "a stop token", "prompt logprobs", "of another"],
)
def test_what_no_reader_can_have_is_refused(fields):
    scheduler = scheduler_of()
    with pytest.raises(InvalidArgumentError, match="the request cannot go on from") as caught:
        scheduler.add(new_request(**fields))
    assert caught.value.field == "resumed"
    assert not scheduler.unfinished_requests()
    scheduler.check_invariants()


def test_a_stop_token_before_min_tokens_ends_nothing():
    scheduler_of().add(new_request([(0, [1, 9])], min_tokens=3))


def test_what_fits_no_group_so_far_waits_and_is_named_when_no_other_comes():
    scheduler = scheduler_of(num_blocks=3)
    scheduler.add(new_request([(1, [4])], num_samples=2))
    [(key, error)] = scheduler.misfits().items()
    assert (key.handle, error.field) == (1, "max_tokens")  # the first has ended
    scheduler.drop(key)
    assert not scheduler.unfinished_requests()


# Over real gRPC


def resumed(*outputs):
    return [engine_pb2.ResumedOutput(index=index, token_ids=np.array(t, "<i4").tobytes()) for index, t in outputs]


def test_another_coordinator_goes_on_beside_the_same_ranks(cluster, submit, run):
    async def scenario():
        async with cluster(rebuilds_groups=True, incarnation=2) as it:
            await it.add_group(has_served=True)
            session = await it.session()
            request = submit(0, max_tokens=20, resumed=resumed((0, range(4, 10)), (2, range(4, 7))))
            request.num_samples = 3
            await session.submit(request, submit(5, max_tokens=3))
            await session.read_until_done(3)
            assert session.tokens == {0: list(range(10, 24)), 2: list(range(7, 24)), 5: [4, 5, 6]}
            status = await it.status()
            assert status.groups[0].epoch == 2_000_001
            assert status.groups[0].num_free_blocks == it.num_blocks

    run(scenario())


def test_sessions_stand_while_groups_that_served_are_rebuilt(cluster, submit, run):
    async def scenario():
        async with cluster(rebuilds_groups=True, incarnation=1) as it:
            with pytest.raises(grpc.aio.AioRpcError, match="tensor w is missing"):
                await it.add_group("broken", has_served=True)
            session = await it.session()
            await session.submit(submit(0, max_tokens=20, resumed=resumed((0, [4, 5]))))
            [failure] = await it.await_failures()
            assert failure.epoch == 1_000_001
            assert failure.reason.endswith("tensor w is missing")
            await it.add_group(has_served=True)
            await session.read_until_done(1)
            assert session.tokens[0] == list(range(6, 24))

    run(scenario())


def test_a_bad_resumption_fails_alone(cluster, submit, run):
    async def scenario():
        async with cluster(rebuilds_groups=True, incarnation=1) as it:
            await it.add_group(has_served=True)
            session = await it.session()
            bad = itertools.count(1)
            await session.submit(
                submit(next(bad), resumed=resumed((0, [1000]))),
                submit(next(bad), resumed=resumed((0, [-1]))),
                submit(next(bad), resumed=[engine_pb2.ResumedOutput(token_ids=b"123")]),
                submit(next(bad), resumed=resumed((1, [4]))),
                submit(0, resumed=resumed((0, [4, 5]))),
            )
            await session.read_until_done(5)
            assert session.tokens[0] == list(range(6, 12))
            assert {f.code for f in session.failures.values()} == {grpc.StatusCode.INVALID_ARGUMENT.value[0]}
            assert sorted(session.failures) == [1, 2, 3, 4]

    run(scenario())


def test_what_fits_no_group_any_more_is_refused_also_where_its_first_output_has_ended(cluster, submit, run):
    async def scenario():
        async with cluster(rebuilds_groups=True, incarnation=1) as it:
            for worker in it.workers:
                worker.num_blocks = 16
            await it.add_group(has_served=True)
            session = await it.session()
            await session.submit(beams(submit), submit(1, max_tokens=20, resumed=resumed((0, [4]))))
            await session.read_until_done(2)
            assert session.failures[20].field == "num_beams"
            assert session.tokens[1] == list(range(5, 24))

    run(scenario())


def beams(submit):
    request = submit(20, max_tokens=60, resumed=resumed((0, [])))
    request.beam_search.num_beams, request.num_samples = 3, 1
    request.beam_search.early_stopping = engine_pb2.EARLY_STOPPING_FIRST
    return request


def test_a_coordinator_that_is_asked_to_end_leaves_requests_to_the_next(cluster, submit, run):
    async def scenario():
        async with cluster(rebuilds_groups=True) as it:
            await it.add_group()
            session = await it.session()
            it.workers[0].hold.clear()
            await session.submit(submit(0))
            while not (await it.status()).groups[0].num_running:
                pass
        with pytest.raises(grpc.aio.AioRpcError):
            await session.read_until_done(1)
        assert not session.failures

    run(scenario())


def test_finish_reasons_of_outputs_that_go_on():
    scheduler = scheduler_of()
    scheduler.add(new_request([(0, [4] * 9)], num_prompt=4))
    scheduler.schedule(0)
    [token] = scheduler.update(0, StepReport([5])).tokens
    assert token.finish_reason is FinishReason.LENGTH
