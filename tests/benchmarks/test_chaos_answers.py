"""Answers are compared token by token, and what differs is named: missing, repeated, wrong, or beside the tokens."""

import pytest
from octavo.benchmarks.chaos.answers import Answer, Difference, Output, compare_tokens, differences
from octavo.benchmarks.chaos.requests import LONGEST, NUM_KINDS, make_requests
from octavo.proto import generation_pb2

STOP, LENGTH = generation_pb2.FINISH_REASON_STOP, generation_pb2.FINISH_REASON_LENGTH
EXPECTED = [5, 3, 8, 1, 9, 2, 7, 4, 6, 11, 13, 12]


@pytest.mark.parametrize(
    ("found", "kind", "position", "count"),
    [
        (EXPECTED[:7], "missing", 7, 5),
        ([], "missing", 0, 12),
        (EXPECTED[1:], "missing", 0, 1),
        (EXPECTED[:4] + EXPECTED[6:], "missing", 4, 2),
        (EXPECTED[:4] + EXPECTED[3:], "repeated", 4, 1),
        (EXPECTED[:9] + EXPECTED[5:], "repeated", 9, 4),
        (EXPECTED + EXPECTED[-2:], "repeated", 12, 2),
        ([*EXPECTED, 99], "wrong", 12, 1),
        ([*EXPECTED[:4], 99, *EXPECTED[5:]], "wrong", 4, 1),
        ([*EXPECTED[:4], 90, 91, 92, 93, 94, 95, 96, 97], "wrong", 4, 8),
    ],
)
def test_how_tokens_differ(found, kind, position, count):
    assert compare_tokens(2, EXPECTED, found) == Difference(kind, 2, position, count)


def test_equal_tokens_do_not_differ():
    assert compare_tokens(0, EXPECTED, list(EXPECTED)) is None
    assert compare_tokens(0, [], []) is None


def answer(**changes) -> Answer:
    fields = {"token_ids": [1, 2], "text": "ab", "ending": LENGTH, "logprobs": [-0.5, -1.0]} | changes
    return Answer({0: Output(**fields)}, [0.0, -2.0])


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"token_ids": [1]}, "missing"),
        ({"text": "ac"}, "text"),
        ({"ending": STOP}, "ending"),
        ({"ending": 0}, "ending"),
        ({"logprobs": [-0.5, -1.1]}, "logprobs"),
        ({"logprobs": [-0.5]}, "logprobs"),
    ],
)
def test_text_endings_and_logprobs_are_compared(changes, kind):
    assert [difference.kind for difference in differences(answer(), answer(**changes))] == [kind]


def test_logprobs_may_differ_by_rounding():
    assert differences(answer(), answer(logprobs=[-0.5004, -1.0])) == []


def test_outputs_that_did_not_come_or_should_not_have_are_differences():
    assert differences(answer(), Answer(prompt_logprobs=[0.0, -2.0])) == [Difference("missing", 0, 0, 2)]
    assert differences(Answer(prompt_logprobs=[0.0, -2.0]), answer()) == [Difference("wrong", 0, 0, 2)]
    more = Answer(answer().outputs, [0.0, -3.0])
    assert [difference.kind for difference in differences(answer(), more)] == ["logprobs"]


def test_an_answer_is_put_together_and_the_first_token_that_parts_is_seen_at_once():
    def piece(*token_ids, **fields):
        return generation_pb2.SequenceOutput(token_ids=token_ids, **fields)

    expected = Answer({0: Output([1, 2, 3]), 1: Output([7, 8])})
    found = Answer()
    pieces = [piece(1, 2, text="a"), piece(7, index=1), piece(9, text="b", finish_reason=LENGTH)]
    seen = []
    for one in pieces:
        assert found.take(generation_pb2.GenerateResponse(outputs=[one])) == len(one.token_ids)
        seen.append(found.goes_like(expected, one))
    assert seen == [True, True, False]
    assert found.outputs == {0: Output([1, 2, 9], "ab", LENGTH), 1: Output([7])}
    assert found.num_tokens == 4


def test_requests_are_of_every_kind_and_come_again_with_their_seed():
    requests = make_requests(64, vocab_size=100, seed=3)
    assert requests == make_requests(64, 100, 3)
    assert requests != make_requests(64, 100, 4)
    sampling = [request.sampling_params for request in requests]
    kinds = {
        (p.temperature, p.n, p.num_beams, tuple(p.stop), p.presence_penalty, p.HasField("logprobs"))
        for p in sampling[:NUM_KINDS]
    }
    assert len(kinds) == NUM_KINDS
    assert all(p.HasField("seed") or p.num_beams for p in sampling)
    lengths = [len(request.token_ids.ids) for request in requests]
    assert sum(length >= 300 for length in lengths) == 16
    assert max(length + p.max_tokens for length, p in zip(lengths, sampling, strict=True)) <= LONGEST
