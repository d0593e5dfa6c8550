"""What the sampler has to do for one set of rows, on the device. Built when the set changes, not at each step."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..transfer import to_device
from .bad_words import BadWords, build_bad_words
from .bias import BiasEntries, build_bias
from .penalties import Penalties, build_penalties
from .rows import build_column
from .table import SamplingTable
from .truncation import Truncation
from .vocab import VocabSlice


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
    def is_plain(self) -> bool:
        """Whether temperature is all that lies between the logits and the tokens."""
        return not self.changes_logits and (self.random is None or self.random.truncation.is_off)

    @property
    def changes_logits(self) -> bool:
        """Whether single logits change before the draw."""
        return not (self.bias is None and self.bad_words is None and self.penalties is None)


def build_batch(
    table: SamplingTable, slots: NDArray[np.int64], num_prompt: NDArray[np.int64], vocab: VocabSlice
) -> SamplingBatch:
    """The batch of rows with `slots` [n], whose sequences have `num_prompt` [n] prompt tokens."""
    device = vocab.tp.device
    return SamplingBatch(
        slots=to_device(slots.copy(), device),
        bias=build_bias(table, slots, num_prompt, vocab),
        bad_words=build_bad_words(table, slots, vocab),
        penalties=build_penalties(table, slots, num_prompt, device),
        random=_build_random(table, slots, device),
        columns=_build_columns(table, slots, device),
        logprobs=_build_logprobs(table, slots, device),
    )


def _build_columns(table: SamplingTable, slots: NDArray[np.int64], device: torch.device) -> DrawColumns:
    temperature = table.temperature[slots]
    draws = temperature > 0
    log_min_p = top_k = top_p = None
    if draws.any():
        min_p = np.where(draws, table.min_p[slots], np.float32(0))
        if min_p.any():
            log_min_p = to_device(np.log(min_p, out=np.full_like(min_p, -np.inf), where=min_p > 0), device)
        top_k = _send_unless_off(np.where(draws, table.top_k[slots], 0), 0, device)
        top_p = _send_unless_off(np.where(draws, table.top_p[slots], np.float32(1)), 1, device)
    seeds = to_device(_halves(table.seed[slots]), device)
    return DrawColumns(to_device(temperature, device), seeds, log_min_p, top_k, top_p)


def _send_unless_off(values: NDArray[Any], off: float, device: torch.device) -> torch.Tensor | None:
    return to_device(values, device) if (values != off).any() else None


def _halves(seeds: NDArray[np.uint64]) -> NDArray[np.int64]:
    return np.stack([seeds & np.uint64(0xFFFFFFFF), seeds >> np.uint64(32)], axis=1).astype(np.int64)


def _build_random(table: SamplingTable, slots: NDArray[np.int64], device: torch.device) -> RandomRows | None:
    (rows,) = np.nonzero(table.temperature[slots])
    if not len(rows):
        return None
    drawn = slots[rows]
    min_p, top_k, top_p = table.min_p[drawn], table.top_k[drawn], table.top_p[drawn]
    log_min_p = np.log(np.maximum(min_p, np.finfo(np.float32).tiny))
    return RandomRows(
        rows=to_device(rows.copy(), device),
        temperature=to_device(table.temperature[drawn][:, None], device),
        seeds=to_device(_halves(table.seed[drawn]), device),
        truncation=Truncation(
            log_min_p=build_column(log_min_p, min_p > 0, device),
            top_k=build_column(top_k, top_k > 0, device),
            top_p=build_column(top_p, top_p < 1, device),
        ),
    )


def _build_logprobs(table: SamplingTable, slots: NDArray[np.int64], device: torch.device) -> LogprobRows | None:
    counts = table.num_logprobs[slots]
    (rows,) = np.nonzero(counts >= 0)
    if not len(rows):
        return None
    return LogprobRows(to_device(rows.copy(), device), tuple(rows.tolist()), tuple(counts[rows].tolist()))
