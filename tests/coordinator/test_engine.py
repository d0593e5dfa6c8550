"""The shell over real gRPC: a real Engine, workers that count instead of computing, sessions as gateways open them."""

import asyncio
from collections import defaultdict
from contextlib import asynccontextmanager

import grpc
import numpy as np
import pytest
from octavo.coordinator.shell import group_runner
from octavo.coordinator.shell.engine import Engine
from octavo.coordinator.shell.service import EngineService
from octavo.proto import admin_pb2, engine_pb2, engine_pb2_grpc, sampling_pb2, worker_pb2, worker_pb2_grpc

NUM_BLOCKS = 1024


class CountingWorker(worker_pb2_grpc.WorkerServicer):
    """Keeps a slot table as a worker must. The token sampled at a position is that position."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.plans: list[worker_pb2.BatchPlan] = []
        self.fail_at_step = 0
        self.spoil_at_step = 0
        self.spoil = lambda result: None  # what is wrong with that step's result
        self.num_blocks = NUM_BLOCKS
        self.gone = asyncio.Event()  # the stream has ended
        self.hold = asyncio.Event()
        self.hold.set()
        self.computed: dict[int, int] = {}
        self.known: dict[int, int] = {}
        self.decode_slots: list[int] = []

    async def Configure(self, request, context):
        assert request.rank == self.rank
        if request.config.model_path == "broken":
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "tensor w is missing")
        yield worker_pb2.ConfigureProgress(stage="weights", duration_s=1.0 + self.rank)
        yield worker_pb2.ConfigureProgress(stage="kv cache", duration_s=0.5, num_blocks=self.num_blocks)

    async def Steps(self, requests, context):
        context.add_done_callback(lambda _: self.gone.set())
        async for plan in requests:
            assert plan.step_id == len(self.plans) + 1
            self.plans.append(plan)
            await self.hold.wait()
            if plan.step_id == self.fail_at_step:
                await context.abort(grpc.StatusCode.INTERNAL, "the forward pass failed")
            tokens = self.apply(plan)
            if self.rank == 0:
                packed = np.asarray(tokens, "<i4").tobytes()
                step = {"epoch": plan.epoch, "step_id": plan.step_id}
                result = worker_pb2.StepResult(**step, token_ids=packed, model_time_us=5)
                if plan.step_id == self.spoil_at_step:
                    self.spoil(result)
                yield result

    def apply(self, plan):
        for slot in np.frombuffer(plan.leave_slots, "<u2").tolist():
            del self.computed[slot], self.known[slot]
        for join in plan.joins:
            assert join.slot not in self.known
            self.computed[join.slot] = join.num_computed_tokens
            self.known[join.slot] = len(join.token_ids) // 4
        if plan.decode_slots_changed:
            self.decode_slots = np.frombuffer(plan.decode_slots, "<u2").tolist()
        chunks = zip(
            np.frombuffer(plan.chunk_slots, "<u2").tolist(),
            np.frombuffer(plan.chunk_num_tokens, "<i4").tolist(),
            strict=True,
        )
        tokens = []
        for slot, num_tokens in [*((slot, 1) for slot in self.decode_slots), *chunks]:
            self.computed[slot] += num_tokens
            if self.computed[slot] == self.known[slot]:
                tokens.append(self.known[slot])
                self.known[slot] += 1
        return tokens


class GatewaySession:
    """A gateway's side of a session."""

    def __init__(self, call) -> None:
        self.call = call
        self.tokens = defaultdict(list)
        self.finished: dict[int, int] = {}
        self.failures: dict[int, engine_pb2.Failure] = {}
        self.num_messages = 0

    async def submit(self, *submits) -> None:
        await self.call.write(engine_pb2.SessionRequest(submits=submits))

    async def stop(self, handle) -> None:
        await self.call.write(engine_pb2.SessionRequest(stop_handles=np.asarray([handle], "<u4").tobytes()))

    async def cancel(self, handle) -> None:
        await self.call.write(engine_pb2.SessionRequest(cancel_handles=np.asarray([handle], "<u4").tobytes()))

    async def read(self) -> None:
        response = await self.call.read()
        assert isinstance(response, engine_pb2.SessionResponse)
        self.num_messages += 1
        self.failures |= {failure.handle: failure for failure in response.failures}
        counts = np.frombuffer(response.num_tokens, "<u4").tolist()
        tokens = iter(np.frombuffer(response.token_ids, "<i4").tolist())
        for handle, count, reason in zip(
            np.frombuffer(response.handles, "<u4").tolist(), counts, response.finish_reasons, strict=True
        ):
            self.tokens[handle] += [next(tokens) for _ in range(count)]
            if reason:
                self.finished[handle] = reason

    async def read_until_done(self, num_requests) -> None:
        while len(self.finished) + len(self.failures) < num_requests:
            await self.read()


def submit(handle, num_prompt=4, max_tokens=8, **fields):
    return engine_pb2.Submit(
        handle=handle,
        prompt_token_ids=np.arange(num_prompt, dtype="<i4").tobytes(),
        sampling_params=sampling_pb2.SamplingParams(max_tokens=max_tokens, **fields),
    )


class Cluster:
    def __init__(self, tmp_path, workers, endpoints) -> None:
        self.address = f"unix:{tmp_path}/engine.sock"
        self.workers = workers
        self.endpoints = endpoints
        self.stub: engine_pb2_grpc.EngineStub

    async def add_group(self, model_path="model", group_id=0, ranks=slice(None)):
        config = engine_pb2.WorkerConfig(model_path=model_path)
        request = engine_pb2.AddGroupRequest(group_id=group_id, workers=self.endpoints[ranks], config=config)
        return [progress async for progress in self.stub.AddGroup(request)]

    async def session(self) -> GatewaySession:
        call = self.stub.Session()
        session = GatewaySession(call)
        await session.read()  # the first, empty one
        return session

    async def status(self) -> admin_pb2.GetStatusResponse:
        return await self.stub.GetStatus(admin_pb2.GetStatusRequest())


@asynccontextmanager
async def cluster(tmp_path, num_ranks=2, **config):
    servers, workers, endpoints = [], [CountingWorker(rank) for rank in range(num_ranks)], []
    for worker in workers:
        server = grpc.aio.server()
        worker_pb2_grpc.add_WorkerServicer_to_server(worker, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        servers.append(server)
        endpoints.append(engine_pb2.WorkerEndpoint(address=f"127.0.0.1:{port}", device="cpu"))
    it = Cluster(tmp_path, workers, endpoints)
    defaults = {
        "address": it.address, "model": "counting", "vocab_size": 1000, "max_model_len": 64, "block_size": 4,
        "max_num_seqs": 8, "max_num_batched_tokens": 32, "max_num_waiting": 300, "num_inflight_steps": 3,
    }  # fmt: skip
    engine = Engine(engine_pb2.EngineConfig(**(defaults | config)))
    server = grpc.aio.server()
    engine_pb2_grpc.add_EngineServicer_to_server(EngineService(engine), server)
    server.add_insecure_port(it.address)
    await server.start()
    async with grpc.aio.insecure_channel(it.address) as channel:
        it.stub = engine_pb2_grpc.EngineStub(channel)
        try:
            yield it
        finally:
            await engine.close()
            await server.stop(0)
            for worker_server in servers:
                await worker_server.stop(0)


def run(coroutine):
    asyncio.run(asyncio.wait_for(coroutine, 30))


def test_tokens_come_in_order_once_and_the_blocks_come_back(tmp_path):
    async def scenario():
        async with cluster(tmp_path) as it:
            progress = await it.add_group()
            assert [p.stage for p in progress] == ["weights", "kv cache", "ready"]
            assert progress[0].duration_s == 2.0  # of the slowest rank
            assert progress[-1].num_blocks == NUM_BLOCKS
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
            assert status.groups[0].num_free_blocks == NUM_BLOCKS
            assert status.groups[0].steps.num_steps > 0
            assert status.counters.num_finished == 22
            assert status.num_gateways == 2
            ranks = [[plan.SerializeToString() for plan in worker.plans] for worker in it.workers]
            assert ranks[0] == ranks[1]

    run(scenario())


def test_several_plans_are_sent_before_the_first_result(tmp_path):
    async def scenario():
        async with cluster(tmp_path) as it:
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


def test_a_steady_decode_plan_of_256_sequences_is_small(tmp_path):
    async def scenario():
        async with cluster(
            tmp_path, num_ranks=1, max_num_seqs=256, max_num_batched_tokens=1024, block_size=16, max_model_len=64
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


def test_cancel_and_a_vanished_gateway_free_everything(tmp_path):
    async def scenario():
        async with cluster(tmp_path) as it:
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
            assert status.groups[0].num_free_blocks == NUM_BLOCKS
            assert status.groups[0].num_running == 0

    run(scenario())


def test_a_stop_string_ends_a_request_as_finished(tmp_path):
    async def scenario():
        async with cluster(tmp_path) as it:
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
            assert (await it.status()).groups[0].num_free_blocks == NUM_BLOCKS
            for worker in it.workers:
                worker.hold.set()

    run(scenario())


def test_an_ended_session_leaves_no_task(tmp_path):
    def waiting():
        return [task for task in asyncio.all_tasks() if "next_response" in repr(task.get_coro())]

    async def scenario():
        async with cluster(tmp_path) as it:
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
        (engine_pb2.Submit(handle=7, prompt_token_ids=b"abc"), "prompt_token_ids", "prompt_token_ids"),
        (submit(7, num_prompt=0), "0 tokens", "prompt"),
        (submit(7, num_prompt=64), "64 tokens", "prompt"),
        (submit(7, max_tokens=0), "max_tokens", "max_tokens"),
    ],
)
def test_a_bad_request_fails_alone(tmp_path, bad, words, field):
    async def scenario():
        async with cluster(tmp_path) as it:
            await it.add_group()
            session = await it.session()
            bad.sampling_params.max_tokens = bad.sampling_params.max_tokens or (0 if words == "max_tokens" else 1)
            await session.submit(bad, submit(8))
            await session.read_until_done(2)
            assert session.failures[7].code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
            assert session.failures[7].field == field
            assert words in session.failures[7].message
            assert len(session.tokens[8]) == 8

    run(scenario())


def test_a_full_queue_refuses_with_a_time_to_retry(tmp_path):
    async def scenario():
        async with cluster(tmp_path, max_num_waiting=1) as it:
            await it.add_group()
            session = await it.session()
            await session.submit(submit(1), submit(2))
            await session.read_until_done(2)
            assert session.failures[2].code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
            assert session.failures[2].retry_after_s > 0
            assert len(session.tokens[1]) == 8

    run(scenario())


def test_what_a_group_preempts_goes_on_in_an_idle_one(tmp_path):
    async def scenario():
        async with cluster(tmp_path, max_num_seqs=2, max_model_len=32) as it:
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


def test_a_failing_rank_ends_every_request_with_one_clear_error(tmp_path):
    async def scenario():
        async with cluster(tmp_path) as it:
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


def lose_a_token(result):
    result.token_ids = result.token_ids[:-4]


def skip_a_step(result):
    result.step_id += 1


def come_from_another_life(result):
    result.epoch += 1


def score_an_unknown_chunk(result):
    result.prompt_logprobs.add(chunk=9)


@pytest.mark.parametrize("spoil", [lose_a_token, skip_a_step, come_from_another_life, score_an_unknown_chunk])
def test_a_result_that_cannot_be_right_fails_the_group_and_hangs_nobody(tmp_path, spoil):
    async def scenario():
        async with cluster(tmp_path) as it:
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


def test_a_step_that_cannot_be_made_fails_the_group(tmp_path, monkeypatch):
    def encode(plan, epoch):
        raise OverflowError("slot 65536 does not fit")

    monkeypatch.setattr(group_runner, "encode_plan", encode)

    async def scenario():
        async with cluster(tmp_path) as it:
            await it.add_group()
            session = await it.session()
            await session.submit(submit(1))
            await session.read_until_done(1)
            assert session.failures[1].code == grpc.StatusCode.UNAVAILABLE.value[0]
            failure = (await it.status()).groups[0].failure
            assert failure == "its next step could not be made: slot 65536 does not fit"

    run(scenario())


def test_a_failed_group_is_left_alone_and_the_other_goes_on(tmp_path, caplog):
    async def scenario():
        async with cluster(tmp_path) as it:
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


def test_a_group_without_room_for_the_longest_request_is_refused(tmp_path):
    async def scenario():
        async with cluster(tmp_path) as it:
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


def test_a_group_that_cannot_start_says_why(tmp_path):
    async def scenario():
        async with cluster(tmp_path) as it:
            with pytest.raises(grpc.aio.AioRpcError, match=r"rank \d: tensor w is missing"):
                await it.add_group("broken")
            assert not (await it.status()).groups
            await it.add_group()  # and may be tried again

    run(scenario())
