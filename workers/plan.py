"""BatchPlan off the wire: packed fields as numpy arrays, their lengths checked."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FailedPreconditionError, InvalidArgumentError
from ..proto import sampling_pb2, worker_pb2

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Join:
    """A sequence that takes a free slot."""

    slot: int
    token_ids: NDArray[np.int32]  # prompt, then what has been generated so far
    num_prompt_tokens: int
    num_computed_tokens: int
    block_ids: NDArray[np.int32]
    sampling_params: sampling_pb2.SamplingParams


@dataclass(frozen=True, slots=True)
class BlockMoves:
    """Blocks whose content goes to others, one by one."""

    sources: NDArray[np.int32]
    targets: NDArray[np.int32]  # beside sources

    def __len__(self) -> int:
        return len(self.sources)

    def check(self, num_sources: int, num_targets: int) -> None:
        """Raises FailedPreconditionError unless the ids are in range and no block is moved to twice."""
        for ids, limit in ((self.sources, num_sources), (self.targets, num_targets)):
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < limit:
                raise FailedPreconditionError(f"a block id is not in [0, {limit})")
        if len(set(self.targets.tolist())) != len(self.targets):
            raise FailedPreconditionError("two blocks are moved to the same one")


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array


# Most fields of most plans.
_NO_SLOTS: Ints = _frozen(np.zeros(0, dtype=np.int64))
_NO_IDS: NDArray[np.int32] = _frozen(np.zeros(0, dtype=np.int32))
_NO_MOVES = BlockMoves(_NO_IDS, _NO_IDS)


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: what changes before it, and the rows that compute."""

    epoch: int
    step_id: int
    leave_slots: Ints
    joins: tuple[Join, ...]
    append_slots: Ints
    append_block_ids: NDArray[np.int32]  # beside append_slots
    decode_slots: Ints | None  # None: the set of the step before
    chunk_slots: Ints
    chunk_num_tokens: Ints  # beside chunk_slots
    amend_slots: Ints = field(default_factory=lambda: _NO_SLOTS)
    amend_token_ids: NDArray[np.int32] = field(default_factory=lambda: _NO_IDS)  # beside amend_slots
    saves: BlockMoves = _NO_MOVES  # from the KV cache to the host tier
    loads: BlockMoves = _NO_MOVES  # from the host tier to the KV cache
    copies: BlockMoves = _NO_MOVES  # within the KV cache
    finished_transfers: int = 0  # the last step whose saves and loads this one may count on


def unpack_int32(data: bytes, field: str) -> NDArray[np.int32]:
    """Packed little-endian int32; raises InvalidArgumentError naming `field` for a broken length."""
    return _unpack(data, "<i4", field).astype(np.int32, copy=False) if data else _NO_IDS


def decode_plan(message: worker_pb2.BatchPlan) -> Plan:
    """Raises InvalidArgumentError if a packed field is malformed or two that run side by side differ in length."""
    plan = Plan(
        epoch=message.epoch,
        step_id=message.step_id,
        leave_slots=_unpack_slots(message.leave_slots, "leave_slots"),
        joins=tuple(_decode_join(join) for join in message.joins),
        append_slots=_unpack_slots(message.append_slots, "append_slots"),
        append_block_ids=unpack_int32(message.append_block_ids, "append_block_ids"),
        decode_slots=_unpack_slots(message.decode_slots, "decode_slots") if message.decode_slots_changed else None,
        chunk_slots=_unpack_slots(message.chunk_slots, "chunk_slots"),
        chunk_num_tokens=unpack_int32(message.chunk_num_tokens, "chunk_num_tokens").astype(np.int64),
        amend_slots=_unpack_slots(message.amend_slots, "amend_slots"),
        amend_token_ids=unpack_int32(message.amend_token_ids, "amend_token_ids"),
        saves=_decode_moves(message.save_block_ids, message.save_host_ids, "save_block_ids", "save_host_ids"),
        loads=_decode_moves(message.load_host_ids, message.load_block_ids, "load_host_ids", "load_block_ids"),
        copies=_decode_moves(
            message.copy_from_block_ids, message.copy_to_block_ids, "copy_from_block_ids", "copy_to_block_ids"
        ),
        finished_transfers=message.finished_transfers,
    )
    _check_beside(plan.append_slots, plan.append_block_ids, "append_slots", "append_block_ids")
    _check_beside(plan.chunk_slots, plan.chunk_num_tokens, "chunk_slots", "chunk_num_tokens")
    _check_beside(plan.amend_slots, plan.amend_token_ids, "amend_slots", "amend_token_ids")
    return plan


def _decode_moves(sources: bytes, targets: bytes, sources_field: str, targets_field: str) -> BlockMoves:
    if not (sources or targets):
        return _NO_MOVES
    moves = BlockMoves(unpack_int32(sources, sources_field), unpack_int32(targets, targets_field))
    _check_beside(moves.sources, moves.targets, sources_field, targets_field)
    return moves


def _check_beside(values: NDArray[np.generic], others: NDArray[np.generic], field: str, other_field: str) -> None:
    if len(values) != len(others):
        raise InvalidArgumentError(f"{field} and {other_field} differ in length", other_field)


def _decode_join(join: worker_pb2.SlotJoin) -> Join:
    return Join(
        slot=join.slot,
        token_ids=unpack_int32(join.token_ids, "joins.token_ids"),
        num_prompt_tokens=join.num_prompt_tokens,
        num_computed_tokens=join.num_computed_tokens,
        block_ids=unpack_int32(join.block_ids, "joins.block_ids"),
        sampling_params=join.sampling_params,
    )


def _unpack_slots(data: bytes, field: str) -> Ints:
    return _unpack(data, "<u2", field).astype(np.int64) if data else _NO_SLOTS


def _unpack(data: bytes, dtype: str, field: str) -> NDArray[np.generic]:
    if len(data) % np.dtype(dtype).itemsize:
        raise InvalidArgumentError(f"{field} holds {len(data)} bytes, not a whole number of {dtype} values", field)
    return np.frombuffer(data, dtype=dtype)
