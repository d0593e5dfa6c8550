"""The shell of copies between groups, over real gRPC: when ranks are asked, and what becomes of the blocks."""

import asyncio
from contextlib import asynccontextmanager

import numpy as np

NUM_PROMPT = 8  # two blocks


@asynccontextmanager
async def two_groups(cluster, submit, ranks_of_each=1, **config):
    """A sequence runs in group 0, whose workers stand still before step 10; group 1 is idle."""
    async with cluster(num_ranks=2 * ranks_of_each, rebuilds_groups=True, **config) as it:
        for rank, worker in enumerate(it.workers):
            worker.rank = rank % ranks_of_each
        await it.add_group(group_id=0, ranks=slice(0, ranks_of_each))
        it.workers[0].hold_at_step = 10
        session = await it.session()
        await session.submit(submit(0, num_prompt=NUM_PROMPT, max_tokens=40))
        await until(lambda: not it.workers[0].hold.is_set())
        await it.add_group(group_id=1, ranks=slice(ranks_of_each, 2 * ranks_of_each))
        sequence = it.engine.scheduler.groups[0].running.first()
        yield it, session, asyncio.create_task(it.engine.copy_sequence_blocks(sequence, 0, 1))


def go_on(worker, until_step) -> None:
    worker.hold_at_step = until_step
    worker.hold.set()


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def num_free(it, group_id) -> int:
    return it.engine.scheduler.groups[group_id].blocks.num_free_blocks


def test_a_sequence_that_loses_its_group_goes_on_from_what_was_copied(cluster, submit, run):
    async def scenario():
        async with two_groups(cluster, submit, ranks_of_each=2) as (it, session, copying):
            await asyncio.sleep(0.05)
            assert not it.workers[2].received, "steps in flight still compute what is copied"
            it.workers[0].fail_at_step = 20
            go_on(it.workers[0], 20)
            num_blocks = await copying
            assert num_blocks >= 4
            for rank in range(2):
                [request] = it.workers[2 + rank].received
                assert (request.epoch, request.source_epoch) == (2, 1)
                assert request.source_address == it.endpoints[rank].address
                assert request.source_after_step >= 9
                assert request.block_ids == it.workers[2].received[0].block_ids
                assert len(np.frombuffer(request.block_ids, "<i4")) == num_blocks
            go_on(it.workers[0], 0)
            await session.read_until_done(1)
            assert session.tokens[0] == list(range(NUM_PROMPT, NUM_PROMPT + 40))
            [join] = it.workers[2].plans[0].joins
            assert join.num_computed_tokens == 4 * num_blocks
            assert num_free(it, 1) == it.num_blocks
            # In the order of the prefix, where the sequence finds it.
            expected = np.frombuffer(it.workers[2].received[0].block_ids, "<i4")
            assert np.frombuffer(join.block_ids, "<i4")[:num_blocks].tolist() == expected.tolist()

    run(scenario())


def test_a_copy_that_fails_leaves_all_as_it_was(cluster, submit, run):
    async def scenario():
        async with two_groups(cluster, submit) as (it, session, copying):
            it.workers[1].copy_failure = "the source does not answer"
            go_on(it.workers[0], 0)
            assert await copying == 0
            await session.read_until_done(1)
            assert session.tokens[0] == list(range(NUM_PROMPT, NUM_PROMPT + 40))
            await until(lambda: num_free(it, 0) == num_free(it, 1) == it.num_blocks)
            it.engine.scheduler.check_invariants()

    run(scenario())


def test_a_source_that_is_lost_before_the_copy_begins(cluster, submit, run):
    async def scenario():
        async with two_groups(cluster, submit) as (it, session, copying):
            await asyncio.sleep(0.05)
            it.workers[0].fail_at_step = 10
            go_on(it.workers[0], 0)
            assert await copying == 0
            assert not it.workers[1].received
            await session.read_until_done(1)
            assert session.tokens[0] == list(range(NUM_PROMPT, NUM_PROMPT + 40))
            assert num_free(it, 1) == it.num_blocks

    run(scenario())


def test_a_source_that_is_lost_on_the_way(cluster, submit, run):
    async def scenario():
        async with two_groups(cluster, submit) as (it, session, copying):
            it.workers[1].copies.clear()
            it.workers[0].fail_at_step = 20
            go_on(it.workers[0], 0)
            await until(lambda: it.workers[1].received)
            await it.await_failures()
            # Blocks that ranks still write to are nobody else's.
            held = len(np.frombuffer(it.workers[1].received[0].block_ids, "<i4"))
            group = it.engine.scheduler.groups[1]
            assert group.blocks.num_free_blocks <= it.num_blocks - held
            it.workers[1].copy_failure = "the other rank is lost"
            it.workers[1].copies.set()
            assert await copying == 0
            await session.read_until_done(1)
            assert session.tokens[0] == list(range(NUM_PROMPT, NUM_PROMPT + 40))
            assert num_free(it, 1) == it.num_blocks

    run(scenario())


def test_a_target_that_is_lost_on_the_way(cluster, submit, run):
    async def scenario():
        async with two_groups(cluster, submit) as (it, session, copying):
            it.workers[1].copies.clear()
            go_on(it.workers[0], 30)
            await until(lambda: it.workers[1].received)
            it.workers[1].fail_at_step = 1
            await session.submit(*(submit(handle) for handle in range(1, 5)))  # some of them go to group 1
            await it.await_failures()
            assert await copying == 0
            go_on(it.workers[0], 0)
            await session.read_until_done(5)
            assert session.tokens[0] == list(range(NUM_PROMPT, NUM_PROMPT + 40))
            assert num_free(it, 0) == it.num_blocks
            it.engine.scheduler.check_invariants()
            it.workers[1].fail_at_step = 0
            await it.add_group(group_id=1, ranks=slice(1, 2))
            assert num_free(it, 1) == it.num_blocks

    run(scenario())


def test_who_no_longer_waits_does_not_let_go_of_what_ranks_write(cluster, submit, run):
    async def scenario():
        async with two_groups(cluster, submit) as (it, session, copying):
            it.workers[1].copies.clear()
            go_on(it.workers[0], 0)
            await until(lambda: it.workers[1].received)
            copying.cancel()
            await asyncio.wait({copying})
            assert num_free(it, 1) < it.num_blocks
            it.workers[1].copies.set()
            await until(lambda: num_free(it, 1) == it.num_blocks)
            assert it.engine.scheduler.groups[1].blocks.num_cached_blocks > 0
            await session.read_until_done(1)

    run(scenario())


def test_who_no_longer_waits_for_a_step_lets_go(cluster, submit, run):
    async def scenario():
        async with two_groups(cluster, submit) as (it, session, copying):
            await asyncio.sleep(0.05)
            assert num_free(it, 1) < it.num_blocks
            copying.cancel()
            await asyncio.wait({copying})
            assert num_free(it, 1) == it.num_blocks
            go_on(it.workers[0], 0)
            await session.read_until_done(1)
            assert num_free(it, 0) == it.num_blocks
            assert not it.workers[1].received

    run(scenario())


def test_groups_of_other_sizes_copy_nothing(cluster, submit, run):
    async def scenario():
        async with cluster(num_ranks=3) as it:
            for rank, worker in enumerate(it.workers):
                worker.rank = rank % 2
            it.workers[0].hold_at_step = 5
            await it.add_group(group_id=0, ranks=slice(0, 2))
            session = await it.session()
            await session.submit(submit(0, num_prompt=NUM_PROMPT, max_tokens=20))
            await until(lambda: not it.workers[0].hold.is_set())
            await it.add_group(group_id=1, ranks=slice(2, 3))
            sequence = it.engine.scheduler.groups[0].running.first()
            assert await it.engine.copy_sequence_blocks(sequence, 0, 1) == 0
            assert await it.engine.copy_sequence_blocks(sequence, 0, 7) == 0
            assert await it.engine.copy_sequence_blocks(sequence, 1, 0) == 0
            go_on(it.workers[0], 0)
            await session.read_until_done(1)

    run(scenario())


def test_a_rank_is_told_where_its_weights_may_come_from(cluster, run):
    async def scenario():
        async with cluster() as it:
            for rank, endpoint in enumerate(it.endpoints):
                endpoint.weight_source = f"elsewhere:{rank}"
            await it.add_group()
            assert [worker.weight_source for worker in it.workers] == ["elsewhere:0", "elsewhere:1"]

    run(scenario())
