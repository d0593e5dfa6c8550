"""The shell over real gRPC, while all goes well: tokens, plans, sessions, cancels, refusals of one request."""

import asyncio

import grpc
import numpy as np
import pytest
from octavo.proto import admin_pb2, worker_pb2


def test_tokens_come_in_order_once_and_the_blocks_come_back(cluster, submit, run):
    async def scenario():
        async with cluster() as it:
            progress = await it.add_group()
            assert [p.stage for p in progress] == ["connect", "weights", "kv cache", "warm-up", "ready"]
            assert progress[1].duration_s == 2.0  # of the slowest rank
            assert progress[-1].num_blocks == it.num_blocks
            first, second = await it.session(), await it.session()
            for handle in range(20):
                await first.submit(submit(handle, num_prompt=1 + handle, max_tokens=5))
            await second.submit(submit(0, num_prompt=40, max_tokens=30), submit(1, max_tokens=1))
            await asyncio.gather(first.read_until_done(20), second.read_until_done(2))
            for handle in range(20):
                assert first.tokens[handle] == list(range(1 + handle, 6 + handle))
            assert second.tokens == {0: list(range(40, 64)), 1: [4]}  # the context ends at 64
            assert not first.failures
            assert not second.failures
            status = await it.status()
            assert status.groups[0].num_free_blocks == it.num_blocks
            assert status.groups[0].steps.num_steps > 0
            assert status.counters.num_finished == 22
            assert status.num_gateways == 2
            ranks = [[plan.SerializeToString() for plan in worker.plans] for worker in it.workers]
            assert ranks[0] == ranks[1]

    run(scenario())


def test_ranks_that_pass_the_stages_in_another_order_are_told_apart_by_name(cluster, run):
    async def scenario():
        async with cluster() as it:
            it.workers[1].weights_come_late = True
            progress = await it.add_group()
            durations = {p.stage: p.duration_s for p in progress[:4]}
            assert durations == {"connect": 0.25, "weights": 2.0, "kv cache": 0.5, "warm-up": 0.0}
            assert progress[-1].num_blocks == it.num_blocks

    run(scenario())


def test_several_plans_are_sent_before_the_first_result(cluster, submit, run):
    async def scenario():
        async with cluster() as it:
            await it.add_group()
            for worker in it.workers:
                worker.hold.clear()
            session = await it.session()
            await session.submit(submit(0))
            while (await it.status()).groups[0].num_inflight_steps < 3:
                await asyncio.sleep(0.01)
            assert not session.tokens
            for worker in it.workers:
                worker.hold.set()
            await session.read_until_done(1)
            assert session.tokens[0] == list(range(4, 12))

    run(scenario())


def test_chunks_beside_decodes_follow_the_target_and_the_workers_times(cluster, submit, run):
    async def scenario():
        sizes = {"max_num_batched_tokens": 1024, "max_model_len": 4096, "num_inflight_steps": 2, "vocab_size": 4096}
        async with cluster(num_ranks=1, itl_target_ms=1e-6, **sizes) as it:  # a step of theirs takes 5 us
            await it.add_group()
            session = await it.session()
            await session.submit(submit(0, num_prompt=4, max_tokens=20), submit(1, num_prompt=3500, max_tokens=1))
            await session.read_until_done(2)
            chunks = [np.frombuffer(plan.chunk_num_tokens, "<i4").tolist() for plan in it.workers[0].plans]
            assert chunks[:2] == [[4, 1020], [1023]]  # sent before the first result
            assert chunks[2] == [383]  # of all that wait, a quarter in whole tiles: 1,457 tokens behind 2,043

    run(scenario())


def test_a_steady_decode_plan_of_256_sequences_is_small(cluster, submit, run):
    async def scenario():
        async with cluster(
            num_ranks=1, max_num_seqs=256, max_num_batched_tokens=1024, block_size=16, max_model_len=64
        ) as it:
            await it.add_group()
            session = await it.session()
            await session.submit(*(submit(handle, num_prompt=1, max_tokens=60) for handle in range(256)))
            await session.read_until_done(256)
            plans = [plan for plan in it.workers[0].plans if not plan.joins and not plan.decode_slots_changed]
            assert len(plans) > 40
            sizes = sorted(plan.ByteSize() for plan in plans)
            assert sizes[len(sizes) // 2] < 16  # most steps change nothing
            assert sum(sizes) / len(sizes) < 256  # one sequence in block_size needs a block

    run(scenario())


def test_cancel_and_a_vanished_gateway_free_everything(cluster, submit, run):
    async def scenario():
        async with cluster() as it:
            await it.add_group()
            session = await it.session()
            for worker in it.workers:
                worker.hold.clear()
            await session.submit(submit(1, max_tokens=50), submit(2, max_tokens=3))
            await session.cancel(1)
            for worker in it.workers:
                worker.hold.set()
            await session.read_until_done(1)
            assert session.finished == {2: 2}
            await session.submit(submit(3, max_tokens=50))
            await session.read()
            session.call.cancel()
            while (status := await it.status()).num_gateways:
                await asyncio.sleep(0.01)
            assert status.groups[0].num_free_blocks == it.num_blocks
            assert status.groups[0].num_running == 0

    run(scenario())


def test_a_stop_string_ends_a_request_as_finished(cluster, submit, run):
    async def scenario():
        async with cluster() as it:
            await it.add_group()
            for worker in it.workers:
                worker.hold.clear()
            session = await it.session()
            await session.submit(submit(1, max_tokens=50))
            await session.stop(1)
            await session.stop(1)  # has ended already
            while not (counters := (await it.status()).counters).num_finished:
                await asyncio.sleep(0.01)
            assert (counters.num_finished, counters.num_cancelled, counters.num_failed) == (1, 0, 0)
            assert (await it.status()).groups[0].num_free_blocks == it.num_blocks
            for worker in it.workers:
                worker.hold.set()

    run(scenario())


def test_an_ended_session_leaves_no_task(cluster, submit, run):
    def waiting():
        return [task for task in asyncio.all_tasks() if "next_response" in repr(task.get_coro())]

    async def scenario():
        async with cluster() as it:
            await it.add_group()
            session = await it.session()
            session.call.cancel()
            while (await it.status()).num_gateways:
                await asyncio.sleep(0.01)
            assert not waiting()

    run(scenario())


@pytest.mark.parametrize(
    ("bad", "words", "field"),
    [
        ({"prompt_token_ids": b"abc"}, "prompt_token_ids", "prompt_token_ids"),
        ({"num_prompt": 0}, "0 tokens", "prompt"),
        ({"num_prompt": 64}, "64 tokens", "prompt"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens"),
    ],
)
def test_a_bad_request_fails_alone(cluster, submit, run, bad, words, field):
    async def scenario():
        async with cluster() as it:
            await it.add_group()
            session = await it.session()
            await session.submit(submit(7, **bad), submit(8))
            await session.read_until_done(2)
            assert session.failures[7].code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
            assert session.failures[7].field == field
            assert words in session.failures[7].message
            assert len(session.tokens[8]) == 8

    run(scenario())


def test_a_full_queue_refuses_with_a_time_to_retry(cluster, submit, run):
    async def scenario():
        async with cluster(max_num_waiting=1) as it:
            await it.add_group()
            session = await it.session()
            await session.submit(submit(1), submit(2))
            await session.read_until_done(2)
            assert session.failures[2].code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
            assert session.failures[2].retry_after_s > 0
            assert len(session.tokens[1]) == 8

    run(scenario())


def test_what_a_group_preempts_goes_on_in_an_idle_one(cluster, submit, run):
    async def scenario():
        async with cluster(max_num_seqs=2, max_model_len=32) as it:
            for group_id, worker in enumerate(it.workers):
                worker.rank, worker.num_blocks = 0, 8
                await it.add_group(group_id=group_id, ranks=slice(group_id, group_id + 1))
            session = await it.session()
            # Two short ones fill group 0, two that outgrow the blocks fill group 1; no later request wakes anybody.
            await session.submit(
                submit(0, num_prompt=4, max_tokens=2),
                submit(2, num_prompt=4, max_tokens=2),
                submit(1, num_prompt=8, max_tokens=20),
                submit(3, num_prompt=8, max_tokens=20),
            )
            await session.read_until_done(4)
            assert session.tokens[3] == list(range(8, 28))
            status = await it.status()
            assert status.counters.num_preemptions > 0
            assert len(it.workers[0].plans) > 2

    run(scenario())


def test_a_row_without_a_token_ends_its_request_alone(cluster, submit, run):
    async def scenario():
        async with cluster() as it:
            await it.add_group()
            it.workers[0].spoil_at_step = 3
            it.workers[0].spoil = lambda result: result.MergeFrom(worker_pb2.StepResult(failed_rows=b"\1\0\0\0"))
            session = await it.session()
            await session.submit(*(submit(handle, max_tokens=20) for handle in (1, 2, 3)))
            await session.read_until_done(3)
            assert {handle: len(tokens) for handle, tokens in session.tokens.items()} == {1: 20, 2: 2, 3: 20}
            [failure] = session.failures.values()
            assert (failure.handle, failure.code) == (2, grpc.StatusCode.INTERNAL.value[0])
            assert "not finite" in failure.message
            status = await it.status()
            assert status.groups[0].state == admin_pb2.GROUP_STATE_READY
            assert status.groups[0].num_free_blocks == it.num_blocks
            assert (status.counters.num_failed, status.counters.num_finished) == (1, 2)

    run(scenario())
