"""Sequences of a group that is to leave move with their blocks, over real gRPC: when, and what if they cannot."""

import asyncio
from contextlib import asynccontextmanager

import grpc
import pytest

from .test_removal import remove, two_groups, until

NUM_PROMPT = 12  # three blocks
TOKENS = list(range(NUM_PROMPT, NUM_PROMPT + 40))


def go_on(worker, until_step=0) -> None:
    worker.hold_at_step = until_step
    worker.hold.set()


async def reached(condition) -> None:
    while not condition():
        await asyncio.sleep(0.005)


@asynccontextmanager
async def leaving(cluster, submit, num_requests=2, **config):
    """One request runs in each group, and group 1 is to leave; its copies wait, and its workers before step 20."""
    async with cluster(**config) as it:
        await two_groups(it)
        it.workers[1].hold_at_step = 10
        it.workers[0].copies.clear()
        session = await it.session()
        await session.submit(*(submit(handle, num_prompt=NUM_PROMPT, max_tokens=40) for handle in range(num_requests)))
        await until(it, lambda status: all(group.num_running for group in status.groups))
        await reached(lambda: not it.workers[1].hold.is_set())
        removing = asyncio.create_task(remove(it, 1))
        await reached(lambda: it.engine.scheduler.moves._copying)
        go_on(it.workers[1], until_step=20)
        await reached(lambda: it.workers[0].received)
        yield it, session, removing


async def check_tokens(it, session, num_requests=2) -> None:
    await session.read_until_done(num_requests)
    assert not session.failures
    assert all(session.tokens[handle] == TOKENS for handle in range(num_requests))
    await reached(lambda: not it.engine.scheduler.moves._copying)
    it.engine.scheduler.check_invariants()
    group = (await it.status()).groups[0]
    assert group.num_free_blocks == group.num_blocks


def test_it_runs_on_until_its_blocks_are_there_and_finds_them(cluster, submit, run):
    async def scenario():
        async with leaving(cluster, submit) as (it, session, removing):
            await reached(lambda: not it.workers[1].hold.is_set())  # by step 20
            assert (await it.status()).groups[1].num_running == 1
            num_joins = sum(len(plan.joins) for plan in it.workers[0].plans)
            it.workers[0].copies.set()
            await reached(lambda: sum(len(plan.joins) for plan in it.workers[0].plans) > num_joins)
            status = await it.status()
            num_received = status.groups[0].block_counters.num_received_blocks
            assert num_received >= 3
            go_on(it.workers[1])
            assert (await removing)[-1] == 0
            join = [join for plan in it.workers[0].plans for join in plan.joins][-1]
            assert join.num_computed_tokens == 4 * num_received
            await check_tokens(it, session)

    run(scenario())


def test_a_copy_that_fails_holds_up_nothing(cluster, submit, run):
    async def scenario():
        async with leaving(cluster, submit) as (it, session, removing):
            it.workers[0].copy_failure = "the source does not answer"
            it.workers[0].copies.set()
            go_on(it.workers[1])
            await removing
            assert (await it.status()).groups[0].block_counters.num_received_blocks == 0
            await check_tokens(it, session)

    run(scenario())


def test_a_group_that_fails_while_its_blocks_are_read(cluster, submit, run):
    async def scenario():
        async with leaving(cluster, submit) as (it, session, removing):
            it.workers[1].fail_at_step = 20
            go_on(it.workers[1])
            await removing
            it.workers[0].copies.set()
            await check_tokens(it, session)

    run(scenario())


def test_a_group_that_fails_while_it_receives_and_leaves_the_other_alone(cluster, submit, run):
    async def scenario():
        async with leaving(cluster, submit) as (it, session, removing):
            await session.submit(submit(7, max_tokens=1))  # so that there is a next step
            it.workers[0].fail_at_step = len(it.workers[0].plans) + 1
            await session.submit(submit(8))
            with pytest.raises(grpc.aio.AioRpcError, match="group 1 serves on: it is the last one"):
                await removing
            it.workers[0].copies.set()
            go_on(it.workers[1])
            await session.read_until_done(4)
            assert [session.tokens[handle] for handle in range(2)] == [TOKENS] * 2
            await reached(lambda: not it.engine.scheduler.moves._copying)
            it.engine.scheduler.check_invariants()

    run(scenario())


def test_an_output_that_ends_while_it_is_copied_and_the_group_waits_for_the_copy(cluster, submit, run):
    async def scenario():
        async with leaving(cluster, submit) as (it, session, removing):
            go_on(it.workers[1])
            await session.read_until_done(2)
            await asyncio.sleep(0.05)
            assert not removing.done()
            it.workers[0].copies.set()
            await removing
            await check_tokens(it, session)

    run(scenario())


def test_an_engine_that_ends_meanwhile_waits_for_nothing(cluster, submit, run):
    async def scenario():
        async with leaving(cluster, submit) as (it, _, removing):
            go_on(it.workers[1])
        removing.cancel()
        await asyncio.gather(removing, return_exceptions=True)
        assert not it.engine.scheduler.moves._copying

    run(scenario())
