"""A group that is to leave a running engine: its requests go on elsewhere, and then nothing of it is left."""

import asyncio

import grpc
import pytest
from octavo.internal_channel import ANSWERED
from octavo.proto import admin_pb2, engine_pb2

READY, DRAINING = admin_pb2.GROUP_STATE_READY, admin_pb2.GROUP_STATE_DRAINING


async def two_groups(it):
    for group_id, worker in enumerate(it.workers):
        worker.rank = 0
        await it.add_group(group_id=group_id, ranks=slice(group_id, group_id + 1))


async def remove(it, group_id):
    call = it.stub.RemoveGroup(engine_pb2.RemoveGroupRequest(group_id=group_id))
    return [progress.num_running async for progress in call]


def states(status):
    return {group.group_id: group.state for group in status.groups}


async def until(it, condition):
    while not condition(await it.status()):
        await asyncio.sleep(0.005)


def test_what_runs_goes_on_elsewhere_with_the_same_tokens(cluster, submit, run):
    async def scenario():
        async with cluster() as it:
            await two_groups(it)
            session = await it.session()
            await session.submit(*(submit(handle, max_tokens=40) for handle in range(30)))  # more than there are slots
            await until(it, lambda status: all(group.num_running for group in status.groups))
            counts = await remove(it, 1)
            assert counts[0] > 0 == counts[-1]
            assert states(await it.status()) == {0: READY}
            await asyncio.wait_for(it.workers[1].gone.wait(), 5)  # its ranks are let go
            await session.submit(*(submit(handle, max_tokens=40) for handle in range(30, 40)))
            await session.read_until_done(40)
            assert not session.failures
            assert all(session.tokens[handle] == list(range(4, 44)) for handle in range(40))
            assert (await it.status()).groups[0].num_free_blocks == it.num_blocks

    run(scenario())


def test_an_idle_group_goes_at_once(cluster, submit, run):
    async def scenario():
        async with cluster() as it:
            await two_groups(it)
            assert await remove(it, 0) == [0]
            assert states(await it.status()) == {1: READY}
            session = await it.session()
            await session.submit(submit(1))
            await session.read_until_done(1)
            assert session.tokens[1] == list(range(4, 12))

    run(scenario())


def test_while_others_are_full_it_runs_on_and_takes_nothing_new(cluster, submit, run):
    async def scenario():
        async with cluster(max_num_seqs=1) as it:
            await two_groups(it)
            session = await it.session()
            it.workers[0].hold.clear()
            await session.submit(submit(0, max_tokens=30), submit(1, max_tokens=30), submit(2))
            await until(it, lambda status: [group.num_running for group in status.groups] == [1, 1])
            removing = asyncio.create_task(remove(it, 1))
            await session.read_until_done(1)  # what group 1 had
            assert await removing == [1, 0]
            assert (await it.status()).num_waiting == 1
            it.workers[0].hold.set()
            await session.read_until_done(3)
            assert not session.failures

    run(scenario())


def test_the_last_one_that_serves_stays(cluster, run):
    async def scenario():
        async with cluster() as it:
            await it.add_group()
            with pytest.raises(grpc.aio.AioRpcError, match="group 0 is the last one that serves") as caught:
                await remove(it, 0)
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            with pytest.raises(grpc.aio.AioRpcError, match="there is no group 7") as caught:
                await remove(it, 7)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            assert ANSWERED in tuple(caught.value.trailing_metadata())
            assert states(await it.status()) == {0: READY}

    run(scenario())


def test_a_group_that_fails_while_it_leaves_is_gone_and_its_requests_are_not(cluster, submit, run):
    async def scenario():
        async with cluster(max_num_seqs=1, rebuilds_groups=True) as it:
            await two_groups(it)
            session = await it.session()
            for worker in it.workers:
                worker.hold.clear()
            await session.submit(submit(0, max_tokens=30), submit(1, max_tokens=30))
            await until(it, lambda status: [group.num_running for group in status.groups] == [1, 1])
            removing = asyncio.create_task(remove(it, 1))
            await until(it, lambda status: states(status)[1] == DRAINING)
            it.workers[1].fail_at_step = 4
            for worker in it.workers:
                worker.hold.set()
            await removing
            assert states(await it.status()) == {0: READY}
            await session.read_until_done(2)
            assert [session.tokens[handle] for handle in (0, 1)] == [list(range(4, 34))] * 2

    run(scenario())


@pytest.mark.parametrize("rebuilds_groups", [False, True])
def test_where_the_others_fail_meanwhile_it_serves_on(cluster, submit, run, rebuilds_groups):
    async def scenario():
        async with cluster(max_num_seqs=1, rebuilds_groups=rebuilds_groups) as it:
            await two_groups(it)
            session = await it.session()
            for worker in it.workers:
                worker.hold.clear()
            it.workers[0].fail_at_step = 4
            await session.submit(submit(0, max_tokens=30), submit(1, max_tokens=30))
            await until(it, lambda status: [group.num_running for group in status.groups] == [1, 1])
            removing = asyncio.create_task(remove(it, 1))
            await until(it, lambda status: states(status)[1] == DRAINING)
            it.workers[0].hold.set()
            await until(it, lambda status: status.groups[0].state == admin_pb2.GROUP_STATE_FAILED)
            if rebuilds_groups:  # until nobody does
                assert states(await it.status())[1] == DRAINING
                await it.stub.AbandonGroup(engine_pb2.AbandonGroupRequest(group_id=0))
            with pytest.raises(grpc.aio.AioRpcError, match="group 1 serves on: it is the last one"):
                await removing
            it.workers[1].hold.set()
            await session.read_until_done(2)
            assert [session.tokens[handle] for handle in (0, 1)] == [list(range(4, 34))] * 2
            assert states(await it.status())[1] == READY

    run(scenario())


def test_a_group_that_has_failed_is_forgotten(cluster, submit, run):
    async def scenario():
        async with cluster(rebuilds_groups=True) as it:
            await two_groups(it)
            it.workers[1].fail_at_step = 2
            session = await it.session()
            await session.submit(*(submit(handle, max_tokens=20) for handle in range(4)))
            await it.await_failures()
            await remove(it, 1)
            await session.read_until_done(4)
            assert not session.failures
            assert states(await it.status()) == {0: READY}

    run(scenario())


def test_a_caller_that_leaves_and_one_that_comes_back(cluster, submit, run):
    async def scenario():
        async with cluster(max_num_seqs=1) as it:
            await two_groups(it)
            session = await it.session()
            for worker in it.workers:
                worker.hold.clear()
            await session.submit(submit(0, max_tokens=30), submit(1, max_tokens=30))
            await until(it, lambda status: [group.num_running for group in status.groups] == [1, 1])
            call = it.stub.RemoveGroup(engine_pb2.RemoveGroupRequest(group_id=1))
            await call.read()
            call.cancel()
            for worker in it.workers:
                worker.hold.set()
            assert (await remove(it, 1))[-1] == 0
            await session.read_until_done(2)
            assert states(await it.status()) == {0: READY}

    run(scenario())
