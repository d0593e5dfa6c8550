"""What one step computes: the rows of a plan as host arrays, then as tensors, sent to the device in one copy."""

from dataclasses import dataclass

import numpy as np
import torch

from ..kernels.batch import AttentionBatch, SharedPrefix
from .plan import Ints, Plan
from .slot_table import SlotTable
from .transfer import to_device


@dataclass(frozen=True, slots=True)
class ChunkRow:
    """One row of several tokens, as the host knows it."""

    slot: int
    start: int  # its first token in the step
    num_computed: int  # its first token's position
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StepRows:
    """One step's rows on the host: decodes first, then chunks, in the plan's order."""

    num_decodes: int
    slots: Ints  # [num_rows]
    starts: Ints  # [num_rows]: each row's first token in the step
    counts: Ints  # [num_rows]: its tokens
    seq_lens: Ints  # [num_rows]: its tokens computed after the step
    positions: Ints  # [num_tokens]: of each token in its sequence
    kv_indices: Ints  # [num_tokens]: block_id * block_size + offset, where the token's KV is written
    token_cells: Ints  # [num_tokens]: where the token stands in the flattened token table
    sampling: Ints  # [num_samples]: rows that reach the end of the tokens they know, and so sample one more

    @property
    def sample_slots(self) -> Ints:
        return self.slots[self.sampling]

    @property
    def sample_positions(self) -> Ints:
        """[num_samples]: of each sample in its sequence."""
        return self.seq_lens[self.sampling]

    @property
    def last_tokens(self) -> Ints:
        """[num_samples]: the step's token whose hidden state predicts the sample."""
        return (self.starts + self.counts - 1)[self.sampling]

    @property
    def chunks(self) -> tuple[ChunkRow, ...]:
        rows = slice(self.num_decodes, None)
        columns = (self.slots[rows], self.starts[rows], (self.seq_lens - self.counts)[rows], self.counts[rows])
        return tuple(ChunkRow(*values) for values in zip(*(column.tolist() for column in columns), strict=True))


@dataclass(frozen=True, slots=True)
class SampleRows:
    """Rows that sample, on the device."""

    token_indices: (
        torch.Tensor | None
    )  # [num_samples] int64: tokens whose hidden states predict them; None: all, in order
    positions: torch.Tensor  # [num_samples] int64: of the sample in its sequence
    cells: torch.Tensor  # [num_samples] int64: where it goes in the flattened token table


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step's tokens on the device."""

    token_cells: torch.Tensor  # [num_tokens] int64
    attention: AttentionBatch
    samples: SampleRows


def take_step(table: SlotTable, plan: Plan) -> StepRows | None:
    """The step that `plan`, already applied to `table`, asks for; None if it computes nothing. Advances the table."""
    slots = np.concatenate([table.decode_slots, plan.chunk_slots])
    if not len(slots):
        return None
    num_decodes = len(table.decode_slots)
    counts = np.concatenate([np.ones(num_decodes, dtype=np.int64), plan.chunk_num_tokens])
    computed = table.num_computed[slots]
    seq_lens = computed + counts
    starts = np.cumsum(counts) - counts
    (sampling,) = np.nonzero(seq_lens == table.num_known[slots])
    token_slots = np.repeat(slots, counts)
    positions = np.arange(len(token_slots)) - np.repeat(starts - computed, counts)
    block_size = table.shape.block_size
    block_ids = table.host_block_tables[token_slots, positions // block_size]
    table.advance(slots, counts, slots[sampling])
    return StepRows(
        num_decodes=num_decodes,
        slots=slots,
        starts=starts,
        counts=counts,
        seq_lens=seq_lens,
        positions=positions,
        kv_indices=block_ids * block_size + positions % block_size,
        token_cells=table.cells(token_slots, positions),
        sampling=sampling,
    )


def send_step(rows: StepRows, table: SlotTable, prefixes: tuple[SharedPrefix, ...] = ()) -> StepBatch:
    """The step as tensors on the device. prefixes: that its decodes share, to be read once for all of them."""
    num_rows, num_tokens = len(rows.slots), len(rows.positions)
    sections = _send(
        [
            rows.positions,
            rows.kv_indices,
            rows.token_cells,
            rows.slots,
            # Counts that kernels want as int32, two in each place: seq_lens, then query_starts.
            np.concatenate([rows.seq_lens, rows.starts, [num_tokens, 0]]).astype(np.int32).view(np.int64),
            rows.last_tokens,
            rows.sample_positions,
            table.cells(rows.sample_slots, rows.sample_positions),
        ],
        table.device,
    )
    counts = sections[4].view(torch.int32)
    return StepBatch(
        token_cells=sections[2],
        attention=AttentionBatch(
            num_decode_rows=rows.num_decodes,
            positions=sections[0],
            kv_indices=sections[1],
            block_tables=table.block_tables,
            slots=sections[3],
            seq_lens=counts[:num_rows],
            query_starts=counts[num_rows:-1],
            host_seq_lens=tuple(rows.seq_lens.tolist()),
            host_query_starts=(*rows.starts.tolist(), num_tokens),
            prefixes=prefixes,
        ),
        # In a step of decodes alone every token samples, in order.
        samples=SampleRows(sections[5] if rows.chunks else None, sections[6], sections[7]),
    )


def _send(arrays: list[Ints], device: torch.device) -> list[torch.Tensor]:
    """The arrays as device tensors, in one transfer."""
    sent = to_device(np.concatenate(arrays), device)
    return list(sent.split([len(array) for array in arrays]))
