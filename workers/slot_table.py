"""The slot table: one row per running sequence, on the device, edited by plans and read by steps.

Token ids live only on the device, because sampled ones never visit the host before the next step reads them. Counts and
block ids follow from the plans alone, so the host keeps mirrors of them and never asks the device.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import FailedPreconditionError, InvalidArgumentError
from .plan import Ints, Join, Plan
from .sampler.table import SamplingTable
from .transfer import to_device


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


class SlotTable:
    """Rows of running sequences. An illegal edit raises FailedPreconditionError, a malformed join InvalidArgumentError;
    the table is then not to be used on.

    Device: token_ids [num_slots + 1, max_model_len + 1] int32, whose last row takes what padding rows of a CUDA graph
    sample, and block_tables [num_slots, max_blocks] int32.
    Host: num_known, num_computed, num_prompt, num_blocks [num_slots] int64 and a copy of the block tables.
    """

    def __init__(self, shape: SlotTableShape, device: torch.device) -> None:
        self.shape = shape
        self.device = device
        self.token_ids = torch.zeros((shape.num_slots + 1, shape.max_model_len + 1), dtype=torch.int32, device=device)
        self.block_tables = torch.zeros((shape.num_slots, shape.max_blocks), dtype=torch.int32, device=device)
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
        if plan.joins:
            self._join(plan.joins)
        if len(plan.append_slots):
            self._append_blocks(plan.append_slots, plan.append_block_ids)
        if len(plan.amend_slots):
            self._amend(plan.amend_slots, plan.amend_token_ids)
        if plan.decode_slots is not None:
            self.decode_slots = plan.decode_slots
        self._check_step(plan)

    def advance(self, slots: Ints, num_tokens: Ints | int, sampled: Ints) -> None:
        """Notes that `slots` computed `num_tokens` each, and that `sampled` slots know one token more."""
        self.num_computed[slots] += num_tokens
        self.num_known[sampled] += 1

    def cells(self, slots: Ints, positions: Ints) -> Ints:
        """Where tokens stand in the flattened token table."""
        return slots * self.token_ids.shape[1] + positions

    def _leave(self, slots: Ints) -> None:
        self._check_occupied(slots, "leave")
        if len(np.unique(slots)) != len(slots):
            raise FailedPreconditionError("a plan lets a slot leave twice")
        self.occupied[slots] = False
        self.version += 1

    def _join(self, joins: tuple[Join, ...]) -> None:
        for join in joins:
            self._check_join(join)
            slot = join.slot
            self.occupied[slot] = True
            self.num_known[slot] = len(join.token_ids)
            self.num_computed[slot] = join.num_computed_tokens
            self.num_prompt[slot] = join.num_prompt_tokens
            self.num_blocks[slot] = len(join.block_ids)
            self.host_block_tables[slot] = 0
            self.host_block_tables[slot, : len(join.block_ids)] = join.block_ids
            self.sampling.join(slot, join.sampling_params, self.shape.vocab_size)
        self._write_joined(joins)
        self.version += 1

    def _write_joined(self, joins: tuple[Join, ...]) -> None:
        slots = np.array([join.slot for join in joins], dtype=np.int64)
        _write_ragged(self.token_ids, slots, [join.token_ids for join in joins])
        rows = self.host_block_tables[slots].astype(np.int32)
        self.block_tables.index_copy_(0, to_device(slots, self.device), to_device(rows, self.device))

    def _append_blocks(self, slots: Ints, block_ids: NDArray[np.int32]) -> None:
        self._check_occupied(slots, "append a block to")
        self._check_block_ids(block_ids)
        columns = self.num_blocks[slots] + _occurrence(slots)
        if (columns >= self.shape.max_blocks).any():
            raise FailedPreconditionError(f"a slot would hold more than {self.shape.max_blocks} blocks")
        self.host_block_tables[slots, columns] = block_ids
        np.add.at(self.num_blocks, slots, 1)
        flat = to_device(slots * self.shape.max_blocks + columns, self.device)
        self.block_tables.view(-1).index_copy_(0, flat, to_device(block_ids.copy(), self.device))

    def _amend(self, slots: Ints, token_ids: NDArray[np.int32]) -> None:
        """Puts other tokens in the place of the newest ones, whose keys and values no step has computed yet."""
        self._check_occupied(slots, "amend")
        if len(np.unique(slots)) != len(slots):
            raise FailedPreconditionError("a plan amends a slot twice")
        if (self.num_known[slots] <= self.num_prompt[slots]).any():
            raise FailedPreconditionError("a plan amends a slot that knows no token beyond its prompt")
        if int(token_ids.min()) < 0 or int(token_ids.max()) >= self.shape.vocab_size:
            raise FailedPreconditionError(f"an amended token id is not in [0, {self.shape.vocab_size})")
        cells = to_device(self.cells(slots, self.num_known[slots] - 1), self.device)
        self.token_ids.view(-1).index_copy_(0, cells, to_device(token_ids.copy(), self.device))

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


def _write_ragged(table: torch.Tensor, slots: Ints, rows: list[NDArray[Any]]) -> None:
    """Writes each of `rows` at the start of its slot's row of `table`, in one indexed copy."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    offsets = slots * table.shape[1] - starts
    flat = np.arange(int(lengths.sum()), dtype=np.int64) + np.repeat(offsets, lengths)
    values = np.concatenate(rows).astype(np.int32, copy=True)
    table.view(-1).index_copy_(0, to_device(flat, table.device), to_device(values, table.device))
