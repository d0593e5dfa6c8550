"""Which batch sizes have a CUDA graph. The graphs themselves run in tests/system/test_exact_tokens.py, on a GPU."""

import pytest
from octavo.workers.decode_graphs import bucket_sizes


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 5, 16, 33, 100, 128, 129, 256, 512, 1000])
def test_every_batch_has_a_graph_that_is_not_much_larger(max_num_seqs):
    sizes = bucket_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_num_seqs
    for num_rows in range(1, max_num_seqs + 1):
        size = next(size for size in sizes if size >= num_rows)
        assert size - num_rows < max(1, num_rows, 8) if num_rows <= 32 else size - num_rows < 32
