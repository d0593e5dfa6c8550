"""Sampling parameters of the running sequences, by slot.

They come once, with the join, and the rows of a step change rarely in steady decoding; so they stay on the host, and
`workers.sampler.batch` moves what a set of rows needs to the device once for as long as the set stays the same.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import InvalidArgumentError
from ...proto import sampling_pb2

GREEDY_BELOW = 1e-5  # temperatures under this are greedy: dividing by them would overflow
MAX_LOGPROBS = 20
MAX_CANDIDATES = 1024  # likeliest tokens of a beam


@dataclass(frozen=True, slots=True)
class SlotExtras:
    """The ragged parameters of one slot."""

    bias_token_ids: NDArray[np.int32]
    bias_values: NDArray[np.float32]
    bad_words: tuple[NDArray[np.int32], ...]
    stop_token_ids: NDArray[np.int32]  # and what else min_tokens masks


class SamplingTable:
    """One entry of every column per slot; a column holds its "off" value where a request does not use it."""

    def __init__(self, num_slots: int) -> None:
        self.temperature = np.zeros(num_slots, dtype=np.float32)
        self.top_k = np.zeros(num_slots, dtype=np.int64)
        self.top_p = np.ones(num_slots, dtype=np.float32)
        self.min_p = np.zeros(num_slots, dtype=np.float32)
        self.presence_penalty = np.zeros(num_slots, dtype=np.float32)
        self.frequency_penalty = np.zeros(num_slots, dtype=np.float32)
        self.repetition_penalty = np.ones(num_slots, dtype=np.float32)
        self.seeds = np.zeros((num_slots, 2), dtype=np.int64)  # low and high 32 bits
        self.min_tokens = np.zeros(num_slots, dtype=np.int64)
        self.num_logprobs = np.full(num_slots, -1, dtype=np.int64)  # -1: none
        self.num_prompt_logprobs = np.full(num_slots, -1, dtype=np.int64)  # -1: none
        self.extras: list[SlotExtras | None] = [None] * num_slots  # None: the slot has none of them
        # Whether a temperature is all that lies between a slot's logits and its token.
        self.is_plain = np.ones(num_slots, dtype=np.bool_)

    def join(self, slot: int, params: sampling_pb2.SamplingParams, vocab_size: int) -> None:
        """Fills the slot's entries. Raises InvalidArgumentError for what no sampler could follow."""
        _check(params)
        self.temperature[slot] = params.temperature if params.temperature >= GREEDY_BELOW else 0
        self.top_k[slot] = params.top_k if 0 < params.top_k < vocab_size else 0
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.presence_penalty[slot] = params.presence_penalty
        self.frequency_penalty[slot] = params.frequency_penalty
        self.repetition_penalty[slot] = params.repetition_penalty
        self.seeds[slot] = params.seed & 0xFFFFFFFF, params.seed >> 32
        self.min_tokens[slot] = params.min_tokens
        self.num_logprobs[slot] = _count(params, "num_logprobs", MAX_CANDIDATES, vocab_size)
        self.num_prompt_logprobs[slot] = _count(params, "num_prompt_logprobs", MAX_LOGPROBS, vocab_size)
        self.extras[slot] = _extras(params, vocab_size)
        self.is_plain[slot] = self._draws_plainly(slot) and self.num_logprobs[slot] < 0

    def _draws_plainly(self, slot: int) -> bool:
        penalises = self.presence_penalty[slot] or self.frequency_penalty[slot] or self.repetition_penalty[slot] != 1
        cuts = self.top_k[slot] or self.top_p[slot] < 1 or self.min_p[slot]
        return not (penalises or self.extras[slot] is not None or (cuts and self.temperature[slot]))


def _count(params: sampling_pb2.SamplingParams, field: str, limit: int, vocab_size: int) -> int:
    if not params.HasField(field):
        return -1
    count: int = getattr(params, field)
    if count > limit:
        raise InvalidArgumentError(f"{field} is {count}; the limit is {limit}", field)
    return min(count, vocab_size)


def _check(params: sampling_pb2.SamplingParams) -> None:
    for field in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
        if not math.isfinite(getattr(params, field)):
            raise InvalidArgumentError(f"{field} is not a finite number", field)
    if params.temperature < 0:
        raise InvalidArgumentError("temperature is negative", "temperature")
    if not 0 < params.top_p <= 1:
        raise InvalidArgumentError("top_p is not in (0, 1]", "top_p")
    if not 0 <= params.min_p <= 1:
        raise InvalidArgumentError("min_p is not in [0, 1]", "min_p")
    if params.repetition_penalty <= 0:
        raise InvalidArgumentError("repetition_penalty is not positive", "repetition_penalty")


def _extras(params: sampling_pb2.SamplingParams, vocab_size: int) -> SlotExtras | None:
    stop_token_ids = [
        _ids(params.stop_token_ids, "stop_token_ids", vocab_size),
        _ids(params.masked_token_ids, "masked_token_ids", vocab_size),
    ]
    if not (params.logit_bias_token_ids or params.logit_bias_values or params.bad_words or params.min_tokens):
        return None
    extras = SlotExtras(
        bias_token_ids=_ids(params.logit_bias_token_ids, "logit_bias_token_ids", vocab_size),
        bias_values=_unpack(params.logit_bias_values, "<f4", "logit_bias_values").astype(np.float32),
        bad_words=tuple(_ids(word, "bad_words", vocab_size) for word in params.bad_words),
        stop_token_ids=np.concatenate(stop_token_ids),
    )
    if len(extras.bias_token_ids) != len(extras.bias_values):
        raise InvalidArgumentError("logit_bias_token_ids and logit_bias_values differ in length", "logit_bias_values")
    if not (extras.bias_values < np.inf).all():
        raise InvalidArgumentError("logit_bias_values has NaN or infinity", "logit_bias_values")
    if any(len(word) == 0 for word in extras.bad_words):
        raise InvalidArgumentError("bad_words has an empty sequence", "bad_words")
    masks_stops = params.min_tokens > 0 and len(extras.stop_token_ids) > 0
    return extras if len(extras.bias_token_ids) or extras.bad_words or masks_stops else None


def _ids(data: bytes, field: str, vocab_size: int) -> NDArray[np.int32]:
    ids = _unpack(data, "<i4", field).astype(np.int32)
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        raise InvalidArgumentError(f"{field} has a token id that is not in [0, {vocab_size})", field)
    return ids


def _unpack(data: bytes, dtype: str, field: str) -> NDArray[np.generic]:
    if len(data) % 4:
        raise InvalidArgumentError(f"{field} is not a packed array: {len(data)} bytes", field)
    return np.frombuffer(data, dtype=dtype)
