"""Gumbel noise for sampling: argmax(logits + noise) draws from softmax(logits).

The noise of a token depends on the request's seed, the position to sample and the token's id alone: so a request draws
the same in any batch, at any number of ranks and when it is replayed.
"""

import torch

from .philox import philox
from .vocab import VocabSlice


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, vocab: VocabSlice) -> torch.Tensor:
    """Standard Gumbel noise, [n, vocab.size] float32, of this rank's columns.

    seeds: [n, 2] int64, the low and the high 32 bits. positions: [n] int64, of the token to be sampled.
    """
    first, last = vocab.start // 4, (vocab.start + vocab.size - 1) // 4
    groups = torch.arange(first, last + 1, device=seeds.device)  # [num_groups]: four tokens each
    zero = torch.zeros((), dtype=torch.int64, device=seeds.device)
    words = philox((positions[:, None], groups[None, :], zero, zero), (seeds[:, :1], seeds[:, 1:]))
    bits = torch.stack(words, dim=-1).flatten(1)  # [n, 4 * num_groups]
    offset = vocab.start - 4 * first
    uniform = (bits[:, offset : offset + vocab.size].float() + 0.5) * 2.0**-32
    # Small numbers, where floats are dense, make the large noise, so unlikely tokens get their due. The largest ones
    # round up to 1.0, whose noise would be infinite.
    uniform.clamp_(max=1.0 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()
