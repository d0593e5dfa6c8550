"""The whole sampler against an oracle that takes one row at a time: every parameter, any batch, any number of ranks."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from octavo.errors import InvalidArgumentError
from octavo.proto import sampling_pb2
from octavo.workers.parallel import TensorParallel
from octavo.workers.sampler.batch import build_batch
from octavo.workers.sampler.gumbel import gumbel_noise
from octavo.workers.sampler.sampler import Context, Sampled, sample
from octavo.workers.sampler.table import MAX_CANDIDATES, MAX_LOGPROBS, SamplingTable
from octavo.workers.sampler.vocab import VocabSlice

CPU = torch.device("cpu")
VOCAB_SIZE = 23


def make_params(**fields) -> sampling_pb2.SamplingParams:
    """Everything off but what is given."""
    return sampling_pb2.SamplingParams(
        **({"top_p": 1.0, "repetition_penalty": 1.0, "max_tokens": 9, "seed": 1} | fields)
    )


def pack(values, dtype="<i4") -> bytes:
    return np.asarray(values, dtype=dtype).tobytes()


@dataclass(slots=True)
class Row:
    """One sequence about to sample."""

    logits: np.ndarray  # [VOCAB_SIZE] float32
    params: sampling_pb2.SamplingParams = field(default_factory=make_params)
    prompt: list[int] = field(default_factory=lambda: [1, 2, 3])
    output: list[int] = field(default_factory=list)


def random_logits(seed: int, scale: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, VOCAB_SIZE).astype(np.float32)


def sample_rows(run_ranks, rows: list[Row], size: int = 1) -> Sampled:
    """Rows in slots of their own, in reverse order; asserts that the ranks agree."""
    slots = np.arange(len(rows))[::-1].copy()
    lengths = np.array([len(row.prompt) + len(row.output) for row in rows])
    token_table = torch.full((len(rows), int(lengths.max()) + 2), 7, dtype=torch.int32)
    table = SamplingTable(len(rows))
    for slot, row in zip(slots, rows, strict=True):
        known = row.prompt + row.output
        token_table[slot, : len(known)] = torch.tensor(known)
        table.join(int(slot), row.params, VOCAB_SIZE)
    width = -(-VOCAB_SIZE // size)
    padded = np.full((len(rows), width * size), -np.inf, dtype=np.float32)
    padded[:, :VOCAB_SIZE] = [row.logits for row in rows]

    def run(tp):
        vocab = VocabSlice(tp, tp.rank * width, width, VOCAB_SIZE)
        batch = build_batch(table, slots, np.array([len(row.prompt) for row in rows]), vocab)
        context = Context(token_table, torch.tensor(lengths), int(lengths.max()))
        return sample(torch.tensor(padded[:, vocab.start : vocab.start + width]), batch, context, vocab)

    ranks = run_ranks(size, run)
    assert all(torch.equal(rank.token_ids, ranks[0].token_ids) for rank in ranks)
    return ranks[0]


def sampled_tokens(run_ranks, rows: list[Row], size: int = 1) -> list[int]:
    return sample_rows(run_ranks, rows, size).token_ids.tolist()


def oracle_scores(row: Row) -> np.ndarray:
    """[VOCAB_SIZE] float64, whose argmax is to be sampled: the documented order, step by step."""
    params, scores = row.params, row.logits.astype(np.float64)
    known = row.prompt + row.output
    biases = zip(
        np.frombuffer(params.logit_bias_token_ids, "<i4"), np.frombuffer(params.logit_bias_values, "<f4"), strict=True
    )
    for token_id, value in biases:
        scores[token_id] += value
    for word in (np.frombuffer(packed, "<i4").tolist() for packed in params.bad_words):
        if known[len(known) - len(word) + 1 :] == word[:-1] and len(known) >= len(word) - 1:
            scores[word[-1]] = -np.inf
    if len(row.output) < params.min_tokens:
        scores[np.frombuffer(params.stop_token_ids + params.masked_token_ids, "<i4")] = -np.inf
    for token_id in range(VOCAB_SIZE):
        if token_id in known:
            repetition = params.repetition_penalty
            scores[token_id] = scores[token_id] / repetition if scores[token_id] > 0 else scores[token_id] * repetition
        count = row.output.count(token_id)
        scores[token_id] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
    if params.temperature < 1e-5:
        return scores
    scores = truncated(scores / params.temperature, params)
    seeds = torch.tensor([[params.seed & 0xFFFFFFFF, params.seed >> 32]])
    vocab = VocabSlice(TensorParallel(0, 1, CPU), 0, VOCAB_SIZE, VOCAB_SIZE)
    return scores + gumbel_noise(seeds, torch.tensor([len(known)]), vocab)[0].numpy()


def truncated(scores: np.ndarray, params: sampling_pb2.SamplingParams) -> np.ndarray:
    if params.min_p:
        scores = np.where(scores >= scores.max() + np.log(params.min_p), scores, -np.inf)
    if 0 < params.top_k < VOCAB_SIZE:
        scores = np.where(scores >= np.sort(scores)[-params.top_k], scores, -np.inf)
    if params.top_p < 1:
        mass = np.exp(scores - scores.max())
        descending = np.argsort(-scores, kind="stable")
        last = np.searchsorted(mass[descending].cumsum() / mass.sum(), params.top_p)
        scores = np.where(scores >= scores[descending[last]], scores, -np.inf)
    return scores


TOKENS = st.integers(0, VOCAB_SIZE - 1)
PARAMS = st.builds(
    lambda bias, words, stops, masked, **fields: make_params(
        logit_bias_token_ids=pack(list(bias)),
        logit_bias_values=pack(list(bias.values()), "<f4"),
        bad_words=[pack(word) for word in words],
        stop_token_ids=pack(stops),
        masked_token_ids=pack(masked),
        **fields,
    ),
    bias=st.dictionaries(TOKENS, st.sampled_from([-100.0, -2.5, 4.0, 100.0]), max_size=3),
    words=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), max_size=3),
    stops=st.lists(TOKENS, max_size=4, unique=True),
    masked=st.lists(TOKENS, max_size=2, unique=True),
    min_tokens=st.integers(0, 4),
    temperature=st.sampled_from([0.0, 1e-6, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5, 22, 23, 1000]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    presence_penalty=st.sampled_from([0.0, 1.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.7, -1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.5]),
    seed=st.sampled_from([0, 1, 2**32, 2**64 - 1]),
)
ROWS = st.builds(
    Row,
    logits=st.integers(0, 10_000).map(random_logits),
    params=PARAMS,
    prompt=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    output=st.lists(st.integers(0, 8), max_size=5),
)


@given(rows=st.lists(ROWS, min_size=1, max_size=5), size=st.sampled_from([1, 2, 4]))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_every_row_samples_what_the_oracle_does(run_ranks, rows, size):
    scores = [oracle_scores(row) for row in rows]
    for row_scores in scores:
        best, second = np.sort(row_scores)[:-3:-1]
        # Nearer ties may fall either way in float32.
        assume(best > -np.inf)
        assume(best - second > 1e-4)
    assert sampled_tokens(run_ranks, rows, size) == [int(row_scores.argmax()) for row_scores in scores]


def test_draws_follow_the_softmax_at_the_temperature(run_ranks):
    logits = random_logits(3, scale=1.0)
    rows = [Row(logits, make_params(temperature=0.7, seed=seed)) for seed in range(8000)]
    counts = np.bincount(sampled_tokens(run_ranks, rows, 2), minlength=VOCAB_SIZE)
    weights = np.exp(logits / 0.7)
    expected = weights / weights.sum() * len(rows)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    # 22 degrees of freedom: 48 is exceeded once in a thousand.
    assert chi_square < 48


def test_greedy_takes_the_lowest_of_equals_on_any_rank(run_ranks):
    logits = np.zeros(VOCAB_SIZE, dtype=np.float32)
    logits[[5, 11, 22]] = 2.0
    for size in (1, 2, 4):
        assert sampled_tokens(run_ranks, [Row(logits)], size) == [5]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [1, 4])
def test_broken_logits_spoil_no_other_row_and_give_no_token(run_ranks, value, size):
    whole = make_params(temperature=1.0, top_k=5, top_p=0.9, min_p=0.01, num_logprobs=3)
    fine = [Row(random_logits(1), whole), Row(random_logits(2))]
    broken = np.full(VOCAB_SIZE, value, dtype=np.float32)
    rows = [fine[0], Row(broken, whole), Row(broken), Row(broken, make_params(temperature=0.7)), fine[1]]
    tokens = sampled_tokens(run_ranks, rows, size)
    assert [tokens[0], tokens[-1]] == sampled_tokens(run_ranks, fine)
    assert tokens[1:-1] == [-1] * 3


@pytest.mark.parametrize("size", [1, 4])
def test_a_row_that_is_broken_in_part_gives_one_of_its_other_tokens(run_ranks, size):
    logits = random_logits(5)
    logits[12:] = np.nan
    logits[7] = 50.0
    hot = make_params(temperature=0.7, top_k=2)
    assert sampled_tokens(run_ranks, [Row(logits), Row(logits, hot)], size) == [7, 7]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_logprobs_are_of_the_raw_logits(run_ranks, size):
    counts = [2, None, 0, MAX_LOGPROBS]
    rows = []
    for seed, count in enumerate(counts):
        fields = {} if count is None else {"num_logprobs": count}
        rows.append(Row(random_logits(seed), make_params(temperature=1.5, top_k=3, seed=seed + 40, **fields)))
    result = sample_rows(run_ranks, rows, size)
    wanted = [i for i, count in enumerate(counts) if count is not None]
    for found, i in enumerate(wanted):
        logits = rows[i].logits.astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum())
        token = int(result.token_ids[i])
        best = np.argsort(-logits)[:MAX_LOGPROBS]
        assert result.logprobs.token_ids[found].tolist() == [token, *best.tolist()]
        np.testing.assert_allclose(result.logprobs.logprobs[found], expected[[token, *best]], atol=2e-5)
        assert int(result.logprobs.ranks[found]) == 1 + (logits > logits[token]).sum()


def test_logprobs_alone_are_of_the_token(run_ranks):
    result = sample_rows(run_ranks, [Row(random_logits(0), make_params(num_logprobs=0)), Row(random_logits(1))])
    assert result.logprobs.token_ids.tolist() == [[int(result.token_ids[0])]]
    assert result.logprobs.ranks.tolist() == [1]
    assert sample_rows(run_ranks, [Row(random_logits(1))]).logprobs is None


REFUSED = {
    "temperature": [{"temperature": float("nan")}, {"temperature": -0.1}, {"temperature": float("inf")}],
    "top_p": [{"top_p": 0.0}, {"top_p": 1.5}, {"top_p": float("nan")}],
    "min_p": [{"min_p": -0.1}, {"min_p": 1.1}],
    "repetition_penalty": [{"repetition_penalty": 0.0}, {"repetition_penalty": float("inf")}],
    "presence_penalty": [{"presence_penalty": float("nan")}],
    "frequency_penalty": [{"frequency_penalty": float("-inf")}],
    "num_logprobs": [{"num_logprobs": MAX_CANDIDATES + 1}],
    "num_prompt_logprobs": [{"num_prompt_logprobs": MAX_LOGPROBS + 1}],
    "logit_bias_token_ids": [{"logit_bias_token_ids": pack([VOCAB_SIZE]), "logit_bias_values": pack([1], "<f4")}],
    "logit_bias_values": [
        {"logit_bias_token_ids": pack([1])},
        {"logit_bias_values": b"123"},
        {"logit_bias_token_ids": pack([1]), "logit_bias_values": pack([float("nan")], "<f4")},
    ],
    "bad_words": [{"bad_words": [b""]}, {"bad_words": [pack([-1])]}],
    "stop_token_ids": [{"stop_token_ids": pack([0, VOCAB_SIZE])}, {"stop_token_ids": b"12345"}],
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_join_with_parameters_that_no_sampler_can_follow_is_refused_by_name(field):
    for fields in REFUSED[field]:
        with pytest.raises(InvalidArgumentError) as error:
            SamplingTable(1).join(0, make_params(**fields), VOCAB_SIZE)
        assert error.value.field == field


def test_a_slot_forgets_its_last_sequence(run_ranks):
    table = SamplingTable(1)
    table.join(0, make_params(temperature=1.0, bad_words=[pack([1])], num_logprobs=2), VOCAB_SIZE)
    table.join(0, make_params(), VOCAB_SIZE)
    vocab = VocabSlice(TensorParallel(0, 1, CPU), 0, VOCAB_SIZE, VOCAB_SIZE)
    batch = build_batch(table, np.array([0]), np.array([1]), vocab)
    assert table.is_plain[0]
    assert not batch.changes_logits
    assert batch.drawn is None
    assert batch.logprobs is None


@pytest.mark.parametrize(
    ("fields", "is_plain"),
    [
        ({}, True),
        ({"temperature": 0.7, "seed": 2**40}, True),
        ({"top_k": 5, "top_p": 0.5, "min_p": 0.1}, True),  # greedy all the same
        ({"temperature": 0.7, "top_k": 5}, False),
        ({"temperature": 0.7, "top_p": 0.5}, False),
        ({"temperature": 0.7, "min_p": 0.1}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"presence_penalty": -1.0}, False),
        ({"frequency_penalty": 0.5}, False),
        ({"num_logprobs": 0}, False),
        ({"bad_words": [pack([1])]}, False),
        ({"min_tokens": 2, "stop_token_ids": pack([1])}, False),
        ({"min_tokens": 2}, True),
        ({"stop_token_ids": pack([1])}, True),
    ],
)
def test_a_slot_is_plain_where_its_temperature_says_all(fields, is_plain):
    table = SamplingTable(1)
    table.join(0, make_params(**fields), VOCAB_SIZE)
    assert table.is_plain[0] == is_plain


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_merge_candidates_into_each_rows_greatest(run_ranks, size):
    keys = torch.randint(-(2**63), 2**63 - 1, (5, size, 3), generator=torch.Generator().manual_seed(size))
    merged = run_ranks(size, lambda tp: VocabSlice(tp, tp.rank * 6, 6, VOCAB_SIZE).merge(keys[:, tp.rank].clone()))
    for found in merged:
        assert torch.equal(found.amax(dim=1), keys.flatten(1).amax(dim=1))
