"""logit_bias and the min_tokens mask: values added to single logits."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..transfer import to_device
from .table import SamplingTable
from .vocab import VocabSlice


@dataclass(frozen=True, slots=True)
class BiasEntries:
    """One entry for each biased token of this rank's vocabulary slice."""

    rows: torch.Tensor  # [m] int64
    columns: torch.Tensor  # [m] int64, of the slice
    values: torch.Tensor  # [m] float32
    until: torch.Tensor  # [m] int64: the first position of a sampled token that the entry no longer touches


def build_bias(
    table: SamplingTable, slots: NDArray[Any], num_prompt: NDArray[Any], vocab: VocabSlice
) -> BiasEntries | None:
    """Entries of the rows whose slots are `slots` [n]; num_prompt [n] counts their prompt tokens. None: no entries."""
    rows, ids, values, until = [], [], [], []
    for row, slot in enumerate(slots.tolist()):
        extras = table.extras[slot]
        if extras is None:
            continue
        stop_ids = extras.stop_token_ids if table.min_tokens[slot] else extras.stop_token_ids[:0]
        count = len(extras.bias_token_ids) + len(stop_ids)
        rows.append(np.full(count, row, dtype=np.int64))
        ids.append(np.concatenate([extras.bias_token_ids, stop_ids]).astype(np.int64))
        values.append(np.concatenate([extras.bias_values, np.full(len(stop_ids), -np.inf, dtype=np.float32)]))
        forever = np.full(len(extras.bias_token_ids), np.iinfo(np.int64).max)
        until.append(np.concatenate([forever, np.full(len(stop_ids), num_prompt[row] + table.min_tokens[slot])]))
    if not rows:
        return None
    return _on_device(np.concatenate(rows), np.concatenate(ids), np.concatenate(values), np.concatenate(until), vocab)


def _on_device(
    rows: NDArray[Any], ids: NDArray[Any], values: NDArray[Any], until: NDArray[Any], vocab: VocabSlice
) -> BiasEntries | None:
    here = (ids >= vocab.start) & (ids < vocab.start + vocab.size)
    if not here.any():
        return None
    device = vocab.tp.device
    return BiasEntries(
        rows=to_device(rows[here], device),
        columns=to_device(ids[here] - vocab.start, device),
        values=to_device(values[here], device),
        until=to_device(until[here], device),
    )


def apply_bias(logits: torch.Tensor, positions: torch.Tensor, entries: BiasEntries) -> None:
    """Adds the entries to logits [n, size] in place. positions: [n] int64, of the tokens to be sampled."""
    values = torch.where(positions[entries.rows] < entries.until, entries.values, 0.0)
    logits.index_put_((entries.rows, entries.columns), values, accumulate=True)
