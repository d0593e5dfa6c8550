"""SamplingParams: vLLM's defaults, refusals by name, and the same bounds as the server."""

import math

import pytest
from octavo.errors import InvalidArgumentError
from octavo.gateway.samples import check_samples
from octavo.gateway.sampling import ModelLimits, SamplingRequest, resolve_sampling
from octavo.launch.sampling_params import SamplingParams

_LIMITS = ModelLimits(max_model_len=2**31, vocab_size=100, eos_token_ids=frozenset(), text=None)


def check_as_the_server(**fields):
    request = SamplingRequest(**fields)
    check_samples(request, _LIMITS.vocab_size)
    resolve_sampling(request, 1, _LIMITS, lambda: 0)


def is_refused(make):
    try:
        make()
    except InvalidArgumentError as error:
        return error.field
    return None


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, 0.0, 100.0, 100.1, math.nan, math.inf]),
        ("top_p", [0.0, 0.1, 1.0, 1.1]),
        ("top_k", [-2, -1, 0, 5]),
        ("min_p", [-0.1, 0.0, 1.0, 1.1]),
        ("presence_penalty", [-2.1, -2.0, 2.0, 2.1]),
        ("frequency_penalty", [-2.1, -2.0, 2.0, 2.1]),
        ("repetition_penalty", [0.0, 0.1, 2.0, 2.1]),
        ("seed", [-(2**63) - 1, -(2**63), 2**63 - 1, 2**63]),
        ("max_tokens", [0, 1]),
        ("min_tokens", [-1, 0, 1]),
        ("logprobs", [-1, 0, 20, 21]),
        ("prompt_logprobs", [-1, 0, 20, 21]),
        ("n", [0, 1, 2, 128, 129]),
        ("best_of", [0, 1, 2, 128, 129]),
    ],
)
def test_the_bounds_are_the_servers(name, values):
    for value in values:
        ours = is_refused(lambda value=value: SamplingParams(**{name: value}))
        servers = is_refused(lambda value=value: check_as_the_server(**{name: value}))
        assert ours == servers, value
        assert ours in (None, name)


@pytest.mark.parametrize(
    ("field", "value"),
    [("n", 2.0), ("best_of", "2"), ("top_k", 1.5), ("max_tokens", "9"), ("seed", True)],
)
def test_what_is_no_number_is_refused_by_name(field, value):
    with pytest.raises(InvalidArgumentError, match=field) as refusal:
        SamplingParams(**{field: value})
    assert refusal.value.field == field


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("best_of", {"n": 3, "best_of": 2}),
        ("n", {"n": 2, "temperature": 0}),
        ("best_of", {"best_of": 2, "temperature": 0}),
        ("n", {"n": 2, "best_of": 2, "temperature": 1e-6}),
    ],
)
def test_samples_that_make_no_sense_are_refused_as_by_the_server(name, fields):
    assert is_refused(lambda: SamplingParams(**fields)) == name
    assert is_refused(lambda: check_as_the_server(**fields)) == name


def test_min_tokens_over_max_tokens_is_refused():
    with pytest.raises(InvalidArgumentError, match="min_tokens"):
        SamplingParams(min_tokens=17)


def test_the_defaults_are_vllms():
    proto = SamplingParams().to_proto()
    assert proto.max_tokens == 16
    assert (proto.temperature, proto.top_p, proto.top_k, proto.repetition_penalty) == (1.0, 1.0, 0, 1.0)
    assert proto.skip_special_tokens
    assert not proto.HasField("seed")
    assert not proto.HasField("logprobs")


def test_no_max_tokens_is_up_to_the_context():
    assert not SamplingParams(max_tokens=None).to_proto().HasField("max_tokens")


def test_every_field_reaches_the_wire():
    proto = SamplingParams(
        n=2,
        best_of=5,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        repetition_penalty=1.5,
        temperature=0.75,
        top_p=0.5,
        top_k=3,
        min_p=0.125,
        seed=7,
        stop="end",
        stop_token_ids=[4],
        bad_words=["bad"],
        ignore_eos=True,
        max_tokens=9,
        min_tokens=2,
        logprobs=1,
        prompt_logprobs=0,
        logit_bias={5: 1.5},
        include_stop_str_in_output=True,
        skip_special_tokens=False,
    ).to_proto()
    assert (proto.n, proto.best_of) == (2, 5)
    assert (proto.presence_penalty, proto.frequency_penalty, proto.repetition_penalty) == (0.5, 0.25, 1.5)
    assert (proto.temperature, proto.top_p, proto.top_k, proto.min_p, proto.seed) == (0.75, 0.5, 3, 0.125, 7)
    assert (list(proto.stop), list(proto.stop_token_ids), list(proto.bad_words)) == (["end"], [4], ["bad"])
    assert (proto.ignore_eos, proto.max_tokens, proto.min_tokens) == (True, 9, 2)
    assert (proto.logprobs, proto.HasField("prompt_logprobs"), dict(proto.logit_bias)) == (1, True, {5: 1.5})
    assert (proto.include_stop_str_in_output, proto.skip_special_tokens) == (True, False)


def test_a_value_that_the_wire_does_not_take_is_refused():
    with pytest.raises(InvalidArgumentError, match="sampling parameters"):
        SamplingParams(stop_token_ids=[2**40]).to_proto()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop", ["a", 3]),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", 3),
        ("bad_words", "word"),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", {1: "a"}),
    ],
)
def test_a_wrong_item_is_refused_by_name(name, value):
    with pytest.raises(InvalidArgumentError) as refusal:
        SamplingParams(**{name: value})
    assert refusal.value.field == name
