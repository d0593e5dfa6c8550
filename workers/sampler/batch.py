"""What the sampler has to do for one set of rows, on the device. Built when the set changes, not at each step."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..transfer import Parcel
from .bad_words import BadWords, build_bad_words
from .bias import BiasEntries, build_bias
from .penalties import Penalties, build_penalties
from .rows import build_column
from .table import SamplingTable
from .truncation import Truncation
from .vocab import VocabSlice

_PARCEL_BYTES = 64 * 1024  # all of 512 rows without penalties


@dataclass(frozen=True, slots=True)
class RandomRows:
    """Rows that draw; the others are greedy."""

    rows: torch.Tensor  # [r] int64
    temperature: torch.Tensor  # [r, 1] float32
    seeds: torch.Tensor  # [r, 2] int64: low and high 32 bits
    truncation: Truncation  # its rows are indexes into these


@dataclass(frozen=True, slots=True)
class DrawColumns:
    """What the draw needs to know of every row, greedy ones too, as kernels that take all rows at once read it."""

    temperature: torch.Tensor  # [n] float32, 0 where greedy
    seeds: torch.Tensor  # [n, 2] int64: low and high 32 bits
    log_min_p: torch.Tensor | None  # [n] float32: natural logarithm of min_p, -inf where off; None: no row has it
    top_k: torch.Tensor | None  # [n] int64, 0 where off
    top_p: torch.Tensor | None  # [n] float32, 1 where off


@dataclass(frozen=True, slots=True)
class LogprobRows:
    """Rows whose sampled token's logprobs are wanted."""

    rows: torch.Tensor  # [m] int64
    host_rows: tuple[int, ...]  # the same
    counts: tuple[int, ...]  # of likeliest tokens that each wants


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """One set of rows. A feature is None when no row uses it; then none of its work is done."""

    slots: torch.Tensor  # [n] int64
    bias: BiasEntries | None
    bad_words: BadWords | None
    penalties: Penalties | None
    random: RandomRows | None
    columns: DrawColumns
    logprobs: LogprobRows | None

    @property
    def changes_logits(self) -> bool:
        """Whether single logits change before the draw."""
        return not (self.bias is None and self.bad_words is None and self.penalties is None)


def build_batch(
    table: SamplingTable, slots: NDArray[np.int64], num_prompt: NDArray[np.int64], vocab: VocabSlice
) -> SamplingBatch:
    """The batch of rows with `slots` [n], whose sequences have `num_prompt` [n] prompt tokens."""
    with Parcel(vocab.tp.device, _PARCEL_BYTES) as parcel:
        return SamplingBatch(
            slots=parcel.add(slots.copy()),
            bias=build_bias(table, slots, num_prompt, vocab, parcel),
            bad_words=build_bad_words(table, slots, vocab, parcel),
            penalties=build_penalties(table, slots, num_prompt, parcel),
            random=_build_random(table, slots, parcel),
            columns=_build_columns(table, slots, parcel),
            logprobs=_build_logprobs(table, slots, parcel),
        )


def _build_columns(table: SamplingTable, slots: NDArray[np.int64], parcel: Parcel) -> DrawColumns:
    temperature = table.temperature[slots]
    draws = temperature > 0
    log_min_p = top_k = top_p = None
    if draws.any():
        min_p = np.where(draws, table.min_p[slots], np.float32(0))
        if min_p.any():
            log_min_p = parcel.add(np.log(min_p, out=np.full_like(min_p, -np.inf), where=min_p > 0))
        top_k = _send_unless_off(np.where(draws, table.top_k[slots], 0), 0, parcel)
        top_p = _send_unless_off(np.where(draws, table.top_p[slots], np.float32(1)), 1, parcel)
    return DrawColumns(parcel.add(temperature), parcel.add(table.seeds[slots]), log_min_p, top_k, top_p)


def _send_unless_off(values: NDArray[Any], off: float, parcel: Parcel) -> torch.Tensor | None:
    return parcel.add(values) if (values != off).any() else None


def _build_random(table: SamplingTable, slots: NDArray[np.int64], parcel: Parcel) -> RandomRows | None:
    (rows,) = np.nonzero(table.temperature[slots])
    if not len(rows):
        return None
    drawn = slots[rows]
    min_p, top_k, top_p = table.min_p[drawn], table.top_k[drawn], table.top_p[drawn]
    log_min_p = np.log(np.maximum(min_p, np.finfo(np.float32).tiny))
    return RandomRows(
        rows=parcel.add(rows.copy()),
        temperature=parcel.add(table.temperature[drawn][:, None]),
        seeds=parcel.add(table.seeds[drawn]),
        truncation=Truncation(
            log_min_p=build_column(log_min_p, min_p > 0, parcel),
            top_k=build_column(top_k, top_k > 0, parcel),
            top_p=build_column(top_p, top_p < 1, parcel),
        ),
    )


def _build_logprobs(table: SamplingTable, slots: NDArray[np.int64], parcel: Parcel) -> LogprobRows | None:
    counts = table.num_logprobs[slots]
    (rows,) = np.nonzero(counts >= 0)
    if not len(rows):
        return None
    return LogprobRows(parcel.add(rows.copy()), tuple(rows.tolist()), tuple(counts[rows].tolist()))
