"""Exact top-k and top-p over a vocabulary spread over ranks, without gathering or sorting logits.

Both ask for the greatest threshold t for which the tokens with logit >= t weigh at least a target: k where each token
weighs 1, and p times the whole mass where it weighs its probability. Logits become unsigned keys of the same order, and
three passes of a radix histogram (11, 11 and 10 bits from the top) find t's key; ranks add up the histograms.

Weights are integers, so sums are exact in any order: the threshold is the same on every rank, at any number of ranks
and on any device. Probabilities are in units of 2**-44 of the likeliest token's.
"""

import torch

from .vocab import VocabSlice

_PASSES = ((21, 11), (10, 11), (0, 10))  # shift and width of each digit of the 32-bit key
_MASS_SCALE = 2.0**44  # times a vocabulary of at most 2**18 tokens, a sum stays under 2**63
_LEAST = torch.finfo(torch.float32).min


def mask_top_k(logits: torch.Tensor, k: torch.Tensor, vocab: VocabSlice) -> torch.Tensor:
    """Logits [n, size] with all but each row's k greatest (and those equal to the least of them) at -inf.

    k: [n] int64, at least 1.
    """
    keys = _ordered_keys(logits)
    return logits.masked_fill(keys < _threshold(keys, torch.ones_like(keys), k, vocab)[:, None], -torch.inf)


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
    """float32 to int64 in [0, 2**32), in the same order."""
    # Adding 0 makes -0.0 the 0.0 that it equals.
    bits = (logits + 0.0).contiguous().view(torch.int32)
    flipped = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats descend with their bits
    return flipped.long() + 2**31


def _threshold(keys: torch.Tensor, weights: torch.Tensor, target: torch.Tensor, vocab: VocabSlice) -> torch.Tensor:
    """[n]: the greatest key for which the weights of keys at least as great reach `target`."""
    prefix = torch.zeros_like(target)
    for shift, width in _PASSES:
        candidates = weights.masked_fill((keys >> (shift + width)) != prefix[:, None], 0)
        digits = (keys >> shift) & ((1 << width) - 1)
        histogram = weights.new_zeros((len(keys), 1 << width)).scatter_add_(1, digits, candidates)
        digit, above = _pick(vocab.tp.all_reduce(histogram), target)
        prefix = (prefix << width) | digit
        target = target - above
    return prefix


def _pick(histogram: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The greatest digit at which the weight from the top reaches `target`, and the weight above that digit."""
    from_top = histogram.flip(1).cumsum(1)
    index = (from_top >= target[:, None]).int().argmax(dim=1, keepdim=True)
    above = from_top.gather(1, index) - histogram.flip(1).gather(1, index)
    return histogram.shape[1] - 1 - index.squeeze(1), above.squeeze(1)
