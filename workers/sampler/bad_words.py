"""bad_words: a token that would complete a forbidden sequence gets -inf.

What came before is read from the slot table on the device, so it includes tokens that the host has not seen.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..transfer import to_device
from .table import SamplingTable
from .vocab import VocabSlice


@dataclass(frozen=True, slots=True)
class BadWords:
    """One entry for each forbidden sequence whose last token is in this rank's vocabulary slice."""

    rows: torch.Tensor  # [m] int64
    columns: torch.Tensor  # [m] int64: the last token, as a column of the slice
    prefixes: torch.Tensor  # [m, longest] int32: the tokens before it, the nearest first, padded with -1


def build_bad_words(table: SamplingTable, slots: NDArray[np.int64], vocab: VocabSlice) -> BadWords | None:
    """Entries of the rows whose slots are `slots` [n]. None: no entries."""
    words: list[tuple[int, NDArray[np.int32]]] = []
    for row, slot in enumerate(slots.tolist()):
        extras = table.extras[slot]
        if extras is not None:
            words += [(row, word) for word in extras.bad_words if 0 <= word[-1] - vocab.start < vocab.size]
    if not words:
        return None
    prefixes = np.full((len(words), max(len(word) for _, word in words) - 1), -1, dtype=np.int32)
    for index, (_, word) in enumerate(words):
        prefixes[index, : len(word) - 1] = word[-2::-1] if len(word) > 1 else word[:0]
    device = vocab.tp.device
    return BadWords(
        rows=to_device(np.array([row for row, _ in words], dtype=np.int64), device),
        columns=to_device(np.array([int(word[-1]) - vocab.start for _, word in words], dtype=np.int64), device),
        prefixes=to_device(prefixes, device),
    )


def apply_bad_words(
    logits: torch.Tensor, words: BadWords, token_table: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor
) -> None:
    """Masks logits [n, size] in place.

    token_table: [num_slots, width] int32. slots, positions: [n] int64, of the rows and the tokens to be sampled.
    """
    distance = torch.arange(1, words.prefixes.shape[1] + 1, device=logits.device)
    before = positions[words.rows][:, None] - distance  # [m, longest]
    tokens = token_table[slots[words.rows][:, None], before.clamp(min=0)]
    matches = (words.prefixes < 0) | ((tokens == words.prefixes) & (before >= 0))
    values = torch.where(matches.all(dim=1), -torch.inf, 0.0)
    logits.index_put_((words.rows, words.columns), values, accumulate=True)
