"""The load finds what a server does wrong: a canned gateway drops, repeats and changes tokens, fails and refuses."""

import asyncio
import time

import grpc
import pytest
from octavo.benchmarks.chaos.answers import Answer, Output
from octavo.benchmarks.chaos.faulty_rank import FaultyContext
from octavo.benchmarks.chaos.load import Exchange, Load
from octavo.benchmarks.chaos.orders import DROP_REPLY, RAISE, REPEAT_REPLY, Orders
from octavo.errors import InternalError, UnavailableError
from octavo.gateway.grpc_service import abort
from octavo.proto import generation_pb2, generation_pb2_grpc, worker_pb2

TOKENS = list(range(20, 60))
LENGTH = generation_pb2.FINISH_REASON_LENGTH
EXCHANGE = Exchange(4, generation_pb2.GenerateRequest(), Answer({0: Output(TOKENS, "", LENGTH)}))


class Gateway(generation_pb2_grpc.GenerationServicer):
    """Answers the n-th request as `behave(n)` says: tokens, and an error in the place of the end perhaps."""

    def __init__(self, behave) -> None:
        self.num_requests, self._behave = 0, behave

    async def Generate(self, request, context):
        self.num_requests += 1
        tokens, error = self._behave(self.num_requests)
        for position, token in enumerate(tokens):
            is_last = error is None and position == len(tokens) - 1
            output = generation_pb2.SequenceOutput(token_ids=[token], finish_reason=LENGTH if is_last else 0)
            await context.write(generation_pb2.GenerateResponse(outputs=[output]))
            await asyncio.sleep(0)
        if isinstance(error, grpc.StatusCode):  # gRPC's own, without details
            await context.abort(error, error.name)
        elif error is not None:
            await abort(context, error)


async def run_load(tmp_path, behave, num_finished, end=None):
    """The tally of a load of one stream after so many requests."""
    server, gateway = grpc.aio.server(), Gateway(behave)
    generation_pb2_grpc.add_GenerationServicer_to_server(gateway, server)
    address = f"unix:{tmp_path}/gateway.sock"
    server.add_insecure_port(address)
    await server.start()
    load = Load(address, [EXCHANGE], num_streams=1, seed=0)
    try:
        load.start()
        async with asyncio.timeout(20):
            while load.tally.num_finished < num_finished:
                load.check()
                await asyncio.sleep(0.01)
            await (end(load, server) if end else load.pause())
    finally:
        await load.cancel()
        await server.stop(0)
    return load


def tally_of(tmp_path, behave, num_finished=3, end=None):
    return asyncio.run(run_load(tmp_path, behave, num_finished, end)).tally


def test_a_server_that_does_well_is_found_so(tmp_path):
    tally = tally_of(tmp_path, lambda number: (TOKENS, None))
    assert tally.num_tokens == tally.num_finished * len(TOKENS)
    assert (tally.lost, tally.mismatches, tally.num_refused) == ([], [], 0)


@pytest.mark.parametrize(
    ("tokens", "kind", "position"),
    [
        (TOKENS[:7] + TOKENS[8:], "missing", 7),
        (TOKENS[:7] + TOKENS[6:], "repeated", 7),
        ([*TOKENS[:7], 0, *TOKENS[8:]], "wrong", 7),
    ],
)
def test_one_token_that_is_lost_repeated_or_wrong_is_found(tmp_path, tokens, kind, position):
    tally = tally_of(tmp_path, lambda number: (tokens if number == 2 else TOKENS, None))
    [mismatch] = tally.mismatches
    assert (mismatch.difference.kind, mismatch.difference.position, mismatch.difference.count) == (kind, position, 1)
    assert mismatch.exchange == EXCHANGE.index
    assert tally.num_of(kind) == 1


def test_a_request_that_breaks_off_is_lost_and_one_that_is_refused_is_asked_again(tmp_path):
    behaviours = {
        1: ([], UnavailableError("no room")),
        2: (TOKENS[:5], UnavailableError("gone")),
        3: ([], InternalError("a fault")),
    }
    tally = tally_of(tmp_path, lambda number: behaviours.get(number, (TOKENS, None)), num_finished=1)
    assert tally.num_refused == 1
    first, second = tally.lost
    assert first.startswith("request 4, after 5 of 40 tokens, at ")
    assert first.endswith(" s: UNAVAILABLE: gone")
    assert second.startswith("request 4, after 0 of 40 tokens, at ")
    assert " s: INTERNAL: " in second


def test_what_ends_late_without_a_token_was_accepted_and_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr("octavo.benchmarks.chaos.load._REFUSAL_S", 0.0)
    tally = tally_of(tmp_path, lambda number: ([], UnavailableError("gone")) if number == 1 else (TOKENS, None))
    assert (tally.num_refused, len(tally.lost)) == (0, 1)


def test_connections_break_with_a_gateway_that_was_killed_and_are_losses_otherwise(tmp_path):
    async def kill(load, server):
        while load.tally.num_tokens <= len(TOKENS):  # the endless one was accepted: before its first it is refused
            await asyncio.sleep(0.01)
        await server.stop(0)
        await asyncio.sleep(0.3)

    async def kill_gateway(load, server):
        load.note_gateway_kill()
        await kill(load, server)

    def endless(number):
        return TOKENS * (1 if number == 1 else 10_000), None

    assert tally_of(tmp_path, endless, 1, kill_gateway).num_broken_by_gateways >= 1
    tally = tally_of(tmp_path, endless, 1, kill)
    assert tally.num_broken_by_gateways == 0
    assert len(tally.lost) == 1


def test_streams_that_are_refused_while_the_server_drains_end(tmp_path):
    async def drain(load, server):
        load.end_when_refused()
        await load.wait_until_ended()

    def behave(number):
        return (TOKENS, None) if number < 4 else ([], UnavailableError("shutting down"))

    tally = tally_of(tmp_path, behave, 3, drain)
    assert tally.num_refused_at_end >= 1
    assert tally.lost == []


@pytest.mark.parametrize("is_ending", [True, False])
def test_a_call_that_meets_the_end_of_the_door_was_not_accepted(tmp_path, is_ending):
    """As grpc ends what comes while a server stops; while none stops it is a loss."""

    cancels = []

    async def cancelled(load, server):
        if is_ending:
            load.end_when_refused()
        cancels.append(True)
        while not (load.tally.lost or load.tally.num_refused_at_end):
            await asyncio.sleep(0.01)

    def behave(number):
        return ([], grpc.StatusCode.CANCELLED) if cancels else (TOKENS, None)

    tally = tally_of(tmp_path, behave, 2, cancelled)
    assert (tally.num_refused_at_end > 0) == is_ending
    assert bool(tally.lost) != is_ending


def test_the_longest_wait_for_a_token_counts_from_the_fault():
    load = Load("unix:/nowhere", [EXCHANGE], 1, 0)
    now = time.monotonic()
    load._token_at[0] = now - 4.0
    assert load.longest_gap_s(now - 3.0, now) == pytest.approx(3.0)
    assert load.longest_gap_s(now - 10.0, now) == pytest.approx(4.0)
    assert not load.goes_on(now - 2.0)
    load._note_token(0)
    assert load.goes_on(now - 2.0)
    assert load.longest_gap_s(now - 3.0, now) == pytest.approx(3.0, abs=0.1)
    load._token_at.clear()
    assert load.longest_gap_s(now + 1.0, now + 2.0) == 0.0


class Call:
    """What the coordinator hears of a `Steps` call."""

    def __init__(self) -> None:
        self.written: list[int] = []

    async def write(self, answer) -> None:
        self.written.append(answer.step_id)

    def peer(self) -> str:
        return "a coordinator"


def test_a_rank_loses_or_doubles_one_answer_on_order_and_no_failure(tmp_path):
    orders, call = Orders(tmp_path, 17), Call()
    context = FaultyContext(call, orders)

    async def write(*step_ids, **fields):
        for step_id in step_ids:
            await context.write(worker_pb2.StepResult(step_id=step_id, **fields))

    async def steps():
        await write(1, 2)
        orders.give(DROP_REPLY)
        await write(3, failure="it says why")
        assert orders.is_given
        await write(4, 5)
        orders.give(REPEAT_REPLY)
        await write(6, 7)
        orders.give(RAISE)  # another's to obey
        await write(8)

    asyncio.run(steps())
    assert call.written == [1, 2, 3, 5, 6, 6, 7, 8]
    assert orders.take(RAISE) == RAISE
    assert orders.take(RAISE) is None
    assert context.peer() == "a coordinator"


def test_an_order_that_another_thread_takes_at_the_same_time_is_no_error(tmp_path, monkeypatch):
    orders = Orders(tmp_path, 17)
    monkeypatch.setattr("pathlib.Path.exists", lambda path: True)
    assert orders.take(RAISE) is None
