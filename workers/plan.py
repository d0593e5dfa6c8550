"""BatchPlan off the wire: packed fields as numpy arrays, their lengths checked."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidArgumentError
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
class Plan:
    """One step: edits of the slot table in the order of the fields, then the rows that compute."""

    epoch: int
    step_id: int
    leave_slots: Ints
    joins: tuple[Join, ...]
    append_slots: Ints
    append_block_ids: NDArray[np.int32]  # beside append_slots
    decode_slots: Ints | None  # None: the set of the step before
    chunk_slots: Ints
    chunk_num_tokens: Ints  # beside chunk_slots


def unpack_int32(data: bytes, field: str) -> NDArray[np.int32]:
    """Packed little-endian int32; raises InvalidArgumentError naming `field` for a broken length."""
    return _unpack(data, "<i4", field).astype(np.int32, copy=False)


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
    )
    if len(plan.append_slots) != len(plan.append_block_ids):
        raise InvalidArgumentError("append_slots and append_block_ids differ in length", "append_block_ids")
    if len(plan.chunk_slots) != len(plan.chunk_num_tokens):
        raise InvalidArgumentError("chunk_slots and chunk_num_tokens differ in length", "chunk_num_tokens")
    return plan


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
    return _unpack(data, "<u2", field).astype(np.int64)


def _unpack(data: bytes, dtype: str, field: str) -> NDArray[np.generic]:
    if len(data) % np.dtype(dtype).itemsize:
        raise InvalidArgumentError(f"{field} holds {len(data)} bytes, not a whole number of {dtype} values", field)
    return np.frombuffer(data, dtype=dtype)
