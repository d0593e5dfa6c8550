"""min_p, top_k and top_p, in this order, each for the rows that use it."""

from dataclasses import dataclass

import torch

from .rows import Column
from .threshold import mask_top_k, mask_top_p
from .vocab import VocabSlice


@dataclass(frozen=True, slots=True)
class Truncation:
    """Which rows keep only their likelier tokens. None: no row does."""

    log_min_p: Column | None  # natural logarithm of min_p
    top_k: Column | None
    top_p: Column | None


def truncate(logits: torch.Tensor, truncation: Truncation, vocab: VocabSlice) -> None:
    """Sets the logits [n, size] of tokens that are cut off to -inf, in place. The likeliest token always stays."""
    if truncation.log_min_p is not None:
        rows, values = truncation.log_min_p.rows, truncation.log_min_p.values
        kept = logits[rows]
        floor = vocab.max(kept) + values
        logits.index_copy_(0, rows, kept.masked_fill(kept < floor[:, None], -torch.inf))
    if truncation.top_k is not None:
        rows, values = truncation.top_k.rows, truncation.top_k.values
        logits.index_copy_(0, rows, mask_top_k(logits[rows], values, vocab))
    if truncation.top_p is not None:
        rows, values = truncation.top_p.rows, truncation.top_p.values
        logits.index_copy_(0, rows, mask_top_p(logits[rows], values, vocab))
