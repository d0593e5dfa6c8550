"""Steps that nobody asked for: they load what libraries load late, and show how much memory the largest step takes."""

import numpy as np

from ..proto import sampling_pb2
from .model_runner import ModelRunner
from .plan import Ints, Join, Plan
from .sampler.table import MAX_LOGPROBS
from .slot_table import SlotTableShape

_EMPTY: Ints = np.zeros(0, dtype=np.int64)
_PLAIN = sampling_pb2.SamplingParams(temperature=1.0, top_p=1.0, repetition_penalty=1.0, max_tokens=1)
_TRUNCATED = sampling_pb2.SamplingParams(
    temperature=1.0, min_p=0.01, top_k=50, top_p=0.9, repetition_penalty=1.0, max_tokens=1
)
_PENALISED = sampling_pb2.SamplingParams(temperature=1.0, top_p=1.0, repetition_penalty=1.1, max_tokens=1)
# Every option that costs memory by the row, so that a measured step is the largest.
_ALL_OPTIONS = sampling_pb2.SamplingParams(
    temperature=1.0,
    min_p=0.01,
    top_k=50,
    top_p=0.9,
    repetition_penalty=1.1,
    num_logprobs=MAX_LOGPROBS,
    num_prompt_logprobs=MAX_LOGPROBS,
    max_tokens=1,
)
# Steps of more rows launch their kernels in the usual way (kernels/pdl.py); an odd number, see `run_all_kinds`.
_MANY_ROWS = 65
# Steps of more tokens attend in other ways than those that graphs are made for.
_LARGE_STEP = 4096


def warm_up(
    runner: ModelRunner, num_seqs: int, num_tokens: int, params: sampling_pb2.SamplingParams = _ALL_OPTIONS
) -> None:
    """Runs one step of `num_tokens` prompt tokens over `num_seqs` sequences, then one decode of each, and waits.

    The slot table is empty before and after. All sequences share blocks: their keys and values mean nothing.
    """
    slots = np.arange(num_seqs, dtype=np.int64)
    joins = tuple(_join(slot, max(1, num_tokens // num_seqs), runner.shape, params) for slot in range(num_seqs))
    lengths = np.array([len(join.token_ids) for join in joins], dtype=np.int64)
    runner.execute(_plan(joins=joins, chunk_slots=slots, chunk_num_tokens=lengths)).wait()
    runner.execute(_plan(decode_slots=slots)).wait()
    runner.execute(_plan(leave_slots=slots, decode_slots=_EMPTY)).wait()


def run_all_kinds(runner: ModelRunner, max_num_tokens: int) -> None:
    """Runs steps of up to `max_num_tokens` that between them use every kernel, beside those that graphs are made of."""
    # First what takes the longest to compile.
    large_steps = {_LARGE_STEP, max(_LARGE_STEP, max_num_tokens)}
    if (in_halves := runner.least_num_tokens_in_halves) is not None:
        large_steps.add(in_halves)
    for num_tokens in large_steps:
        if num_tokens <= max_num_tokens:
            num_seqs = -(-num_tokens // (runner.shape.max_model_len - 1))
            at_least = -(-num_tokens // num_seqs) * num_seqs  # all have as many
            warm_up(runner, num_seqs, min(at_least, max_num_tokens))
    num_seqs = min(_MANY_ROWS, runner.shape.num_slots, max_num_tokens)
    for params in (_PLAIN, _TRUNCATED, _PENALISED, _ALL_OPTIONS):
        for rows in {1, num_seqs}:
            # What is sent to the device behind a step's tokens is aligned to 16 bytes for one of them.
            for length in (2, 3):
                warm_up(runner, rows, min(rows * length, max_num_tokens), params)
    _attend_to_the_longest_context(runner)
    _share_a_prefix(runner)


def _attend_to_the_longest_context(runner: ModelRunner) -> None:
    """With one token: if programs ever share a context (kernels/chunk_splits.py), they share that one."""
    slots = np.zeros(1, dtype=np.int64)
    joins = (_join_with_context(0, runner.shape.max_model_len, runner.shape),)
    runner.execute(_plan(joins=joins, chunk_slots=slots, chunk_num_tokens=np.ones(1, dtype=np.int64))).wait()
    runner.execute(_plan(leave_slots=slots, decode_slots=_EMPTY)).wait()


def _share_a_prefix(runner: ModelRunner) -> None:
    """By as many decodes as there can be, and long enough to be read once for them, if one ever is."""
    num_seqs, shape = runner.shape.num_slots, runner.shape
    num_keys = None if runner.prefix_groups is None else runner.prefix_groups.keys_worth_sharing(num_seqs)
    # Behind the prefix, of whole blocks, is the token that is computed.
    num_tokens = 1 if num_keys is None else -(-num_keys // shape.block_size) * shape.block_size + 1
    if 1 < num_tokens <= shape.max_model_len:
        slots = np.arange(num_seqs, dtype=np.int64)
        joins = tuple(_join_with_context(slot, num_tokens, shape) for slot in range(num_seqs))
        runner.execute(_plan(joins=joins, decode_slots=slots)).wait()
        runner.execute(_plan(leave_slots=slots, decode_slots=_EMPTY)).wait()


def _join_with_context(slot: int, num_tokens: int, shape: SlotTableShape) -> Join:
    """With one token left to compute. One block stands for all others: nothing of it means anything."""
    return Join(
        slot=slot,
        token_ids=np.zeros(num_tokens, dtype=np.int32),
        num_prompt_tokens=num_tokens,
        num_computed_tokens=num_tokens - 1,
        block_ids=np.zeros(-(-num_tokens // shape.block_size), dtype=np.int32),
        sampling_params=_PLAIN,
    )


def blocks_for_warm_up(num_seqs: int, num_tokens: int, block_size: int) -> int:
    """Blocks that `warm_up` writes to, from 0 on."""
    return max(1, num_tokens // num_seqs) // block_size + 1


def _join(
    slot: int, num_tokens: int, shape: SlotTableShape, params: sampling_pb2.SamplingParams = _ALL_OPTIONS
) -> Join:
    # One more token than the prompt is decoded, and it must fit too.
    num_tokens = max(1, min(num_tokens, shape.max_model_len - 1, shape.num_blocks * shape.block_size - 1))
    num_blocks = num_tokens // shape.block_size + 1
    return Join(
        slot=slot,
        token_ids=np.zeros(num_tokens, dtype=np.int32),
        num_prompt_tokens=num_tokens,
        num_computed_tokens=0,
        block_ids=np.arange(num_blocks, dtype=np.int32),
        sampling_params=params,
    )


def _plan(
    leave_slots: Ints = _EMPTY,
    joins: tuple[Join, ...] = (),
    decode_slots: Ints | None = None,
    chunk_slots: Ints = _EMPTY,
    chunk_num_tokens: Ints = _EMPTY,
) -> Plan:
    return Plan(
        epoch=0,
        step_id=0,
        leave_slots=leave_slots,
        joins=joins,
        append_slots=_EMPTY,
        append_block_ids=np.zeros(0, dtype=np.int32),
        decode_slots=decode_slots,
        chunk_slots=chunk_slots,
        chunk_num_tokens=chunk_num_tokens,
    )
