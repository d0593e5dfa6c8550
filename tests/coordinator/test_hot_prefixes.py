"""Prefixes that request after request begins with come to other groups before requests do."""

import asyncio

import pytest
from octavo.coordinator.core.hot_prefixes import HotPrefixes, WantedPrefix
from octavo.coordinator.core.worker_group import GroupMemory, WorkerGroup

from .test_engine_moves import reached
from .test_removal import two_groups

NAMES = [bytes([i]) * 16 for i in range(16)]  # of 256 tokens


def make_groups(*num_running):
    groups = []
    for group_id, count in enumerate(num_running):
        groups.append(WorkerGroup(group_id, GroupMemory(num_blocks=64), block_size=16, max_num_seqs=8))
        groups[-1].running = range(count)
    return groups


def note(hot, names, groups, times=1):
    for _ in range(times):
        hot.note(names, groups[0], groups)
    hot.check_invariants()
    return hot.take_wanted()


def test_what_was_found_twice_goes_to_groups_that_have_less_to_do_and_lack_it():
    groups = make_groups(3, 2, 0, 3, 1)
    groups[2].blocks.cache.publish(NAMES[-1], 5)
    groups[4].is_draining = True
    hot = HotPrefixes(copies_blocks=True)
    assert note(hot, NAMES, groups) == []
    assert note(hot, NAMES, groups) == [WantedPrefix(tuple(NAMES), 0, 1)]
    assert hot.touches(0)
    assert hot.touches(1)
    assert not hot.touches(2)


def test_it_is_asked_for_again_but_ever_more_seldom_and_not_while_it_is_on_its_way():
    groups, hot = make_groups(1, 0), HotPrefixes(copies_blocks=True)
    (copy,) = note(hot, NAMES, groups, times=4)
    hot.end(copy)
    assert not hot.touches(1)
    assert note(hot, NAMES, groups, times=3) == []
    assert note(hot, NAMES, groups) == [copy]


@pytest.mark.parametrize(
    ("names", "num_groups", "copies_blocks"), [(NAMES[:15], 2, True), (NAMES, 1, True), (NAMES, 2, False)]
)
def test_what_is_short_or_has_nowhere_to_go_stays(names, num_groups, copies_blocks):
    groups = make_groups(*[1, 0][:num_groups])
    assert note(HotPrefixes(copies_blocks), names, groups, times=20) == []


def test_two_copies_at_most_are_on_their_way_to_a_group():
    groups, hot = make_groups(1, 0), HotPrefixes(copies_blocks=True)
    copies = [copy for i in range(4) for copy in note(hot, [*NAMES[:-1], bytes([99, i]) * 8], groups, times=2)]
    assert len(copies) == 2
    hot.end(copies[0])
    assert len(note(hot, NAMES, groups, times=2)) == 1


def test_for_a_group_that_joins_all_is_soon_due_again():
    groups, hot = make_groups(1, 1), HotPrefixes(copies_blocks=True)
    assert note(hot, NAMES, groups, times=600) == []
    groups += make_groups(1, 1, 0)[2:]
    hot.start_anew()
    assert len(note(hot, NAMES, groups, times=2)) == 1


def test_of_many_prefixes_those_that_were_found_last_are_remembered():
    groups, hot = make_groups(1, 0), HotPrefixes(copies_blocks=True)
    note(hot, NAMES, groups)
    for i in range(2000):
        assert note(hot, [*NAMES[:-1], i.to_bytes(16, "little")], groups) == []
    assert note(hot, NAMES, groups) == []


CONFIG = {"max_model_len": 400, "max_num_batched_tokens": 512, "enable_prefix_caching": True}
NUM_PROMPT = 260  # 65 blocks of 4, of which the last one is computed for its sample


@pytest.mark.parametrize("failure", ["", "the source does not answer"])
def test_the_next_request_in_another_group_finds_it(failure, cluster, submit, run):
    async def scenario():
        async with cluster(num_ranks=2, **CONFIG) as it:
            await two_groups(it)
            for worker in it.workers:
                worker.copy_failure = failure
            session = await it.session()
            for handle in range(3):
                await session.submit(submit(handle, num_prompt=NUM_PROMPT, max_tokens=3))
                await session.read_until_done(handle + 1)
            (other,) = (worker for worker in it.workers if not any(plan.joins for plan in worker.plans))
            await reached(lambda: other.received)
            await reached(lambda: not it.engine.scheduler.hot_prefixes._copying)
            assert len(other.received[0].block_ids) == 4 * 64
            # So many at once that both groups take some.
            await session.submit(*(submit(10 + i, num_prompt=NUM_PROMPT, max_tokens=3) for i in range(12)))
            await session.read_until_done(15)
            joins = [join for plan in other.plans for join in plan.joins]
            assert joins
            assert joins[0].num_computed_tokens == (0 if failure else 256)
            tokens = list(range(NUM_PROMPT, NUM_PROMPT + 3))
            assert all(session.tokens[handle] == tokens for handle in [*range(3), *range(10, 22)])
            it.engine.scheduler.check_invariants()

    run(scenario())


def test_an_engine_that_ends_meanwhile_waits_for_nothing(cluster, submit, run):
    async def scenario():
        async with cluster(num_ranks=2, **CONFIG) as it:
            await two_groups(it)
            for worker in it.workers:
                worker.copies.clear()
            session = await it.session()
            for handle in range(3):
                await session.submit(submit(handle, num_prompt=NUM_PROMPT, max_tokens=3))
                await session.read_until_done(handle + 1)
            await reached(lambda: any(worker.received for worker in it.workers))
        assert not it.engine.scheduler.hot_prefixes._copying
        await asyncio.sleep(0)

    run(scenario())
