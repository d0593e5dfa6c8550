"""What the sampler has to do for one set of rows, on the device. Built when the set changes, not at each step."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..transfer import send_both, to_device
from .bad_words import BadWords, build_bad_words
from .bias import BiasEntries, build_bias
from .penalties import Penalties, build_penalties
from .rows import build_column
from .table import SamplingTable
from .truncation import Truncation
from .vocab import VocabSlice


@dataclass(frozen=True, slots=True)
class RandomRows:
    """Rows that draw, on the device; the others are greedy."""

    rows: torch.Tensor  # [r] int64
    temperature: torch.Tensor  # [r, 1] float32
    seeds: torch.Tensor  # [r, 2] int64: low and high 32 bits
    truncation: Truncation  # its rows are indexes into these


@dataclass(frozen=True, slots=True)
class DrawnRows:
    """The same on the host."""

    rows: NDArray[np.int64]
    temperature: NDArray[np.float32]
    seeds: NDArray[np.int64]
    min_p: NDArray[np.float32]
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float32]

    def to(self, device: torch.device) -> RandomRows:
        log_min_p = np.log(np.maximum(self.min_p, np.finfo(np.float32).tiny))
        return RandomRows(
            rows=to_device(self.rows.copy(), device),
            temperature=to_device(self.temperature[:, None].copy(), device),
            seeds=to_device(self.seeds.copy(), device),
            truncation=Truncation(
                log_min_p=build_column(log_min_p, self.min_p > 0, device),
                top_k=build_column(self.top_k, self.top_k > 0, device),
                top_p=build_column(self.top_p, self.top_p < 1, device),
            ),
        )


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


@dataclass(frozen=True)
class SamplingBatch:
    """One set of rows. A feature is None when no row uses it; then none of its work is done."""

    slots: torch.Tensor | None  # [n] int64; None where the logits stay as they are
    bias: BiasEntries | None
    bad_words: BadWords | None
    penalties: Penalties | None
    drawn: DrawnRows | None
    columns: DrawColumns
    logprobs: LogprobRows | None

    @cached_property
    def random(self) -> RandomRows | None:
        """The drawn rows on the device: sent once somebody asks, which kernels that read `columns` do not."""
        return None if self.drawn is None else self.drawn.to(self.columns.temperature.device)

    @cached_property
    def is_cut(self) -> bool:
        """Whether any row that draws keeps only its likelier tokens."""
        drawn = self.drawn
        return drawn is not None and bool(drawn.min_p.any() or drawn.top_k.any() or (drawn.top_p < 1).any())

    @property
    def changes_logits(self) -> bool:
        """Whether single logits change before the draw."""
        return not (self.bias is None and self.bad_words is None and self.penalties is None)


def build_batch(
    table: SamplingTable, slots: NDArray[np.int64], num_prompt: NDArray[np.int64], vocab: VocabSlice
) -> SamplingBatch:
    """The batch of rows with `slots` [n], whose sequences have `num_prompt` [n] prompt tokens."""
    device = vocab.tp.device
    bias = build_bias(table, slots, num_prompt, vocab)
    bad_words = build_bad_words(table, slots, vocab)
    penalties = build_penalties(table, slots, num_prompt, device)
    stay = bias is None and bad_words is None and penalties is None
    return SamplingBatch(
        slots=None if stay else to_device(slots.copy(), device),
        bias=bias,
        bad_words=bad_words,
        penalties=penalties,
        drawn=_find_drawn(table, slots),
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
    seeds, temperatures = send_both(table.seeds[slots], temperature, device)
    return DrawColumns(temperatures, seeds, log_min_p, top_k, top_p)


def _send_unless_off(values: NDArray[Any], off: float, device: torch.device) -> torch.Tensor | None:
    return to_device(values, device) if (values != off).any() else None


def _find_drawn(table: SamplingTable, slots: NDArray[np.int64]) -> DrawnRows | None:
    (rows,) = np.nonzero(table.temperature[slots])
    if not len(rows):
        return None
    drawn = slots[rows]
    cuts = table.min_p[drawn], table.top_k[drawn], table.top_p[drawn]
    return DrawnRows(rows, table.temperature[drawn], table.seeds[drawn], *cuts)


def _build_logprobs(table: SamplingTable, slots: NDArray[np.int64], device: torch.device) -> LogprobRows | None:
    counts = table.num_logprobs[slots]
    (rows,) = np.nonzero(counts >= 0)
    if not len(rows):
        return None
    return LogprobRows(to_device(rows.copy(), device), tuple(rows.tolist()), tuple(counts[rows].tolist()))
