"""BeamSearchParams, and what a beam search returns."""

import math

import pytest
from octavo import BeamSearchParams
from octavo.errors import InvalidArgumentError
from octavo.gateway.samples import check_samples
from octavo.gateway.sampling import SamplingRequest
from octavo.launch.beam_search import add_text, beam_search_output
from octavo.launch.outputs import RequestOutput
from octavo.proto import generation_pb2


def test_every_field_reaches_the_wire():
    proto = BeamSearchParams(
        beam_width=4,
        max_tokens=9,
        ignore_eos=True,
        length_penalty=0.5,
        early_stopping="never",
        n=2,
        stop_token_ids=[7],
        skip_special_tokens=False,
    ).to_proto()
    assert (proto.num_beams, proto.n, proto.max_tokens, proto.ignore_eos) == (4, 2, 9, True)
    assert (proto.length_penalty, proto.early_stopping) == (0.5, generation_pb2.EARLY_STOPPING_NEVER)
    assert (list(proto.stop_token_ids), proto.skip_special_tokens) == ([7], False)


def test_by_default_all_beams_come_and_the_server_takes_them():
    proto = BeamSearchParams(beam_width=4, max_tokens=None).to_proto()
    assert (proto.n, proto.early_stopping) == (4, generation_pb2.EARLY_STOPPING_HEURISTIC)
    assert not proto.HasField("max_tokens")
    check_samples(SamplingRequest(**{field.name: value for field, value in proto.ListFields()}), 100)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("beam_width", {"beam_width": 1}),
        ("beam_width", {"beam_width": 65}),
        ("beam_width", {"beam_width": 2.0}),
        ("beam_width", {"n": 5}),
        ("n", {"n": 0}),
        ("max_tokens", {"max_tokens": 0}),
        ("temperature", {"temperature": 0.5}),
        ("length_penalty", {"length_penalty": math.nan}),
        ("length_penalty", {"length_penalty": 11}),
        ("early_stopping", {"early_stopping": "sometimes"}),
        ("early_stopping", {"early_stopping": 1}),
        ("stop_token_ids", {"stop_token_ids": ["a"]}),
    ],
)
def test_a_wrong_field_is_refused_by_name(name, fields):
    with pytest.raises(InvalidArgumentError, match=name) as refusal:
        BeamSearchParams(**{"beam_width": 4, "max_tokens": 5, **fields})
    assert refusal.value.field == name


def test_a_value_that_the_wire_does_not_take_is_refused():
    with pytest.raises(InvalidArgumentError, match="beam search parameters"):
        BeamSearchParams(2, stop_token_ids=[2**40]).to_proto()


def test_the_outputs_are_vllms(samples):
    [response] = samples("abcd", "e", scores=[-0.5, -1])
    output = beam_search_output(RequestOutput.of(response, None), BeamSearchParams(2, length_penalty=2.0))
    add_text([output], lambda several: ["".join(map(chr, token_ids)) for token_ids in several])
    first, second = output.sequences
    assert (first.tokens, first.text) == (list(b"Hiabcd"), "Hiabcd")  # with the prompt
    assert (first.score, first.cum_logprob) == (-0.5, -0.5 * 4**2)
    assert (second.cum_logprob, second.finish_reason) == (-1, "stop")
