"""Which sizes of graphs are kept, by what they were timed at."""

import pytest
import torch
from octavo.workers.bucket_choice import sizes_worth_having
from octavo.workers.parallel import TensorParallel

ALONE = TensorParallel(0, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("times_ms", "kept"),
    [
        ({16: 5.0, 64: 5.6, 128: 5.9}, [16, 64, 128]),
        ({384: 8.6, 448: 14.0, 512: 9.6, 640: 12.3}, [384, 512, 640]),
        ({256: 9.0, 320: 8.0, 384: 7.0, 448: 6.0}, [448]),
        ({16: 5.02, 32: 5.0}, [16, 32]),  # noise
        ({16: 0.0, 32: 0.0}, [16, 32]),  # not measured
        ({8: 3.0}, [8]),
    ],
)
def test_sizes_that_a_larger_one_outruns_are_dropped(times_ms, kept):
    for sizes in (list(times_ms), list(reversed(times_ms))):
        assert sizes_worth_having(sizes, lambda size, num_times: times_ms[size], ALONE) == kept


def test_short_runs_are_repeated_and_the_best_time_counts():
    runs = []

    def time_ms(size, num_times):
        runs.append((size, num_times))
        return 2.5 if num_times == 1 and size == 2 else {1: 0.5, 2: 0.4, 4: 6.0}[size]

    assert sizes_worth_having([1, 2, 4], time_ms, ALONE) == [2, 4]
    assert runs == [(1, 1), (2, 1), (4, 1), (1, 10), (1, 10), (2, 2), (2, 2), (4, 1), (4, 1)]


def test_ranks_that_measured_otherwise_keep_the_same(run_ranks):
    times_ms = [{1: 1.0, 2: 2.0, 4: 1.5}, {1: 1.9, 2: 1.2, 4: 1.4}]

    def choose(tp):
        return sizes_worth_having([1, 2, 4], lambda size, num_times: times_ms[tp.rank][size], tp)

    assert run_ranks(2, choose) == [[4], [4]]
    times_ms[1][4] = 3.0
    assert run_ranks(2, choose) == [[1, 2, 4], [1, 2, 4]]


def test_ranks_run_each_size_as_often_as_the_others(run_ranks):
    """Runs wait for each other: one rank that made more of them than another would wait for ever."""
    times_ms = [{1: 0.1, 2: 1.0, 4: 7.0}, {1: 2.0, 2: 0.1, 4: 0.01}]

    def count_runs(tp):
        runs = []

        def time_ms(size, num_times):
            runs.append((size, num_times))
            return times_ms[tp.rank][size]

        sizes_worth_having([1, 2, 4], time_ms, tp)
        return runs

    ours, theirs = run_ranks(2, count_runs)
    assert ours == theirs
    assert ours == [(1, 1), (2, 1), (4, 1), (1, 3), (1, 3), (2, 5), (2, 5), (4, 1), (4, 1)]
