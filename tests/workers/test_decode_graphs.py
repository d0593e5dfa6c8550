"""Which batch sizes have a CUDA graph, and what it reads and writes; here a replay is another run of what was recorded.

The graphs themselves run in tests/system/test_exact_tokens.py, on a GPU.
"""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from octavo.workers import decode_graphs
from octavo.workers.decode_graphs import DecodeGraphs, bucket_sizes
from octavo.workers.graph_recorder import Recording
from octavo.workers.parallel import TensorParallel
from octavo.workers.sampler.vocab import VocabSlice
from octavo.workers.slot_table import SlotTable, SlotTableShape
from octavo.workers.step_batch import StepRows

CPU = torch.device("cpu")
VOCAB_SIZE = 50


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 5, 16, 33, 100, 128, 129, 256, 512, 1000])
def test_every_batch_has_a_graph_that_is_not_much_larger(max_num_seqs):
    sizes = bucket_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_num_seqs
    for num_rows in range(1, max_num_seqs + 1):
        size = next(size for size in sizes if size >= num_rows)
        assert size - num_rows < max(1, num_rows, 8) if num_rows <= 32 else size - num_rows < 32


class Rerun:
    """A recorder whose replays run the function again, and leave what it gives where the recorded results are."""

    def session(self):
        return nullcontext()

    def record(self, function):
        outputs = function()

        def replay():
            for place, result in zip(outputs, function(), strict=True):
                place.copy_(result)

        return Recording(replay, outputs), outputs

    def time_ms(self, recordings, num_times):
        """A bucket of 4 rows takes longer than one of 5."""
        (recording,) = recordings
        return {4: 9.0}.get(len(recording.outputs[0]), 1.0)


class Successor:
    """A model that predicts the token after each, and keeps what it was called with."""

    def forward(self, token_ids, batch, kv_cache):
        self.token_ids, self.batch = token_ids, batch
        return token_ids

    def logits(self, hidden):
        return torch.nn.functional.one_hot((hidden.long() + 1) % VOCAB_SIZE, VOCAB_SIZE).float()


def _take(keys, vocab, out, token_table, cells):
    out.copy_(keys)
    token_table.index_copy_(0, cells, keys.int())


def test_a_step_reads_its_rows_and_feeds_its_tokens_to_the_next(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    # What the kernels compute is tested with them.
    drawn_by = []
    monkeypatch.setattr(
        decode_graphs,
        "candidate_keys",
        lambda logits, *columns: drawn_by.append(columns) or logits.argmax(dim=1),
    )
    monkeypatch.setattr(decode_graphs, "take_merged_tokens", _take)
    shape = SlotTableShape(num_slots=5, max_model_len=16, block_size=4, num_blocks=20, vocab_size=VOCAB_SIZE)
    slots, model = SlotTable(shape, CPU), Successor()
    slots.token_ids[[4, 1, 2], [7, 0, 3]] = torch.tensor([11, 48, 49], dtype=torch.int32)
    vocab = VocabSlice(TensorParallel(0, 1, CPU), 0, VOCAB_SIZE, VOCAB_SIZE)
    graphs = DecodeGraphs(model, None, slots, vocab, Rerun())
    assert graphs.capture() == [1, 2, 5]
    slots.sampling.temperature[:] = [0, 1, 2, 3, 4]
    slots.sampling.seeds[:] = np.arange(10).reshape(5, 2)
    for step in range(2):
        rows, positions = np.array([4, 1, 2]), np.array([7, 0, 3]) + step
        graphs.forward(
            StepRows(
                num_decodes=3, slots=rows, starts=np.arange(3), counts=np.ones(3), seq_lens=positions + 1,
                positions=positions, kv_indices=positions + 40, token_cells=slots.cells(rows, positions),
                sampling=np.arange(3),
            )
        )  # fmt: skip
        # Buckets are of 1, 2 and 5 rows.
        assert model.token_ids.tolist()[:3] == [11 + step, 48 + step, (49 + step) % VOCAB_SIZE]
        assert model.batch.seq_lens.dtype == torch.int32
        assert model.batch.seq_lens.tolist() == [*(positions + 1), 0, 0]
        assert model.batch.positions.tolist() == [*positions, 0, 0]
        assert model.batch.kv_indices.tolist() == [*(positions + 40), -1, -1]
        assert model.batch.slots.tolist() == [4, 1, 2, 0, 0]
        assert graphs.sample(3).tolist() == [12 + step, (49 + step) % VOCAB_SIZE, step]
        temperatures, seeds, seq_lens, _ = drawn_by[-1]
        assert temperatures.tolist() == [4, 1, 2, 0, 0]  # padding needs no noise
        assert seeds.tolist() == [[8, 9], [2, 3], [4, 5], [0, 0], [0, 0]]
        assert seq_lens.tolist() == [*(positions + 1), 0, 0]


def test_sizes_that_are_known_are_all_there_is(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(decode_graphs, "candidate_keys", lambda logits, *rest: logits.argmax(dim=1))
    monkeypatch.setattr(decode_graphs, "take_merged_tokens", _take)
    monkeypatch.setattr(Rerun, "time_ms", None)  # nothing is timed
    shape = SlotTableShape(num_slots=5, max_model_len=16, block_size=4, num_blocks=20, vocab_size=VOCAB_SIZE)
    vocab = VocabSlice(TensorParallel(0, 1, CPU), 0, VOCAB_SIZE, VOCAB_SIZE)
    graphs = DecodeGraphs(Successor(), None, SlotTable(shape, CPU), vocab, Rerun())
    assert graphs.capture([2, 5]) == [2, 5]
    assert [graphs._bucket(num_rows) for num_rows in (1, 2, 3)] == [2, 2, 5]
