"""The sampler: logits of this rank's vocabulary slice to token ids that all ranks agree on.

Order, as vLLM's users expect it: logit_bias, bad_words and min_tokens; penalties; temperature; min_p; top_k; top_p;
then Gumbel-max. Logprobs are of the logits as the model made them. Nothing here waits for the device.
"""

from dataclasses import dataclass

import torch

from .bad_words import apply_bad_words
from .batch import SamplingBatch
from .bias import apply_bias
from .logprobs import Logprobs, logprobs_of, measure
from .operations import SamplerOperations, sampler_operations_for
from .vocab import VocabSlice


@dataclass(frozen=True, slots=True)
class Context:
    """What the sequences of a batch are made of so far."""

    token_table: torch.Tensor  # [num_slots, width] int32: the slot table's token ids
    positions: torch.Tensor  # [n] int64: of the tokens to be sampled
    longest: int  # the greatest of positions, known to the host


@dataclass(frozen=True, slots=True)
class Sampled:
    """Tokens of one step, on the device."""

    token_ids: torch.Tensor  # [n] int64; -1 where no score was finite
    logprobs: Logprobs | None  # of the batch's logprob rows


def sample(
    logits: torch.Tensor,
    batch: SamplingBatch,
    context: Context,
    vocab: VocabSlice,
    ops: SamplerOperations | None = None,
) -> Sampled:
    """Samples one token for each row of logits [n, vocab.size], in the model's dtype, which may be overwritten.

    `ops` are those of the logits' device unless given.
    """
    ops = ops or sampler_operations_for(logits.device)
    wanted = batch.logprobs
    raw = None if wanted is None else measure(logits[wanted.rows], max(wanted.counts), vocab)
    if batch.changes_logits:
        logits = logits.float()
        _change(logits, batch, context, vocab, ops)
    token_ids = ops.draw(logits, batch, context.positions, vocab)
    if wanted is None or raw is None:
        return Sampled(token_ids, None)
    return Sampled(token_ids, logprobs_of(raw, token_ids[wanted.rows], vocab))


def _change(
    logits: torch.Tensor, batch: SamplingBatch, context: Context, vocab: VocabSlice, ops: SamplerOperations
) -> None:
    """Applies in place what comes before the temperature."""
    assert batch.slots is not None, "they are there where logits change"
    if batch.bias is not None:
        apply_bias(logits, context.positions, batch.bias)
    if batch.bad_words is not None:
        apply_bad_words(logits, batch.bad_words, context.token_table, batch.slots, context.positions)
    if batch.penalties is not None:
        tokens = context.token_table[batch.slots[batch.penalties.rows], : context.longest]
        ops.penalise(logits, batch.penalties, tokens, context.positions, vocab)
