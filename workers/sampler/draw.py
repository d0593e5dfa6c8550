"""The draw in torch: temperature, truncation and Gumbel noise for the rows that draw, then the greatest score."""

import torch

from .batch import RandomRows
from .gumbel import gumbel_noise
from .truncation import truncate
from .vocab import VocabSlice

_LARGEST = torch.finfo(torch.float32).max


def draw(logits: torch.Tensor, random: RandomRows | None, positions: torch.Tensor, vocab: VocabSlice) -> torch.Tensor:
    """Tokens [n] int64 of logits [n, size] of any dtype, which may be overwritten; -1 where no score is finite.

    positions: [n] int64, of the tokens to be sampled.
    """
    scores = logits.float()
    if random is not None:
        drawn = _randomised(scores[random.rows], random, positions[random.rows], vocab)
        scores.index_copy_(0, random.rows, drawn)
    return vocab.argmax(scores)


def _randomised(logits: torch.Tensor, random: RandomRows, positions: torch.Tensor, vocab: VocabSlice) -> torch.Tensor:
    """Scores whose argmax is the draw; `logits` [r, size] are overwritten."""
    return tempered(logits, random, vocab).add_(gumbel_noise(random.seeds, positions, vocab))


def tempered(logits: torch.Tensor, random: RandomRows, vocab: VocabSlice) -> torch.Tensor:
    """Finite scores or -inf, without those that truncation takes; `logits` [r, size] float32 are overwritten."""
    # A product with the inverse is what kernels compute too, in fewer instructions than a quotient.
    scores = logits.mul_(random.temperature.reciprocal())
    # NaN and +inf would spoil the sums that truncation needs.
    scores.nan_to_num_(nan=-torch.inf, posinf=_LARGEST, neginf=-torch.inf)
    truncate(scores, random.truncation, vocab)
    return scores
