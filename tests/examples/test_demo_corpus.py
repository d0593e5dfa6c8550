"""The demo model's training text: the same each time, right, and free of the sums it is tested on."""

import re
from itertools import pairwise

import pytest

NUM_DOCUMENTS = 20_000
# Families whose texts hold numbers side by side that nobody adds.
LISTS_OF_NUMBERS = {"sort", "count", "reverse", "comparison", "product"}


@pytest.fixture(scope="module")
def documents(script):
    return list(script("corpus").Corpus(seed=0).shard(0, NUM_DOCUMENTS))


def test_a_shard_is_the_same_each_time_and_differs_from_others(script, documents):
    corpus = script("corpus").Corpus(seed=0)
    assert list(corpus.shard(0, 200)) == documents[:200]
    assert list(corpus.shard(1, 200)) != documents[:200]
    assert list(script("corpus").Corpus(seed=1).shard(0, 200)) != documents[:200]


def test_every_family_occurs(script, documents):
    assert {family for document in documents for family in document.families} == set(script("corpus").FAMILIES)


def test_about_one_pair_in_ten_is_held_out_in_both_orders(script):
    pairs = set(script("arithmetic").held_out_pairs())
    assert 600 < len(pairs) < 1000
    assert {(b, a) for a, b in pairs} == pairs


def test_held_out_sums_never_occur_in_any_phrasing(script, documents):
    is_held_out = script("arithmetic").is_held_out
    num_pairs = 0
    for document in documents:
        if LISTS_OF_NUMBERS & set(document.families):
            continue
        for segment in re.split(r"<\|\w+\|>|\n", document.text):
            numbers = [int(number) for number in re.findall(r"\d+", segment)]
            num_pairs += len(numbers) // 2
            assert not any(is_held_out(a, b) for a, b in pairwise(numbers[:2])), segment
    assert num_pairs > 10_000


def test_no_addition_of_a_held_out_pair_hides_in_another_family(script, documents):
    is_held_out = script("arithmetic").is_held_out
    addition = re.compile(r"(?<!\d)(\d+)(?: ?\+ ?| plus | and | to )(\d+)(?!\d)")
    for document in documents:
        if "count" in document.families:  # "Count from 12 to 20" adds nothing
            continue
        for a, b in addition.findall(document.text):
            assert not is_held_out(int(a), int(b)), document.text


def test_every_sum_and_difference_in_the_text_is_right(documents):
    equation = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)\.")
    found = [match for document in documents for match in equation.findall(document.text)]
    assert len(found) > 10_000
    for a, sign, b, result in found:
        assert int(result) == (int(a) + int(b) if sign == "+" else int(a) - int(b))


def test_no_template_is_left_unfilled(documents):
    assert not any("{" in document.text or "}" in document.text for document in documents)
