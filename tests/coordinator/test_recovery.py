"""A group that fails and may be rebuilt: its epoch is over, and its requests wait for it or for another group."""

import asyncio

import grpc
import numpy as np
import pytest
from octavo.coordinator.core.step_deadlines import StepDeadlines
from octavo.proto import admin_pb2, engine_pb2

READY, FAILED = admin_pb2.GROUP_STATE_READY, admin_pb2.GROUP_STATE_FAILED


def rows_of(status):
    return [(group.state, group.epoch, group.num_restarts) for group in status.groups]


def test_requests_wait_for_the_only_group_and_go_on_where_they_were(cluster, submit, run):
    async def scenario():
        async with cluster(rebuilds_groups=True) as it:
            await it.add_group()
            it.workers[1].fail_at_step = 5
            session = await it.session()
            await session.submit(*(submit(handle, max_tokens=20) for handle in range(12)))  # more than there are slots
            [failure] = await it.await_failures()
            assert (failure.group_id, failure.epoch, failure.reason) == (0, 1, "rank 1: the forward pass failed")
            await session.submit(submit(12, max_tokens=20))
            status = await it.status()
            assert (rows_of(status), status.num_waiting) == ([(FAILED, 1, 0)], 13)
            assert status.groups[0].failure == "rank 1: the forward pass failed"
            it.workers[1].fail_at_step = 0
            await it.add_group()
            await session.read_until_done(13)
            assert all(session.tokens[handle] == list(range(4, 24)) for handle in range(13))
            assert not session.failures
            status = await it.status()
            assert rows_of(status) == [(READY, 2, 1)]
            assert status.groups[0].failure == ""
            assert status.groups[0].num_free_blocks == it.num_blocks
            assert [worker.epochs for worker in it.workers] == [[1, 2], [1, 2]]

    run(scenario())


def test_the_samples_of_a_request_wait_and_end(cluster, submit, run):
    async def scenario():
        async with cluster(rebuilds_groups=True) as it:
            await it.add_group()
            it.workers[0].fail_at_step = 4
            session = await it.session()
            request = submit(0, max_tokens=20)
            request.num_samples = 3
            await session.submit(request)
            await it.await_failures()
            it.workers[0].fail_at_step = 0
            await it.add_group()
            await session.read_until_done(3)
            assert [session.tokens[handle] for handle in range(3)] == [list(range(4, 24))] * 3

    run(scenario())


def test_what_an_epoch_that_is_over_still_computes_counts_for_nothing(cluster, submit, run):
    async def scenario():
        async with cluster(num_ranks=4, rebuilds_groups=True) as it:
            for rank, worker in enumerate(it.workers):
                worker.rank = rank % 2
            await it.add_group(ranks=slice(0, 2))
            session = await it.session()
            it.workers[0].hold.clear()  # stands still with plans in flight
            it.workers[1].fail_at_step = 1
            await session.submit(submit(1, max_tokens=30))
            await it.await_failures()
            await it.add_group(ranks=slice(2, 4))
            it.workers[0].hold.set()  # and wakes beside its successor
            await session.read_until_done(1)
            assert session.tokens[1] == list(range(4, 34))
            await it.workers[0].gone.wait()
            assert rows_of(await it.status()) == [(READY, 2, 1)]

    run(scenario())


def test_the_queue_is_bounded_without_a_group_too(cluster, submit, run):
    async def scenario():
        async with cluster(rebuilds_groups=True, max_num_waiting=1) as it:
            await it.add_group()
            it.workers[0].fail_at_step = 1
            session = await it.session()
            await session.submit(submit(1))
            await it.await_failures()
            await session.submit(submit(2))
            await session.read_until_done(1)
            assert session.failures[2].code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
            it.workers[0].fail_at_step = 0
            await it.add_group()
            await session.read_until_done(2)
            assert session.tokens[1] == list(range(4, 12))

    run(scenario())


def test_a_group_that_is_given_up_ends_its_requests_unless_another_serves(cluster, submit, run):
    async def scenario():
        async with cluster(rebuilds_groups=True) as it:
            for group_id, worker in enumerate(it.workers):
                worker.rank = 0
                await it.add_group(group_id=group_id, ranks=slice(group_id, group_id + 1))
                worker.fail_at_step = 3
            session = await it.session()
            await session.submit(*(submit(handle, max_tokens=20) for handle in range(4)))
            for known in (1, 2):  # until both have failed
                await it.await_failures(known)
            await it.stub.AbandonGroup(engine_pb2.AbandonGroupRequest(group_id=0))
            assert not session.failures
            await it.stub.AbandonGroup(engine_pb2.AbandonGroupRequest(group_id=1))
            await session.submit(submit(4))
            await session.read_until_done(5)
            assert {failure.code for failure in session.failures.values()} == {grpc.StatusCode.UNAVAILABLE.value[0]}
            with pytest.raises(grpc.aio.AioRpcError, match="group 0 exists already, and is abandoned"):
                await it.add_group(ranks=slice(0, 1))
            with pytest.raises(grpc.aio.AioRpcError, match="group 7 has not failed"):
                await it.stub.AbandonGroup(engine_pb2.AbandonGroupRequest(group_id=7))

    run(scenario())


def test_beams_that_came_while_there_was_no_group_and_that_fit_none_then_are_refused(cluster, submit, run):
    async def scenario():
        async with cluster(rebuilds_groups=True) as it:
            await it.add_group()
            it.workers[0].fail_at_step = 1
            session = await it.session()
            await session.submit(submit(1, max_tokens=20))
            await it.await_failures()
            beams = submit(0, max_tokens=60)
            beams.beam_search.num_beams, beams.num_samples = 3, 1
            beams.beam_search.early_stopping = engine_pb2.EARLY_STOPPING_FIRST
            await session.submit(beams, submit(2, max_tokens=20))  # one before it in the queue, one behind
            it.workers[0].fail_at_step = 0
            for worker in it.workers:
                worker.num_blocks = 16
            await it.add_group()
            await session.read_until_done(3)
            assert session.failures[0].code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
            assert session.failures[0].field == "num_beams"
            assert session.tokens[1] == session.tokens[2] == list(range(4, 24))

    run(scenario())


def test_a_rebuild_that_fails_is_a_failure_of_its_own_and_may_be_tried_again(cluster, submit, run):
    async def scenario():
        async with cluster(rebuilds_groups=True) as it:
            await it.add_group()
            it.workers[0].fail_at_step = 2
            session = await it.session()
            await session.submit(submit(1, max_tokens=20))
            await it.await_failures()
            with pytest.raises(grpc.aio.AioRpcError, match="tensor w is missing"):
                await it.add_group("broken")
            [failure] = await it.await_failures(1)  # the first is known
            assert failure.epoch == 2
            assert failure.reason.endswith("tensor w is missing")
            it.workers[0].fail_at_step = 0
            await it.add_group()
            await session.read_until_done(1)
            assert session.tokens[1] == list(range(4, 24))
            assert rows_of(await it.status()) == [(READY, 3, 1)]

    run(scenario())


def test_a_group_that_serves_is_not_built_again(cluster, run):
    async def scenario():
        async with cluster(rebuilds_groups=True) as it:
            await it.add_group()
            with pytest.raises(grpc.aio.AioRpcError, match="group 0 exists already, and is ready"):
                await it.add_group()
            assert rows_of(await it.status()) == [(READY, 1, 0)]

    run(scenario())


def test_a_step_that_never_ends_fails_its_group(cluster, submit, run):
    async def scenario():
        async with cluster(rebuilds_groups=True, step_timeout_s=0.5) as it:
            await it.add_group()
            session = await it.session()
            await session.submit(submit(1, max_tokens=50))
            while len(session.tokens[1]) < 5:
                await session.read()
            it.workers[0].hold.clear()
            started = asyncio.get_running_loop().time()
            [failure] = await it.await_failures()
            assert asyncio.get_running_loop().time() - started < 1.5
            assert failure.reason.startswith("a step has not ended after")
            assert 0.2 < failure.silent_s < 1.5  # the clock ticks four times a second
            it.workers[0].hold.set()
            await it.add_group()
            await session.read_until_done(1)
            assert session.tokens[1] == list(range(4, 54))

    run(scenario())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_answers_no_ping_fails_its_group_also_when_it_is_idle(cluster, run, rank):
    async def scenario():
        async with cluster(rebuilds_groups=True, step_timeout_s=0.5) as it:
            await it.add_group()
            it.workers[rank].answers_pings.clear()
            [failure] = await it.await_failures()
            assert failure.reason.startswith(f"rank {rank}: it has not answered for")
            assert failure.silent_s > 0.5

    run(scenario())


def test_a_rank_that_hangs_while_it_loads_fails_the_start(cluster, run):
    async def scenario():
        async with cluster(step_timeout_s=0.05) as it:
            it.workers[1].answers_pings.clear()
            it.workers[1].loaded.clear()
            with pytest.raises(grpc.aio.AioRpcError, match="rank 1: it has not answered for"):
                await it.add_group()
            assert not (await it.status()).groups

    run(scenario())


def test_a_request_that_fails_each_step_ends_alone(cluster, submit, run):
    """Though rank 1 may say so before rank 0 has answered the step in front."""

    async def scenario():
        async with cluster(rebuilds_groups=True) as it:
            await it.add_group()
            session = await it.session()
            for worker in it.workers:
                worker.poison = np.asarray([9, 9], "<i4").tobytes()
            failures = []

            async def rebuild() -> None:
                while True:
                    failures.extend(await it.await_failures(*(failure.epoch for failure in failures)))
                    await it.add_group()

            rebuilding = asyncio.create_task(rebuild())
            await session.submit(*(submit(handle, max_tokens=20) for handle in range(6)))
            while len(session.tokens[0]) < 3:
                await session.read()
            bad = submit(6, prompt_token_ids=it.workers[1].poison, max_tokens=20)
            bad.num_samples = 3
            await session.submit(bad, *(submit(handle, max_tokens=20) for handle in range(9, 12)))
            await session.read_until_done(12)
            assert sorted(session.failures) == [6, 7, 8]
            assert {failure.code for failure in session.failures.values()} == {grpc.StatusCode.INTERNAL.value[0]}
            assert "came to this request" in session.failures[6].message
            for handle in (*range(6), *range(9, 12)):
                assert session.tokens[handle] == list(range(4, 24))
            while (await it.status()).groups[0].state != READY:
                await asyncio.sleep(0.01)
            rebuilding.cancel()
            assert [failure.is_explained for failure in failures] == [False, False, True]
            status = await it.status()
            assert (status.counters.num_failed, status.counters.num_finished) == (1, 9)
            assert status.groups[0].num_free_blocks == it.num_blocks

    run(scenario())


def test_a_rebuilt_group_knows_what_its_steps_take(cluster, submit, run):
    """A hang in its first step is found in the least time, not in that of a size that nobody has seen."""

    async def scenario():
        async with cluster(rebuilds_groups=True, step_timeout_s=0.5) as it:
            await it.add_group()
            session = await it.session()
            await session.submit(submit(1, max_tokens=3))  # its steps are of 4 tokens, and of one
            await session.read_until_done(1)
            it.workers[0].abort_at_step = 4
            await session.submit(submit(2, max_tokens=3))
            await it.await_failures()
            it.workers[0].abort_at_step = 0
            it.workers[0].hold.clear()
            await it.add_group()
            [failure] = await asyncio.wait_for(it.await_failures(1), 15)  # 30 s for an unseen size
            assert failure.reason.startswith("a step has not ended after")
            it.workers[0].hold.set()
            await it.add_group()
            await session.read_until_done(2)
            assert session.tokens[2] == [4, 5, 6]

    run(scenario())


def test_deadlines_follow_what_steps_of_a_size_took_and_leave_new_sizes_time():
    deadlines = StepDeadlines(least_s=5.0)
    assert deadlines.allowed_s(1) == 300.0  # the first of all
    deadlines.observe(1, 0.01)
    assert deadlines.allowed_s(1) == 5.0
    assert deadlines.allowed_s(2048) == 300.0  # a size that has not been seen
    deadlines.observe(2048, 3.0)
    assert deadlines.allowed_s(2048) == deadlines.allowed_s(3000) == 60.0
    assert deadlines.allowed_s(1) == 5.0
    for _ in range(32):
        deadlines.observe(2048, 0.1)  # the slow one is forgotten
    assert deadlines.allowed_s(2048) == 5.0
    deadlines.observe(64, 40.0)
    assert deadlines.allowed_s(16) == 800.0
    assert StepDeadlines(least_s=0.0).allowed_s(1) == 0.0  # 0: for ever
