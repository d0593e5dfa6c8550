"""The slot table: one row per running sequence, on the device, edited by plans and read by steps.

Token ids live only on the device, because sampled ones never visit the host before the next step reads them. Counts and
block ids follow from the plans alone, so the host keeps mirrors of them and never asks the device.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import FailedPreconditionError, InvalidArgumentError
from .plan import Ints, Join, Plan
from .sampler.table import SamplingTable
from .transfer import send_both

_ALIGNMENT = 64  # entries between the starts of tables in one memory


@dataclass(frozen=True, slots=True)
class SlotTableShape:
    """Bounds of a slot table."""

    num_slots: int
    max_model_len: int  # tokens of a sequence, prompt and output
    block_size: int  # tokens of a block
    num_blocks: int  # of the KV cache
    vocab_size: int

    @property
    def max_blocks(self) -> int:
        """Blocks of the longest sequence."""
        return -(-self.max_model_len // self.block_size)


@dataclass(frozen=True, slots=True)
class _Write:
    """Of a table's memory."""

    cells: Ints
    values: NDArray[np.int32]  # beside cells


class SlotTable:
    """Rows of running sequences. An illegal edit raises FailedPreconditionError, a malformed join InvalidArgumentError;
    the table is then not to be used on.

    Device: token_ids [num_slots + 1, max_model_len + 1] int32, whose last row takes what padding rows of a CUDA graph
    sample, and block_tables [num_slots, max_blocks] int32, each row as far as its slot has blocks. Both lie in one
    memory, so that a plan's edits of them are one write.
    Host: num_known, num_computed, num_prompt, num_blocks [num_slots] int64 and the block tables, 0 behind a slot's
    blocks.
    """

    def __init__(self, shape: SlotTableShape, device: torch.device) -> None:
        self.shape = shape
        self.device = device
        tokens_shape = shape.num_slots + 1, shape.max_model_len + 1
        num_tokens, num_block_ids = math.prod(tokens_shape), shape.num_slots * shape.max_blocks
        self._first_block_cell = -(-num_tokens // _ALIGNMENT) * _ALIGNMENT
        self._memory = torch.zeros(self._first_block_cell + num_block_ids, dtype=torch.int32, device=device)
        self.token_ids = self._memory[:num_tokens].view(tokens_shape)
        self.block_tables = self._memory[self._first_block_cell :].view(shape.num_slots, shape.max_blocks)
        self.host_block_tables = np.zeros((shape.num_slots, shape.max_blocks), dtype=np.int64)
        self.occupied = np.zeros(shape.num_slots, dtype=np.bool_)
        self.num_known = np.zeros(shape.num_slots, dtype=np.int64)
        self.num_computed = np.zeros(shape.num_slots, dtype=np.int64)
        self.num_prompt = np.zeros(shape.num_slots, dtype=np.int64)
        self.num_blocks = np.zeros(shape.num_slots, dtype=np.int64)
        self.decode_slots: Ints = np.zeros(0, dtype=np.int64)
        self.version = 0  # changes whenever a row changes hands, so that what was gathered from rows can be kept
        self.sampling = SamplingTable(shape.num_slots)

    def apply(self, plan: Plan) -> None:
        """Applies the plan's edits: leaves, joins, appended blocks, amended tokens, the set of decode slots."""
        if len(plan.leave_slots):
            self._leave(plan.leave_slots)
        writes: list[_Write] = []
        for join in plan.joins:
            writes += self._join(join)
        if len(plan.append_slots):
            writes.append(self._append_blocks(plan.append_slots, plan.append_block_ids))
        self._write(writes)
        if len(plan.amend_slots):  # maybe of a slot that has just joined
            self._write([self._amend(plan.amend_slots, plan.amend_token_ids)])
        if plan.decode_slots is not None:
            self.decode_slots = plan.decode_slots
        self._check_step(plan)

    def advance(self, slots: Ints, num_tokens: Ints | int, sampled: Ints) -> None:
        """Notes that `slots` computed `num_tokens` each, and that `sampled` slots know one token more."""
        self.num_computed[slots] += num_tokens
        self.num_known[sampled] += 1

    def tokens_at(self, cells: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """The tokens, int32, at cells of the flattened token table, on the device: in `out` if one is given."""
        return torch.index_select(self.token_ids.view(-1), 0, cells, out=out)

    def cells(self, slots: Ints, positions: Ints) -> Ints:
        """Where tokens stand in the flattened token table."""
        return slots * self.token_ids.shape[1] + positions

    def _leave(self, slots: Ints) -> None:
        self._check_occupied(slots, "leave")
        if len(np.unique(slots)) != len(slots):
            raise FailedPreconditionError("a plan lets a slot leave twice")
        self.occupied[slots] = False
        self.version += 1

    def _join(self, join: Join) -> tuple[_Write, _Write]:
        self._check_join(join)
        slot, num_tokens, num_blocks = join.slot, len(join.token_ids), len(join.block_ids)
        self.occupied[slot] = True
        self.num_known[slot] = num_tokens
        self.num_computed[slot] = join.num_computed_tokens
        self.num_prompt[slot] = join.num_prompt_tokens
        self.num_blocks[slot] = num_blocks
        self.host_block_tables[slot] = 0
        self.host_block_tables[slot, :num_blocks] = join.block_ids
        self.sampling.join(slot, join.sampling_params, self.shape.vocab_size)
        self.version += 1
        first_token, first_block = slot * self.token_ids.shape[1], self._block_cells(slot, 0)
        return (
            _Write(np.arange(first_token, first_token + num_tokens), join.token_ids),
            _Write(np.arange(first_block, first_block + num_blocks), join.block_ids),
        )

    def _block_cells(self, slots: Any, columns: Any) -> Any:  # noqa: ANN401  # integers, or arrays of them
        """Where entries of the block tables lie in the memory."""
        return self._first_block_cell + slots * self.shape.max_blocks + columns

    def _write(self, writes: list[_Write]) -> None:
        """Queues writes of distinct cells."""
        if not writes:
            return
        cells = np.concatenate([write.cells for write in writes])
        values = np.concatenate([write.values for write in writes])
        self._memory.index_copy_(0, *send_both(cells, values, self.device))

    def _append_blocks(self, slots: Ints, block_ids: NDArray[np.int32]) -> _Write:
        self._check_occupied(slots, "append a block to")
        self._check_block_ids(block_ids)
        columns = self.num_blocks[slots] + _occurrence(slots)
        if (columns >= self.shape.max_blocks).any():
            raise FailedPreconditionError(f"a slot would hold more than {self.shape.max_blocks} blocks")
        self.host_block_tables[slots, columns] = block_ids
        np.add.at(self.num_blocks, slots, 1)
        return _Write(self._block_cells(slots, columns), block_ids)

    def _amend(self, slots: Ints, token_ids: NDArray[np.int32]) -> _Write:
        """Puts other tokens in the place of the newest ones, whose keys and values no step has computed yet."""
        self._check_occupied(slots, "amend")
        if len(np.unique(slots)) != len(slots):
            raise FailedPreconditionError("a plan amends a slot twice")
        if (self.num_known[slots] <= self.num_prompt[slots]).any():
            raise FailedPreconditionError("a plan amends a slot that knows no token beyond its prompt")
        if int(token_ids.min()) < 0 or int(token_ids.max()) >= self.shape.vocab_size:
            raise FailedPreconditionError(f"an amended token id is not in [0, {self.shape.vocab_size})")
        return _Write(self.cells(slots, self.num_known[slots] - 1), token_ids)

    def _check_join(self, join: Join) -> None:
        shape = self.shape
        if not 0 <= join.slot < shape.num_slots:
            raise FailedPreconditionError(f"slot {join.slot} is not in [0, {shape.num_slots})")
        if self.occupied[join.slot]:
            raise FailedPreconditionError(f"slot {join.slot} is occupied, so no sequence can join it")
        num_tokens = len(join.token_ids)
        if not 0 < num_tokens <= shape.max_model_len:
            raise InvalidArgumentError(f"{num_tokens} tokens join; the limit is {shape.max_model_len}", "token_ids")
        if int(join.token_ids.min()) < 0 or int(join.token_ids.max()) >= shape.vocab_size:
            raise InvalidArgumentError(f"a token id is not in [0, {shape.vocab_size})", "token_ids")
        if not 0 < join.num_prompt_tokens <= num_tokens or join.num_computed_tokens >= num_tokens:
            raise InvalidArgumentError(
                f"slot {join.slot} joins with {num_tokens} tokens, but {join.num_prompt_tokens} of prompt and "
                f"{join.num_computed_tokens} computed",
                "num_computed_tokens",
            )
        if len(join.block_ids) > shape.max_blocks:
            raise FailedPreconditionError(f"slot {join.slot} joins with more than {shape.max_blocks} blocks")
        self._check_block_ids(join.block_ids)

    def _check_block_ids(self, block_ids: NDArray[np.int32]) -> None:
        if len(block_ids) and (int(block_ids.min()) < 0 or int(block_ids.max()) >= self.shape.num_blocks):
            raise FailedPreconditionError(f"a block id is not in [0, {self.shape.num_blocks})")

    def _check_occupied(self, slots: Ints, action: str) -> None:
        if len(slots) and int(slots.max()) >= self.shape.num_slots:
            raise FailedPreconditionError(f"cannot {action} slot {slots.max()}: there are {self.shape.num_slots}")
        if not self.occupied[slots].all():
            free = slots[~self.occupied[slots]].tolist()
            raise FailedPreconditionError(f"cannot {action} slots {free}: they are free")

    def _check_step(self, plan: Plan) -> None:
        decode, chunks = self.decode_slots, plan.chunk_slots
        self._check_occupied(decode, "decode")
        if plan.decode_slots is not None or len(chunks):
            self._check_distinct(np.concatenate([decode, chunks]))
        if (self.num_known[decode] - self.num_computed[decode] != 1).any():
            raise FailedPreconditionError("a decode slot does not have exactly one token left to compute")
        self._check_room(decode, self.num_known[decode])
        if len(chunks):
            self._check_chunks(chunks, plan.chunk_num_tokens)

    def _check_distinct(self, slots: Ints) -> None:
        if len(np.unique(slots)) != len(slots):
            raise FailedPreconditionError("a slot appears twice in one step")

    def _check_chunks(self, chunks: Ints, num_tokens: Ints) -> None:
        self._check_occupied(chunks, "compute a chunk of")
        ends = self.num_computed[chunks] + num_tokens
        if (num_tokens < 1).any() or (ends > self.num_known[chunks]).any():
            raise FailedPreconditionError("a chunk is empty or goes past the tokens that its slot knows")
        self._check_room(chunks, ends)

    def _check_room(self, slots: Ints, seq_lens: Ints) -> None:
        if (seq_lens > self.num_blocks[slots] * self.shape.block_size).any():
            raise FailedPreconditionError("a slot computes more tokens than its blocks hold")
        if (seq_lens > self.shape.max_model_len).any():
            raise FailedPreconditionError(f"a slot goes past {self.shape.max_model_len} tokens")


def _occurrence(values: Ints) -> Ints:
    """For each entry, how many equal ones come before it."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.searchsorted(ordered, ordered, side="left")
    result = np.empty_like(values)
    result[order] = np.arange(len(values)) - starts
    return result
