"""top_k, top_p and min_p against sorting, over any number of ranks."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from octavo.workers.sampler.rows import Column
from octavo.workers.sampler.truncation import Truncation, truncate
from octavo.workers.sampler.vocab import VocabSlice

# Grids make ties; the ends are where float32 keys change sign and exponent.
EDGES = [-0.0, 1e-30, -1e-30, 3e38]
LOGITS = st.lists(
    st.one_of(st.integers(-8, 8).map(float), st.floats(-60, 60, width=32), st.sampled_from(EDGES)),
    min_size=1,
    max_size=40,
).map(lambda values: np.array(values, dtype=np.float32))


def column(value, dtype) -> Column:
    return Column(torch.tensor([0]), torch.tensor([value], dtype=dtype))


def truncate_over_ranks(run_ranks, size: int, logits: np.ndarray, truncation: Truncation) -> np.ndarray:
    """One row of logits, split over `size` ranks and put together again."""
    num_rows = -(-len(logits) // size)
    padded = np.full(num_rows * size, -np.inf, dtype=np.float32)
    padded[: len(logits)] = logits

    def run(tp):
        here = torch.tensor(padded[None, tp.rank * num_rows : (tp.rank + 1) * num_rows])
        truncate(here, truncation, VocabSlice(tp, tp.rank * num_rows, num_rows, len(logits)))
        return here[0]

    whole = torch.cat(run_ranks(size, run)).numpy()
    assert (whole[len(logits) :] == -np.inf).all()
    kept = whole[: len(logits)] > -np.inf
    # What stays keeps its logit.
    assert (whole[: len(logits)][kept] == logits[kept]).all()
    return kept


def probabilities(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


@pytest.mark.parametrize("size", [1, 3])
@given(logits=LOGITS, k=st.integers(1, 40))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_top_k_keeps_the_k_greatest_and_their_equals(size, run_ranks, logits, k):
    k = min(k, len(logits))
    kept = truncate_over_ranks(run_ranks, size, logits, Truncation(None, column(k, torch.int64), None))
    assert (kept == (logits >= np.sort(logits)[-k])).all()


@pytest.mark.parametrize("size", [1, 3])
@given(logits=LOGITS, p=st.floats(2**-10, 1 - 2**-10, width=32))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_top_p_keeps_the_least_set_of_likeliest_tokens_with_mass_p(size, run_ranks, logits, p):
    mass = probabilities(logits)
    descending = np.argsort(-logits, kind="stable")
    cumulative = mass[descending].cumsum()
    # float32 weights are good to some 1e-6 of the mass; nearer to p either side is right.
    assume(np.abs(cumulative - p).min() > 1e-5)
    least = logits[descending[np.searchsorted(cumulative, p)]]
    kept = truncate_over_ranks(run_ranks, size, logits, Truncation(None, None, column(p, torch.float32)))
    assert (kept == (logits >= least)).all()


@pytest.mark.parametrize("size", [1, 3])
@given(logits=LOGITS, min_p=st.floats(2**-10, 1, width=32))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_min_p_keeps_tokens_by_their_share_of_the_likeliest(size, run_ranks, logits, min_p):
    ratio = np.exp(logits.astype(np.float64) - logits.max())
    assume((np.abs(ratio / min_p - 1) > 1e-4).all() or min_p == 1)
    kept = truncate_over_ranks(run_ranks, size, logits, Truncation(column(np.log(min_p), torch.float32), None, None))
    assert (kept == (logits == logits.max() if min_p == 1 else ratio >= min_p)).all()


def test_each_cut_sees_what_the_one_before_left(run_ranks):
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.06, 0.04], dtype=np.float32))
    truncation = Truncation(
        log_min_p=column(np.log(0.12), torch.float32),  # of 0.4: drops 0.04
        top_k=column(3, torch.int64),  # drops 0.06
        top_p=column(0.77, torch.float32),  # of 0.9: 0.4 + 0.3 is 0.777 of it
    )
    assert truncate_over_ranks(run_ranks, 2, logits, truncation).tolist() == [True, True, False, False, False]


def test_only_the_rows_that_ask_are_cut(run_ranks):
    logits = torch.randn(3, 10)
    kept = logits.clone()
    vocab = VocabSlice(run_ranks(1, lambda tp: tp)[0], 0, 10, 10)
    truncate(logits, Truncation(None, Column(torch.tensor([1]), torch.tensor([2])), None), vocab)
    assert torch.equal(logits[[0, 2]], kept[[0, 2]])
    assert (logits[1] > -torch.inf).sum() == 2


def test_a_row_without_any_finite_logit_survives(run_ranks):
    logits = np.full(6, -np.inf, dtype=np.float32)
    kept = truncate_over_ranks(
        run_ranks, 2, logits, Truncation(column(-1.0, torch.float32), None, column(0.5, torch.float32))
    )
    assert not kept.any()
