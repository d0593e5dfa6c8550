"""CUDA graphs of decode steps: from the token table back to it, replayed with no host in between.

A graph serves a bucket of batch sizes. It reads what changes between steps from fixed tensors; rows beyond the batch
are padding: they have no keys, cache nothing, and sample into the token table's spare row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from ..kernels.batch import AttentionBatch
from ..kernels.sampling import candidate_keys
from .bucket_choice import sizes_worth_having
from .graph_recorder import Recorder, Recording, Tensors
from .kv_cache import KVCache
from .models.registry import Model
from .sampler.triton_operations import take_merged_tokens
from .sampler.vocab import VocabSlice
from .slot_table import SlotTable
from .step_batch import SampleRows, StepRows

# Rows of the input tensor.
_POSITIONS, _KV_INDICES, _TOKEN_CELLS, _SLOTS, _SEQ_LENS, _SAMPLE_CELLS, _SHORT_SEQ_LENS, _TEMPERATURES = range(8)
_SEEDS = 8  # and 9: pairs
_NUM_INPUTS = 10
_SMALL_BUCKETS = (1, 2, 4, 8, 16, 24, 32)


def bucket_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes that have a graph, ascending; the last is `max_num_seqs`.

    Steps of 16 up to 128 and of 32 above: a padding row costs a linear layer as much as a real one.
    """
    sizes = {size for size in _SMALL_BUCKETS if size < max_num_seqs}
    sizes |= set(range(48, min(max_num_seqs, 128), 16)) | set(range(128, max_num_seqs, 32))
    return sorted(sizes | {max_num_seqs})


@dataclass(frozen=True, slots=True)
class _Graph:
    """One bucket: its forward pass with logits, and the plain sampling that may follow."""

    forward: Recording  # its one output are logits, [size, local_vocab_size]
    sample: Recording


@dataclass(frozen=True, slots=True)
class DecodeOutput:
    """What a forward graph leaves for the sampler. The next step overwrites it."""

    logits: torch.Tensor  # [num_rows, local_vocab_size]
    samples: SampleRows


class DecodeGraphs:
    """Owner of the graphs and their inputs. Belongs to the device thread, and to one stream."""

    def __init__(
        self, model: Model, kv_cache: KVCache, slots: SlotTable, vocab: VocabSlice, recorder: Recorder
    ) -> None:
        """Captures nothing yet: see `capture`."""
        self._recorder = recorder
        self._model, self._kv_cache, self._slots, self._vocab = model, kv_cache, slots, vocab
        self._sizes: list[int] = []
        device, most = slots.device, slots.shape.num_slots
        self._inputs = torch.zeros(_NUM_INPUTS * _width(most), dtype=torch.int64, device=device)
        self._query_starts = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._token_ids = torch.zeros(most, dtype=torch.int32, device=device)
        self._graphs: dict[int, _Graph] = {}

    def capture(self, sizes: Sequence[int] | None = None) -> Sequence[int]:
        """Captures buckets of `sizes`, ascending, the largest first: the others then share its memory. On all ranks at
        once. Without `sizes` they are those of `bucket_sizes`, but for those that a larger one outruns: to find them
        takes a while. Returns the sizes that there are graphs of.
        """
        self._sizes = list(sizes) if sizes is not None else bucket_sizes(self._slots.shape.num_slots)
        with self._recorder.session():
            for size in reversed(self._sizes):
                self._write_inputs(size, _padding(size, self._spare_cell))
                self._graphs[size] = self._capture(size)
            if sizes is None:
                self._sizes = sizes_worth_having(self._sizes, self._time_ms, self._vocab.tp)
        self._graphs = {size: self._graphs[size] for size in self._sizes}
        return self._sizes

    def forward(self, rows: StepRows, on_ready: Callable[[], None] = lambda: None) -> DecodeOutput:
        """Runs a step of decodes up to the logits; `on_ready` is called when what it reads is on its way."""
        num_rows = len(rows.slots)
        size = self._bucket(num_rows)
        inputs = _padding(size, self._spare_cell)
        for index, values in (
            (_POSITIONS, rows.positions),
            (_KV_INDICES, rows.kv_indices),
            (_TOKEN_CELLS, rows.token_cells),
            (_SLOTS, rows.slots),
            (_SEQ_LENS, rows.seq_lens),
            (_SAMPLE_CELLS, self._slots.cells(rows.slots, rows.seq_lens)),
        ):
            inputs[index, :num_rows] = values
        # Shorter numbers lie in the first half of a row.
        inputs[_SHORT_SEQ_LENS].view(np.int32)[:num_rows] = rows.seq_lens
        inputs[_TEMPERATURES].view(np.float32)[:num_rows] = self._slots.sampling.temperature[rows.slots]
        inputs[_SEEDS:].reshape(-1, 2)[:num_rows] = self._slots.sampling.seeds[rows.slots]
        self._write_inputs(size, inputs)
        forward = self._graphs[size].forward
        on_ready()
        forward.replay()
        views = self._views(size)
        samples = SampleRows(None, views[_SEQ_LENS][:num_rows], views[_SAMPLE_CELLS][:num_rows])
        return DecodeOutput(forward.outputs[0][:num_rows], samples)

    def sample(self, num_rows: int) -> torch.Tensor:
        """Samples from the logits of the last `forward` into the token table, by the rows' temperatures alone.

        Returns token ids [num_rows] int32, which the next step overwrites.
        """
        size = self._bucket(num_rows)
        self._graphs[size].sample.replay()
        return self._token_ids[:num_rows]

    def _bucket(self, num_rows: int) -> int:
        return next(size for size in self._sizes if size >= num_rows)

    @property
    def _spare_cell(self) -> int:
        return self._slots.token_ids.shape[1] * self._slots.shape.num_slots

    def _write_inputs(self, size: int, inputs: np.ndarray[tuple[int, int], np.dtype[np.int64]]) -> None:
        sent = torch.from_numpy(inputs.reshape(-1)).pin_memory()
        self._inputs[: len(sent)].copy_(sent, non_blocking=True)

    def _capture(self, size: int) -> _Graph:
        # Kernels compile, and libraries make their workspaces, before the recording.
        self._sample(size, *self._forward(size))
        forward, (logits,) = self._recorder.record(partial(self._forward, size))
        sampling, _ = self._recorder.record(partial(self._sample, size, logits))
        return _Graph(forward, sampling)

    def _time_ms(self, size: int, num_times: int) -> float:
        """Of a step without a key to attend to: what attention takes does not hang on padding."""
        self._write_inputs(size, _padding(size, self._spare_cell))
        return self._recorder.time_ms([self._graphs[size].forward], num_times)

    def _views(self, size: int) -> torch.Tensor:
        """[_NUM_INPUTS, size]"""
        return self._inputs[: _NUM_INPUTS * _width(size)].view(_NUM_INPUTS, -1)[:, :size]

    def _forward(self, size: int) -> Tensors:
        views = self._views(size)
        batch = AttentionBatch(
            num_decode_rows=size,
            positions=views[_POSITIONS],
            kv_indices=views[_KV_INDICES],
            block_tables=self._slots.block_tables,
            slots=views[_SLOTS],
            seq_lens=views[_SHORT_SEQ_LENS].view(torch.int32)[:size],
            query_starts=self._query_starts[: size + 1],
            host_seq_lens=(1,) * size,
            host_query_starts=tuple(range(size + 1)),
        )
        token_ids = self._slots.token_ids.view(-1).index_select(0, views[_TOKEN_CELLS])
        return (self._model.logits(self._model.forward(token_ids, batch, self._kv_cache)),)

    def _sample(self, size: int, logits: torch.Tensor) -> Tensors:
        views = self._views(size)
        temperatures = views[_TEMPERATURES].view(torch.float32)[:size]
        seeds = self._inputs[_SEEDS * _width(size) :][: 2 * size].view(size, 2)
        # A decode samples at the position behind its newest token, which is what it has computed by then.
        keys = candidate_keys(logits, temperatures, seeds, views[_SEQ_LENS], self._vocab.start)
        token_table = self._slots.token_ids.view(-1)
        take_merged_tokens(keys, self._vocab, self._token_ids[:size], token_table, views[_SAMPLE_CELLS])
        return ()


def _width(size: int) -> int:
    """Of a row of the inputs, so that each begins at a multiple of 16 bytes: others would need kernels of their own."""
    return size + size % 2


def _padding(size: int, spare_cell: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Inputs of a step in which every row is padding."""
    inputs = np.zeros((_NUM_INPUTS, _width(size)), dtype=np.int64)
    inputs[_KV_INDICES] = -1
    inputs[_SAMPLE_CELLS] = spare_cell
    return inputs
