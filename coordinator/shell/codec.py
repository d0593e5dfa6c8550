"""Between the core's values and the bytes on the wire. Packed arrays are little-endian, as numpy has them."""

from array import array

import numpy as np
from numpy.typing import NDArray

from ...errors import InvalidArgumentError
from ...proto import engine_pb2, sampling_pb2, worker_pb2
from ..core.batch_plan import BatchPlan, SlotJoin
from ..core.sequence import Request, RequestKey, StopConditions


def pack(values: list[int], dtype: str) -> bytes:
    return np.asarray(values, dtype=dtype).tobytes()


def unpack(data: bytes, dtype: str, what: str) -> list[int]:
    """Raises InvalidArgumentError naming `what` if `data` is not a whole number of items."""
    values: list[int] = _unpack(data, dtype, what).tolist()
    return values


def _unpack(data: bytes, dtype: str, what: str) -> NDArray[np.integer]:
    if len(data) % np.dtype(dtype).itemsize:
        raise InvalidArgumentError(f"{what} is not a packed {dtype} array: {len(data)} bytes", field=what)
    return np.frombuffer(data, dtype=dtype)


def encode_plan(plan: BatchPlan, epoch: int) -> bytes:
    """The plan as every rank of the group reads it. Encoded once, sent to all."""
    message = worker_pb2.BatchPlan(
        epoch=epoch,
        step_id=plan.step_id,
        leave_slots=pack(plan.leave_slots, "<u2"),
        joins=[_encode_join(join) for join in plan.joins],
        append_slots=pack(plan.append_slots, "<u2"),
        append_block_ids=pack(plan.append_block_ids, "<i4"),
        decode_slots_changed=plan.decode_slots_changed,
        chunk_slots=pack(plan.chunk_slots, "<u2"),
        chunk_num_tokens=pack(plan.chunk_num_tokens, "<i4"),
    )
    if plan.decode_slots_changed:
        message.decode_slots = pack(plan.decode_slots, "<u2")
    return message.SerializeToString()


def _encode_join(join: SlotJoin) -> worker_pb2.SlotJoin:
    return worker_pb2.SlotJoin(
        slot=join.slot,
        token_ids=join.token_ids,
        num_prompt_tokens=join.num_prompt_tokens,
        num_computed_tokens=join.num_computed_tokens,
        block_ids=pack(join.block_ids, "<i4"),
        sampling_params=join.sampling,
    )


def decode_submit(session_id: int, submit: engine_pb2.Submit, vocab_size: int) -> Request:
    """Raises InvalidArgumentError for what no gateway of ours would send."""
    token_ids = _unpack(submit.prompt_token_ids, "<i4", "prompt_token_ids")
    if len(token_ids) and not (token_ids.min() >= 0 and token_ids.max() < vocab_size):
        raise InvalidArgumentError(f"a token id is out of range; it must be in [0, {vocab_size})", field="prompt")
    sampling = submit.sampling_params
    if sampling.max_tokens < 1:
        raise InvalidArgumentError("max_tokens must be at least 1", field="max_tokens")
    stops = frozenset(unpack(sampling.stop_token_ids, "<i4", "stop_token_ids"))
    conditions = StopConditions(sampling.max_tokens, sampling.min_tokens, stops)
    prompt = array("i", token_ids.astype("=i4", copy=False).tobytes())
    return Request(RequestKey(session_id, submit.handle), prompt, conditions, submit.priority, sampling)


def num_rows(table: sampling_pb2.LogprobTable) -> int:
    return len(table.ranks) // 4


def join_tables(tables: list[sampling_pb2.LogprobTable]) -> sampling_pb2.LogprobTable:
    """The rows of all, which have the same columns."""
    if len(tables) == 1:
        return tables[0]
    return sampling_pb2.LogprobTable(
        num_columns=tables[0].num_columns,
        token_ids=b"".join([table.token_ids for table in tables]),
        logprobs=b"".join([table.logprobs for table in tables]),
        ranks=b"".join([table.ranks for table in tables]),
    )


def skip_rows(table: sampling_pb2.LogprobTable, num_skipped: int) -> sampling_pb2.LogprobTable:
    """`table` without its first rows."""
    offset = num_skipped * table.num_columns * 4
    return sampling_pb2.LogprobTable(
        num_columns=table.num_columns,
        token_ids=table.token_ids[offset:],
        logprobs=table.logprobs[offset:],
        ranks=table.ranks[num_skipped * 4 :],
    )
