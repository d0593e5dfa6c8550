"""A group that fails or cannot start: everybody hears why, and nobody waits for it."""

import grpc
import pytest
from octavo.coordinator.shell import group_runner
from octavo.proto import admin_pb2


def test_a_failing_rank_ends_every_request_with_one_clear_error(cluster, submit, run):
    async def scenario():
        async with cluster() as it:
            await it.add_group()
            it.workers[1].fail_at_step = 3
            session = await it.session()
            await session.submit(submit(1, max_tokens=50), submit(2, max_tokens=50))
            await session.read_until_done(2)
            assert {failure.code for failure in session.failures.values()} == {grpc.StatusCode.UNAVAILABLE.value[0]}
            assert (await it.status()).groups[0].state == admin_pb2.GROUP_STATE_FAILED
            await session.submit(submit(3))
            await session.read_until_done(3)
            assert session.failures[3].code == grpc.StatusCode.UNAVAILABLE.value[0]

    run(scenario())


@pytest.mark.parametrize("rank", [0, 1])
def test_any_rank_says_why_while_plans_still_come(cluster, submit, run, rank):
    async def scenario():
        async with cluster(num_inflight_steps=8) as it:
            await it.add_group()
            it.workers[rank].fail_at_step = 2
            session = await it.session()
            await session.submit(submit(1, max_tokens=50))
            await session.read_until_done(1)
            assert (await it.status()).groups[0].failure == f"rank {rank}: the forward pass failed"

    run(scenario())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_ends_without_a_word_is_named_in_our_own(cluster, submit, run, rank):
    async def scenario():
        async with cluster(num_inflight_steps=8) as it:
            await it.add_group()
            it.workers[rank].abort_at_step = 2
            session = await it.session()
            await session.submit(submit(1, max_tokens=50))
            await session.read_until_done(1)
            # Its status, or what is said where a write took the status's place: grpc's own words help nobody.
            failure = (await it.status()).groups[0].failure
            assert failure in {f"rank {rank}: {why}" for why in ("the forward pass failed", "its stream broke off")}

    run(scenario())


def lose_a_token(result):
    result.token_ids = result.token_ids[:-4]


def skip_a_step(result):
    result.step_id += 1


def come_from_another_life(result):
    result.epoch += 1


def score_an_unknown_chunk(result):
    result.prompt_logprobs.add(chunk=9)


@pytest.mark.parametrize("spoil", [lose_a_token, skip_a_step, come_from_another_life, score_an_unknown_chunk])
def test_a_result_that_cannot_be_right_fails_the_group_and_hangs_nobody(cluster, submit, run, spoil):
    async def scenario():
        async with cluster() as it:
            await it.add_group()
            it.workers[0].spoil_at_step, it.workers[0].spoil = 3, spoil
            session = await it.session()
            await session.submit(submit(1, max_tokens=50), submit(2, max_tokens=50))
            await session.read_until_done(2)
            assert {failure.code for failure in session.failures.values()} == {grpc.StatusCode.UNAVAILABLE.value[0]}
            status = await it.status()
            assert status.groups[0].state == admin_pb2.GROUP_STATE_FAILED
            assert "rank 0: its result could not be taken" in status.groups[0].failure
            assert (status.counters.num_failed, status.counters.num_cancelled) == (2, 0)

    run(scenario())


def test_a_step_that_cannot_be_made_fails_the_group(cluster, submit, run, monkeypatch):
    def encode(plan, epoch):
        raise OverflowError("slot 65536 does not fit")

    monkeypatch.setattr(group_runner, "encode_plan", encode)

    async def scenario():
        async with cluster() as it:
            await it.add_group()
            session = await it.session()
            await session.submit(submit(1))
            await session.read_until_done(1)
            assert session.failures[1].code == grpc.StatusCode.UNAVAILABLE.value[0]
            failure = (await it.status()).groups[0].failure
            assert failure == "its next step could not be made: slot 65536 does not fit"

    run(scenario())


def test_a_failed_group_is_left_alone_and_the_other_goes_on(cluster, submit, run, caplog):
    async def scenario():
        async with cluster() as it:
            for group_id, worker in enumerate(it.workers):
                worker.rank = 0
                await it.add_group(group_id=group_id, ranks=slice(group_id, group_id + 1))
            it.workers[1].fail_at_step = 2
            session = await it.session()
            await session.submit(*(submit(handle, max_tokens=20) for handle in range(4)))
            await session.read_until_done(4)
            assert all(session.tokens[handle] == list(range(4, 24)) for handle in range(4))
            await session.submit(*(submit(handle, max_tokens=20) for handle in range(4, 8)))
            await session.read_until_done(8)
            assert not session.failures
            groups = (await it.status()).groups
            assert [group.state for group in groups] == [admin_pb2.GROUP_STATE_READY, admin_pb2.GROUP_STATE_FAILED]
            assert groups[1].failure == "rank 0: the forward pass failed"
            assert it.workers[1].gone.is_set()  # nothing holds its stream open

    run(scenario())
    assert [record.message for record in caplog.records] == ["group 1 failed: rank 0: the forward pass failed"]


def test_a_group_without_room_for_the_longest_request_is_refused(cluster, submit, run):
    async def scenario():
        async with cluster() as it:
            for worker in it.workers:
                worker.num_blocks = 15
            words = (
                "max_model_len 64 needs 16 KV blocks of 4 tokens, and group 0 has 15: set --max-model-len to at most 60"
            )
            with pytest.raises(grpc.aio.AioRpcError, match=words) as caught:
                await it.add_group()
            assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
            for worker in it.workers:
                worker.num_blocks = 16
            await it.add_group()

    run(scenario())


def test_a_group_that_cannot_start_says_why(cluster, submit, run):
    async def scenario():
        async with cluster() as it:
            with pytest.raises(grpc.aio.AioRpcError, match=r"rank \d: tensor w is missing"):
                await it.add_group("broken")
            assert not (await it.status()).groups
            await it.add_group()  # and may be tried again

    run(scenario())
