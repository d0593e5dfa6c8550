"""Repetition, presence and frequency penalties.

Repetition follows CTRL (Keskar et al. 2019, 4.1) as transformers and vLLM apply it: positive logits of tokens in prompt
or output are divided, negative ones multiplied. Presence and frequency are OpenAI's and count the output alone.
Counts are made from the slot table on the device each step, for the rows that use them.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..transfer import to_device
from .table import SamplingTable
from .vocab import VocabSlice


@dataclass(frozen=True, slots=True)
class Penalties:
    """Penalties of the rows that have one."""

    host_rows: NDArray[np.int64]  # [m]
    rows: torch.Tensor  # [m] int64
    num_prompt: torch.Tensor  # [m] int64
    repetition: torch.Tensor  # [m, 1] float32
    presence: torch.Tensor  # [m, 1] float32
    frequency: torch.Tensor  # [m, 1] float32


def build_penalties(
    table: SamplingTable, slots: NDArray[np.int64], num_prompt: NDArray[np.int64], device: torch.device
) -> Penalties | None:
    """Penalties of the rows whose slots are `slots` [n], with `num_prompt` [n] prompt tokens. None: no row has one."""
    repetition, presence = table.repetition_penalty[slots], table.presence_penalty[slots]
    frequency = table.frequency_penalty[slots]
    (rows,) = np.nonzero((repetition != 1) | (presence != 0) | (frequency != 0))
    if not len(rows):
        return None
    return Penalties(
        host_rows=rows,
        rows=to_device(rows.copy(), device),
        num_prompt=to_device(num_prompt[rows], device),
        repetition=to_device(repetition[rows][:, None], device),
        presence=to_device(presence[rows][:, None], device),
        frequency=to_device(frequency[rows][:, None], device),
    )


def apply_penalties(
    logits: torch.Tensor, penalties: Penalties, tokens: torch.Tensor, positions: torch.Tensor, vocab: VocabSlice
) -> None:
    """Penalises logits [n, size] in place.

    tokens: [m, width] int32, the slot table's tokens of penalties.rows, at least up to the newest.
    positions: [n] int64, of the tokens to be sampled; tokens from there on are not known yet.
    """
    chosen = logits[penalties.rows]
    columns, here = vocab.local(tokens.long())
    index = torch.arange(tokens.shape[1], device=tokens.device)
    known = here & (index < positions[penalties.rows][:, None])
    is_output = known & (index >= penalties.num_prompt[:, None])
    seen = torch.zeros_like(chosen).scatter_add_(1, columns, known.float()) > 0
    num_output = torch.zeros_like(chosen).scatter_add_(1, columns, is_output.float())
    chosen = torch.where(
        seen, torch.where(chosen > 0, chosen / penalties.repetition, chosen * penalties.repetition), chosen
    )
    chosen -= penalties.frequency * num_output
    chosen -= penalties.presence * (num_output > 0)
    logits.index_copy_(0, penalties.rows, chosen)
