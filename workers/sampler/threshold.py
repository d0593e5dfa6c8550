"""Exact top-k and top-p over a vocabulary spread over ranks, without gathering or sorting logits.

Both ask for the greatest threshold t for which the tokens with logit >= t weigh at least a target: k where each token
weighs 1, and p times the whole mass where it weighs its probability. Logits become 32-bit keys of the same order, and
three passes of a radix histogram (11, 11 and 10 bits from the top) find t's key; ranks add up the histograms.

Weights are integers, so sums are exact in any order: the threshold is the same on every rank, at any number of ranks
and on any device. Probabilities are in units of 2**-44 of the likeliest token's.
"""

import torch

from .vocab import VocabSlice

# Shift and width of each digit of the 32-bit key, and the sign bit in the first, which counts from the bottom.
_PASSES = ((21, 11, 1 << 10), (10, 11, 0), (0, 10, 0))
_MASS_SCALE = 2.0**44  # times a vocabulary of at most 2**18 tokens, a sum stays under 2**63
_LEAST = torch.finfo(torch.float32).min


def mask_top_k(logits: torch.Tensor, k: torch.Tensor, vocab: VocabSlice) -> torch.Tensor:
    """Logits [n, size] with all but each row's k greatest (and those equal to the least of them) at -inf.

    k: [n] int64, at least 1.
    """
    keys = _ordered_keys(logits)
    ones = torch.ones_like(keys, dtype=torch.int64)
    return logits.masked_fill(keys < _threshold(keys, ones, k, vocab)[:, None], -torch.inf)


def mask_top_p(logits: torch.Tensor, p: torch.Tensor, vocab: VocabSlice) -> torch.Tensor:
    """Logits [n, size] with all but each row's smallest set of likeliest tokens that has mass p at -inf.

    p: [n] float32 in (0, 1]. Mass is relative to the tokens that are not masked already.
    """
    likeliest = vocab.max(logits).clamp_(min=_LEAST)
    mass = (torch.exp(logits - likeliest[:, None]) * _MASS_SCALE).long()
    total = vocab.tp.all_reduce(mass.sum(dim=-1))
    target = (total.double() * p.double()).ceil().long().clamp_(min=1)
    keys = _ordered_keys(logits)
    return logits.masked_fill(keys < _threshold(keys, mass, target, vocab)[:, None], -torch.inf)


def _ordered_keys(logits: torch.Tensor) -> torch.Tensor:
    """float32 to int32 in the same order."""
    # Adding 0 makes -0.0 the 0.0 that it equals.
    bits = (logits + 0.0).contiguous().view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats descend with their bits


def _threshold(keys: torch.Tensor, weights: torch.Tensor, target: torch.Tensor, vocab: VocabSlice) -> torch.Tensor:
    """[n] int32: the greatest key for which the weights of keys at least as great reach `target`."""
    threshold = torch.zeros_like(target, dtype=torch.int32)
    for shift, width, sign in _PASSES:
        digits = (((keys >> shift) & (1 << width) - 1) ^ sign).long()
        histogram = weights.new_zeros((len(keys), 1 << width)).scatter_add_(1, digits, weights)
        digit, above = _pick(vocab.tp.all_reduce(histogram), target)
        threshold |= (digit ^ sign).int() << shift
        target = target - above
        if shift:
            weights = weights.masked_fill(digits != digit[:, None], 0)
    return threshold


def _pick(histogram: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The greatest digit at which the weight from the top reaches `target`, and the weight above that digit."""
    from_top = histogram.flip(1).cumsum(1)
    index = (from_top >= target[:, None]).int().argmax(dim=1, keepdim=True)
    above = from_top.gather(1, index) - histogram.flip(1).gather(1, index)
    return histogram.shape[1] - 1 - index.squeeze(1), above.squeeze(1)
