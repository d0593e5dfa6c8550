"""Between the core's values and the bytes on the wire. Packed arrays are little-endian, as numpy has them."""

import sys
from array import array

import numpy as np
from numpy.typing import NDArray

from ...errors import InvalidArgumentError
from ...proto import engine_pb2, sampling_pb2, worker_pb2
from ..core.batch_plan import BatchPlan, SlotJoin
from ..core.beam_search import BeamSearchParams, Candidates, EarlyStopping
from ..core.sequence import Request, RequestKey, ResumedOutput, StopConditions
from ..core.transfers import StepTransfers

_MAX_UINT64 = 2**64 - 1
_TYPECODES = {"<u2": "H", "<u4": "I", "<i4": "i"}  # of arrays, which are made sooner than numpy's where they are short
assert sys.byteorder == "little", "packed arrays go to the wire as the host has them"
_MAX_CANDIDATES = 1024  # of a beam; the workers take no more


def pack(values: list[int], dtype: str) -> bytes:
    return array(_TYPECODES[dtype], values).tobytes()


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
        amend_slots=pack(list(plan.amends), "<u2"),
        amend_token_ids=pack(list(plan.amends.values()), "<i4"),
        copy_from_block_ids=pack([source for source, _ in plan.copies], "<i4"),
        copy_to_block_ids=pack([target for _, target in plan.copies], "<i4"),
        finished_transfers=plan.finished_transfers,
    )
    _encode_transfers(plan.transfers, message)
    if plan.decode_slots_changed:
        message.decode_slots = pack(plan.decode_slots, "<u2")
    return message.SerializeToString()


def _encode_transfers(transfers: StepTransfers, message: worker_pb2.BatchPlan) -> None:
    if transfers.saves:
        message.save_block_ids = pack([block_id for _, block_id, _ in transfers.saves], "<i4")
        message.save_host_ids = pack([host_id for _, _, host_id in transfers.saves], "<i4")
    if transfers.loads:
        message.load_block_ids = pack([block_id for _, block_id, _ in transfers.loads], "<i4")
        message.load_host_ids = pack([host_id for _, _, host_id in transfers.loads], "<i4")


def _encode_join(join: SlotJoin) -> worker_pb2.SlotJoin:
    return worker_pb2.SlotJoin(
        slot=join.slot,
        token_ids=join.token_ids,
        num_prompt_tokens=join.num_prompt_tokens,
        num_computed_tokens=join.num_computed_tokens,
        block_ids=pack(join.block_ids, "<i4"),
        sampling_params=_of_sample(join.sampling, join.index) if join.index else join.sampling,
    )


def _of_sample(params: sampling_pb2.SamplingParams, index: int) -> sampling_pb2.SamplingParams:
    """Each sample draws with a seed of its own; the prompt's logprobs are due once."""
    own = sampling_pb2.SamplingParams()
    own.CopyFrom(params)
    own.seed = (params.seed + index) & _MAX_UINT64
    own.ClearField("num_prompt_logprobs")
    return own


def decode_submit(session_id: int, submit: engine_pb2.Submit, vocab_size: int, share_prefixes: bool) -> Request:
    """Raises InvalidArgumentError for what no gateway of ours would send.

    Without `share_prefixes` a request finds only its own blocks: of its other samples, and what a preemption left.
    """
    prompt = _unpack_tokens(submit.prompt_token_ids, vocab_size, "prompt_token_ids", "prompt")
    sampling = submit.sampling_params
    if sampling.max_tokens < 1:
        raise InvalidArgumentError("max_tokens must be at least 1", field="max_tokens")
    stops = frozenset(unpack(sampling.stop_token_ids, "<i4", "stop_token_ids"))
    beam_search = None
    if submit.HasField("beam_search"):
        beam_search = _decode_beam_search(submit.beam_search)
        sampling.num_logprobs = beam_search.num_candidates(len(stops))
        limit = min(vocab_size, _MAX_CANDIDATES)
        if sampling.num_logprobs > limit:
            raise InvalidArgumentError(
                f"num_beams ({beam_search.num_beams}) with {len(stops)} stop tokens needs the {sampling.num_logprobs} "
                f"likeliest tokens of each beam; the limit is {limit}",
                field="num_beams",
            )
    return Request(
        RequestKey(session_id, submit.handle),
        prompt,
        StopConditions(sampling.max_tokens, sampling.min_tokens, stops),
        submit.priority,
        sampling,
        num_samples=max(1, submit.num_samples),
        beam_search=beam_search,
        salt=submit.cache_salt if share_prefixes else f"{session_id}/{submit.handle}".encode(),
        reads_cache=not sampling.HasField("num_prompt_logprobs"),
        is_private=not share_prefixes,
        resumed=tuple(_decode_resumed(output, vocab_size) for output in submit.resumed),
    )


def _unpack_tokens(data: bytes, vocab_size: int, what: str, field: str) -> "array[int]":
    token_ids = _unpack(data, "<i4", what)
    if len(token_ids) and not (token_ids.min() >= 0 and token_ids.max() < vocab_size):
        raise InvalidArgumentError(f"a token id is out of range; it must be in [0, {vocab_size})", field=field)
    return array("i", token_ids.astype("=i4", copy=False).tobytes())


def _decode_resumed(output: engine_pb2.ResumedOutput, vocab_size: int) -> ResumedOutput:
    token_ids = _unpack_tokens(output.token_ids, vocab_size, "resumed.token_ids", "resumed")
    return ResumedOutput(output.index, token_ids, output.num_prompt_logprobs)


def _decode_beam_search(params: engine_pb2.BeamSearch) -> BeamSearchParams:
    try:
        return BeamSearchParams(params.num_beams, params.length_penalty, EarlyStopping(params.early_stopping))
    except ValueError:
        raise InvalidArgumentError("early_stopping is none of its values", field="early_stopping") from None


def candidates_of(table: sampling_pb2.LogprobTable) -> Candidates:
    """The likeliest tokens of a table of one row; its first column is the sampled one."""
    token_ids = np.frombuffer(table.token_ids, "<i4")[1:]
    return Candidates(token_ids.tolist(), np.frombuffer(table.logprobs, "<f4")[1:])


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
