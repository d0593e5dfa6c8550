"""The same seed asks for the same work; options that make no sense are refused by name."""

import math

import pytest
from octavo.benchmarks.workload import LengthRange, Workload, poisson_arrivals
from octavo.errors import InvalidArgumentError


def test_prompts_are_the_same_for_the_same_seed():
    workload = Workload(20, LengthRange(16, 127), output_len=64, seed=3)
    assert workload.prompts(4096) == workload.prompts(4096)
    assert workload.prompts(4096) != Workload(20, LengthRange(16, 127), 64, seed=4).prompts(4096)


def test_prompts_keep_lengths_and_vocabulary():
    prompts = Workload(500, LengthRange(3, 5), output_len=1).prompts(vocab_size=7)
    assert {len(prompt) for prompt in prompts} == {3, 4, 5}
    assert {token_id for prompt in prompts for token_id in prompt} == set(range(7))


def test_a_shared_part_begins_all_prompts_of_a_repeat_and_no_others():
    workload = Workload(20, LengthRange(40, 60), output_len=1, seed=3, shared_len=32)
    repeats = [workload.prompts(4096, repeat) for repeat in range(3)]
    beginnings = [{tuple(prompt[:32]) for prompt in prompts} for prompts in repeats]
    assert [len(one) for one in beginnings] == [1, 1, 1]
    assert len(set.union(*beginnings)) == 3
    assert len({tuple(prompt[32:40]) for prompts in repeats for prompt in prompts}) == 60


def test_repeats_have_the_same_lengths_and_other_tokens():
    workload = Workload(20, LengthRange(16, 127), output_len=64, seed=3)
    first, second = workload.prompts(4096), workload.prompts(4096, repeat=1)
    assert [*map(len, first)] == [*map(len, second)]
    assert not any(one[:8] == other[:8] for one in first for other in second)
    assert second == workload.prompts(4096, repeat=1)


@pytest.mark.parametrize("text", ["128", "16:127"])
def test_length_ranges_read_back(text):
    assert str(LengthRange.parse(text, "input_len")) == text


@pytest.mark.parametrize("text", ["", "0", "-1", "9:3", "1:2:3", "a", "1.5", "8:"])
def test_bad_length_ranges_name_the_option(text):
    with pytest.raises(InvalidArgumentError, match="input_len"):
        LengthRange.parse(text, "input_len")


def test_counts_must_be_positive():
    with pytest.raises(InvalidArgumentError, match="num_prompts must be at least 1, got 0"):
        Workload(0, LengthRange(1, 1), 1)
    with pytest.raises(InvalidArgumentError, match="output_len must be at least 1, got -2"):
        Workload(1, LengthRange(1, 1), -2)


def test_arrivals_come_at_the_rate_asked_for():
    arrivals = poisson_arrivals(20_000, requests_per_s=4.0, seed=1)
    assert arrivals == sorted(arrivals)
    assert arrivals == poisson_arrivals(20_000, 4.0, seed=1)
    assert 20_000 / arrivals[-1] == pytest.approx(4.0, rel=0.03)  # four standard deviations of the mean gap


def test_an_infinite_rate_sends_all_at_once():
    assert poisson_arrivals(3, math.inf, seed=1) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(InvalidArgumentError, match="request_rate"):
        poisson_arrivals(3, rate, seed=1)
