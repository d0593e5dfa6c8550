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
    assert sizes_worth_having(times_ms, ALONE) == kept
    assert sizes_worth_having(dict(reversed(times_ms.items())), ALONE) == kept


def test_ranks_that_measured_otherwise_keep_the_same(run_ranks):
    times_ms = [{1: 1.0, 2: 2.0, 4: 1.5}, {1: 1.9, 2: 1.2, 4: 1.4}]
    assert run_ranks(2, lambda tp: sizes_worth_having(times_ms[tp.rank], tp)) == [[4], [4]]
    times_ms[1][4] = 3.0
    assert run_ranks(2, lambda tp: sizes_worth_having(times_ms[tp.rank], tp)) == [[1, 2, 4], [1, 2, 4]]
