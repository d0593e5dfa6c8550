"""Log probabilities of the model's own distribution, over a vocabulary spread over ranks."""

from dataclasses import dataclass

import torch

from .vocab import VocabSlice


@dataclass(frozen=True, slots=True)
class Distribution:
    """What is kept of raw logits until the token is known."""

    logits: torch.Tensor  # [m, size] float32: this rank's slice
    log_mass: torch.Tensor  # [m]: logarithm of the sum of exp(logits) over all ranks
    top_logits: torch.Tensor  # [m, k], descending, over all ranks
    top_ids: torch.Tensor  # [m, k] int64


@dataclass(frozen=True, slots=True)
class Logprobs:
    """About one token a row: itself first, then the likeliest ones in order."""

    token_ids: torch.Tensor  # [m, 1 + k] int32
    logprobs: torch.Tensor  # [m, 1 + k] float32
    ranks: torch.Tensor  # [m] int32: of column 0; 1 is the likeliest


def measure(logits: torch.Tensor, num_top: int, vocab: VocabSlice) -> Distribution:
    """The distribution of raw logits [m, size] of any dtype, with its `num_top` likeliest tokens. May keep `logits`."""
    logits = logits.float()
    likeliest = vocab.max(logits)
    mass = vocab.tp.all_reduce(torch.exp(logits - likeliest[:, None]).sum(dim=-1))
    top_logits, top_ids = _top(logits, num_top, vocab)
    return Distribution(logits, likeliest + mass.log(), top_logits, top_ids)


def logprobs_of(distribution: Distribution, token_ids: torch.Tensor, vocab: VocabSlice) -> Logprobs:
    """Logprobs of `token_ids` [m] int64, one for each row."""
    columns, here = vocab.local(token_ids)
    own = distribution.logits.gather(1, columns[:, None]).squeeze(1)
    own = vocab.tp.all_reduce_max(own.masked_fill(~here, -torch.inf))
    better = vocab.tp.all_reduce((distribution.logits > own[:, None]).sum(dim=-1))
    logits = torch.cat([own[:, None], distribution.top_logits], dim=1)
    return Logprobs(
        token_ids=torch.cat([token_ids[:, None], distribution.top_ids], dim=1).int(),
        logprobs=logits - distribution.log_mass[:, None],
        ranks=(better + 1).int(),
    )


def _top(logits: torch.Tensor, num_top: int, vocab: VocabSlice) -> tuple[torch.Tensor, torch.Tensor]:
    if num_top == 0:
        return logits.new_empty((len(logits), 0)), torch.empty(
            (len(logits), 0), dtype=torch.int64, device=logits.device
        )
    values, columns = logits.topk(min(num_top, vocab.size), dim=-1)
    if vocab.tp.size > 1:
        # float64 holds a float32 logit and a token id exactly, so one message carries both.
        pairs = torch.stack([values.double(), (columns + vocab.start).double()], dim=-1)
        gathered = vocab.tp.all_gather(pairs).permute(1, 0, 2, 3).flatten(1, 2)  # [m, ranks * k, 2]
        merged, order = gathered[..., 0].topk(num_top, dim=-1)
        values, columns = merged.float(), gathered[..., 1].gather(1, order).long()
    # NaN logits may bring padding to the top; its ids must not leave the worker.
    return values, columns.clamp(max=vocab.vocab_size - 1)
