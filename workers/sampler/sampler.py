"""The sampler: logits of this rank's vocabulary slice to token ids that all ranks agree on.

Order, as vLLM's users expect it: logit_bias, bad_words and min_tokens; penalties; temperature; min_p; top_k; top_p;
then Gumbel-max. Logprobs are of the logits as the model made them. Nothing here waits for the device.
"""

from dataclasses import dataclass

import torch

from .bad_words import apply_bad_words
from .batch import RandomRows, SamplingBatch
from .bias import apply_bias
from .gumbel import gumbel_noise
from .logprobs import Logprobs, logprobs_of, measure
from .penalties import apply_penalties
from .truncation import truncate
from .vocab import VocabSlice

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class Context:
    """What the sequences of a batch are made of so far."""

    token_table: torch.Tensor  # [num_slots, width] int32: the slot table's token ids
    positions: torch.Tensor  # [n] int64: of the tokens to be sampled
    longest: int  # the greatest of positions, known to the host


@dataclass(frozen=True, slots=True)
class Sampled:
    """Tokens of one step, on the device."""

    token_ids: torch.Tensor  # [n] int64
    logprobs: Logprobs | None  # of the batch's logprob rows


def sample(logits: torch.Tensor, batch: SamplingBatch, context: Context, vocab: VocabSlice) -> Sampled:
    """Samples one token for each row of logits [n, vocab.size] float32, which are overwritten."""
    wanted = batch.logprobs
    raw = None if wanted is None else measure(logits[wanted.rows], max(wanted.counts), vocab)
    if not batch.is_greedy:
        _process(logits, batch, context, vocab)
    token_ids = vocab.argmax(logits)
    if wanted is None or raw is None:
        return Sampled(token_ids, None)
    return Sampled(token_ids, logprobs_of(raw, token_ids[wanted.rows], vocab))


def _process(logits: torch.Tensor, batch: SamplingBatch, context: Context, vocab: VocabSlice) -> None:
    """Turns logits into scores, in place, whose argmax is the sampled token."""
    if batch.bias is not None:
        apply_bias(logits, context.positions, batch.bias)
    if batch.bad_words is not None:
        apply_bad_words(logits, batch.bad_words, context.token_table, batch.slots, context.positions)
    if batch.penalties is not None:
        tokens = context.token_table[batch.slots[batch.penalties.rows], : context.longest]
        apply_penalties(logits, batch.penalties, tokens, context.positions, vocab)
    if batch.random is not None:
        _randomise(logits, batch.random, context.positions, vocab)


def _randomise(logits: torch.Tensor, random: RandomRows, positions: torch.Tensor, vocab: VocabSlice) -> None:
    chosen = logits[random.rows] / random.temperature
    # NaN and +inf would spoil the sums that truncation needs.
    chosen.nan_to_num_(nan=-torch.inf, posinf=_LARGEST, neginf=-torch.inf)
    truncate(chosen, random.truncation, vocab)
    chosen += gumbel_noise(random.seeds, positions[random.rows], vocab)
    logits.index_copy_(0, random.rows, chosen)
