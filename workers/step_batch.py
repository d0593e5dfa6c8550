"""What one step computes: the rows of a plan as tensors, sent to the device in one copy."""

from dataclasses import dataclass

import numpy as np
import torch

from ..kernels.batch import AttentionBatch
from .plan import Ints, Plan
from .slot_table import SlotTable
from .transfer import to_device


@dataclass(frozen=True, slots=True)
class SampleRows:
    """Rows that reach the end of the tokens they know, and so sample one more."""

    slots: Ints  # [n]
    token_indices: torch.Tensor  # [n] int64: the step's token whose hidden state predicts the sample
    positions: torch.Tensor  # [n] int64: of the sample in its sequence
    cells: torch.Tensor  # [n] int64: where it goes in the flattened token table
    longest: int  # greatest of positions


@dataclass(frozen=True, slots=True)
class ChunkRow:
    """One row of several tokens, as the host knows it."""

    slot: int
    start: int  # its first token in the step
    num_computed: int  # its first token's position
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step's tokens, decodes first, then chunks, in the plan's order."""

    token_cells: torch.Tensor  # [num_tokens] int64: where each token stands in the flattened token table
    attention: AttentionBatch
    samples: SampleRows | None  # None: no row samples
    chunks: tuple[ChunkRow, ...]


def build_step_batch(table: SlotTable, plan: Plan) -> StepBatch | None:
    """The step that `plan`, already applied to `table`, asks for; None if it computes nothing. Advances the table."""
    slots = np.concatenate([table.decode_slots, plan.chunk_slots])
    if not len(slots):
        return None
    num_decodes = len(table.decode_slots)
    counts = np.concatenate([np.ones(num_decodes, dtype=np.int64), plan.chunk_num_tokens])
    computed = table.num_computed[slots]
    seq_lens = computed + counts
    ends = np.cumsum(counts)
    starts = ends - counts
    (sampling,) = np.nonzero(seq_lens == table.num_known[slots])
    batch = _to_tensors(table, slots, _Rows(num_decodes, starts, computed, counts, seq_lens, sampling))
    table.advance(slots, counts, slots[sampling])
    return batch


@dataclass(frozen=True, slots=True)
class _Rows:
    num_decodes: int
    starts: Ints  # [n]
    computed: Ints  # [n]
    counts: Ints  # [n]
    seq_lens: Ints  # [n]
    sampling: Ints  # [m]: the rows that sample


def _to_tensors(table: SlotTable, slots: Ints, rows: _Rows) -> StepBatch:
    block_size, width = table.shape.block_size, table.token_ids.shape[1]
    token_slots = np.repeat(slots, rows.counts)
    positions = np.arange(len(token_slots)) - np.repeat(rows.starts - rows.computed, rows.counts)
    block_ids = table.host_block_tables[token_slots, positions // block_size]
    sample_slots = slots[rows.sampling]
    sample_positions = rows.seq_lens[rows.sampling]
    sections = _send(
        [
            positions,
            block_ids * block_size + positions % block_size,
            token_slots * width + positions,
            slots,
            rows.seq_lens,
            (rows.starts + rows.counts - 1)[rows.sampling],
            sample_positions,
            sample_slots * width + sample_positions,
        ],
        table.device,
    )
    num_blocks = -(-int(rows.seq_lens.max()) // block_size)
    samples = None
    if len(sample_slots):
        samples = SampleRows(sample_slots, sections[5], sections[6], sections[7], int(sample_positions.max()))
    return StepBatch(
        token_cells=sections[2],
        attention=AttentionBatch(
            num_decode_rows=rows.num_decodes,
            positions=sections[0],
            kv_indices=sections[1],
            block_tables=table.block_tables[:, :num_blocks].index_select(0, sections[3]),
            seq_lens=sections[4].int(),
            query_starts=(*rows.starts.tolist(), len(token_slots)),
            host_seq_lens=tuple(rows.seq_lens.tolist()),
        ),
        samples=samples,
        chunks=_chunks(slots, rows),
    )


def _send(arrays: list[Ints], device: torch.device) -> list[torch.Tensor]:
    """The arrays as device tensors, in one transfer."""
    sent = to_device(np.concatenate(arrays), device)
    return list(sent.split([len(array) for array in arrays]))


def _chunks(slots: Ints, rows: _Rows) -> tuple[ChunkRow, ...]:
    first = rows.num_decodes
    columns = (slots[first:], rows.starts[first:], rows.computed[first:], rows.counts[first:])
    return tuple(ChunkRow(*values) for values in zip(*(column.tolist() for column in columns), strict=True))
