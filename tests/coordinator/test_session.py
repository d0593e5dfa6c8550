"""What waits for a gateway that reads slowly is one message, whatever the number of steps behind it."""

import asyncio

import numpy as np
from octavo.coordinator.core.sequence import FinishReason, RequestKey
from octavo.coordinator.core.step_outcome import SampledToken
from octavo.coordinator.shell.session import Session
from octavo.errors import InvalidArgumentError
from octavo.proto import sampling_pb2


def table(*token_ids):
    num_rows = len(token_ids)
    return sampling_pb2.LogprobTable(
        num_columns=1,
        token_ids=np.array(token_ids, "<i4").tobytes(),
        logprobs=np.zeros(num_rows, "<f4").tobytes(),
        ranks=np.ones(num_rows, "<i4").tobytes(),
    )


def sampled(handle, token_id, finish_reason=None):
    return SampledToken(RequestKey(1, handle), token_id, finish_reason, row=0, num_cached_tokens=0)


def take(session):
    return asyncio.run(asyncio.wait_for(session.next_response(), 10))


def ints(data, dtype="<i4"):
    return np.frombuffer(data, dtype).tolist()


def test_steps_that_nobody_read_are_one_message():
    session = Session(1)
    for step in range(1000):
        session.add_token(sampled(7, step, FinishReason.LENGTH if step == 999 else None), None)
        if step % 2:
            session.add_token(sampled(8, -step), table(-step))
        session.flush()
    session.add_failure(9, InvalidArgumentError("too long", field="prompt"))
    session.flush()
    message = take(session)
    assert (ints(message.handles, "<u4"), ints(message.num_tokens, "<u4")) == ([7, 8], [1000, 500])
    assert ints(message.token_ids) == [*range(1000), *range(-1, -1000, -2)]
    assert list(message.finish_reasons) == [FinishReason.LENGTH.value, 0]
    [entry] = message.logprobs
    assert (entry.entry, entry.table) == (1, table(*range(-1, -1000, -2)))
    assert (message.failures[0].handle, message.failures[0].field) == (9, "prompt")


def test_a_message_has_only_news():
    session = Session(1)
    session.add_token(sampled(7, 1), None)
    session.flush()
    assert ints(take(session).token_ids) == [1]
    session.add_token(sampled(8, 2), None)
    session.flush()
    message = take(session)
    assert (ints(message.handles, "<u4"), ints(message.token_ids)) == ([8], [2])


def test_prompt_logprobs_come_in_messages_of_bounded_size_and_before_the_tokens():
    session = Session(1)
    for start in range(1, 101):
        session.add_prompt_logprobs(7, start, table(start))
    session.add_token(sampled(7, 5), None)
    session.flush()
    messages = [take(session)]
    while not messages[-1].handles:
        messages.append(take(session))
    assert [chunk.start for message in messages for chunk in message.prompt_logprobs] == [*range(1, 101)]
    assert max(len(message.prompt_logprobs) for message in messages) < 20


def test_the_end_of_a_session_ends_its_messages():
    session = Session(1)
    session.end()
    assert take(session) is None
