"""min_p, top_k and top_p in Triton: for each row the least score, logit / temperature, that may still be drawn.

All three are thresholds, applied in this order: min_p's is the greatest score plus log(min_p). Top-k's and top-p's are
the greatest t for which tokens with score >= t weigh at least a target: k where each token weighs 1, p times the whole
mass where it weighs its probability among those not cut yet. Scores become 32-bit keys of the same order, and three
passes of a radix histogram (11, 11 and 10 bits from the top) find t's key. Ranks add up the histograms; weights are
integers, so every rank finds the same at any number of ranks.

One pass reads all logits, for the greatest score of every 128 columns. What is below a threshold by that is not read
again: the kth greatest of these maxima is a first bound for top-k, since k scores are at least that. Nothing else of
the vocabulary's size is written; each pass makes scores, keys and weights again. The twin is
workers/sampler/truncation.py, from which top_p may differ where exp does, in the last place.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .scores import GROUP, Kept, ordered, temper

_MAXIMA_BLOCK = 2048
_BLOCK = 512  # columns that are counted, or skipped, together
_ENOUGH_PROGRAMS = 2048  # some more than an H200 holds at once
# Shift and width of each digit of the key, and the sign bit in the first, which counts from the bottom.
_PASSES = ((21, 11, 1 << 10), (10, 11, 0), (0, 10, 0))
_NUM_BINS = 1 << 11  # that a histogram has room for

Reduce = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Cuts:
    """What each row cuts off, one entry a row of the logits. None: no row does; a single row is off as said."""

    log_min_p: torch.Tensor | None  # [num_rows] float32: natural logarithm of min_p, -inf where off
    top_k: torch.Tensor | None  # [num_rows] int64, 0 where off
    top_p: torch.Tensor | None  # [num_rows] float32, 1 where off


@triton.jit
def _is_used(limit: tl.tensor, is_mass: tl.constexpr) -> tl.tensor:
    return limit < 1 if is_mass else limit > 0


@triton.jit
def _raise_threshold(threshold_ptr: tl.tensor, key: tl.tensor) -> None:
    """To the score that has the key, unless that is less, or none."""
    threshold = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    earlier = tl.load(threshold_ptr)
    tl.store(threshold_ptr, tl.where(threshold > earlier, threshold, earlier))


@triton.jit(do_not_specialize=["num_blocks"])  # it depends on the batch, which must not compile anything
def _maxima_kernel(
    logits_ptr: tl.tensor,  # [num_rows, size], rows `row_stride` apart
    temperature_ptr: tl.tensor,  # [num_rows] float32
    maxima_ptr: tl.tensor,  # [num_rows, num_groups] float32
    row_stride: tl.tensor,
    size: tl.tensor,
    num_groups: tl.tensor,
    num_blocks: tl.tensor,
    group: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    inverse_temperature = tl.div_rn(1.0, tl.where(temperature > 0, temperature, 1.0))
    for index in range(num_blocks):
        first_group = (tl.program_id(1) * num_blocks + index) * (block // group)
        groups = first_group + tl.arange(0, block // group)
        columns = groups[:, None] * group + tl.arange(0, group)[None, :]
        logits = tl.load(logits_ptr + row * row_stride + columns, columns < size, other=-float("inf"))
        maxima = tl.max(temper(logits, inverse_temperature), axis=1)
        tl.store(maxima_ptr + row * num_groups + groups, maxima, groups < num_groups)


@triton.jit
def _bound_kernel(
    maxima_ptr: tl.tensor,  # [num_rows, num_groups] float32
    top_k_ptr: tl.tensor,  # [num_rows] int64
    thresholds_ptr: tl.tensor,  # [num_rows] float32
    num_groups: tl.tensor,
    block: tl.constexpr,
) -> None:
    """Raises each threshold to the kth greatest of the maxima, of whose key 16 bits are enough for a bound."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.load(top_k_ptr + row)
    if (k > 0) & (k <= num_groups):
        groups = tl.arange(0, block)
        maxima = tl.load(maxima_ptr + row * num_groups + groups, groups < num_groups, other=-float("inf"))
        places = (ordered(maxima) >> 16) + 0x8000  # from 0 on; what is no group shares the last with -inf
        place = 0
        for bit in tl.static_range(15, -1, -1):
            higher = place | (1 << bit)
            place = tl.where(tl.sum((places >= higher).to(tl.int32), axis=0) >= k, higher, place)
        _raise_threshold(thresholds_ptr + row, (place - 0x8000) << 16)


@triton.jit(do_not_specialize=["num_blocks"])
def _histogram_kernel(
    logits_ptr: tl.tensor,  # [num_rows, size], rows `row_stride` apart
    temperature_ptr: tl.tensor,  # [num_rows] float32
    limits_ptr: tl.tensor,  # [num_rows]: top_p or top_k
    thresholds_ptr: tl.tensor,  # [num_rows] float32: of earlier cuts
    maxima_ptr: tl.tensor,  # [num_rows, num_groups] float32
    highest_ptr: tl.tensor,  # [num_rows] float32: over all ranks; read for mass alone
    prefixes_ptr: tl.tensor,  # [num_rows] int32: the digits found so far, in place; not read in the first pass
    histogram_ptr: tl.tensor,  # [num_rows, num_bins] int32, or int64 of mass; zero at first
    row_stride: tl.tensor,
    size: tl.tensor,
    num_groups: tl.tensor,
    num_blocks: tl.tensor,
    is_mass: tl.constexpr,
    shift: tl.constexpr,
    width: tl.constexpr,
    sign: tl.constexpr,
    num_bins: tl.constexpr,
    group: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    bins_ptr = histogram_ptr + row * num_bins
    limit = tl.load(limits_ptr + row)
    if _is_used(limit, is_mass):
        inverse_temperature = tl.div_rn(1.0, tl.load(temperature_ptr + row))
        threshold = tl.load(thresholds_ptr + row)
        highest = tl.maximum(tl.load(highest_ptr + row), -3.4028234663852886e38)
        if is_mass:
            # All of fewer than 2**19 tokens below this weigh less than 1 - p of the likeliest: none is kept.
            negligible = highest + tl.log(1.0 - limit) - 13.169796943664551
            rest = tl.zeros([block], tl.int64)
        for index in range(num_blocks):
            first = (tl.program_id(1) * num_blocks + index) * block
            groups = first // group + tl.arange(0, block // group)
            maxima = tl.load(maxima_ptr + row * num_groups + groups, groups < num_groups, other=-float("inf"))
            if tl.max(maxima, axis=0) >= threshold:
                columns = first + tl.arange(0, block)
                logits = tl.load(logits_ptr + row * row_stride + columns, columns < size, other=-float("inf"))
                scores = temper(logits, inverse_temperature)
                counted = (columns < size) & (scores >= threshold)
                keys = ordered(scores)
                digits = ((keys >> shift) & ((1 << width) - 1)) ^ sign
                if sign == 0:
                    prefix = tl.load(prefixes_ptr + row)
                    counted &= (keys >> (shift + width)) == (prefix >> (shift + width))
                if is_mass:
                    # Units of 2**-44 of the likeliest token's: a sum over fewer than 2**19 tokens stays under 2**63.
                    mass = (tl.exp(scores - highest) * 17592186044416.0).to(tl.int64)
                    if sign != 0:
                        rest += tl.where(counted & (scores < negligible), mass, 0)
                        counted &= scores >= negligible
                    tl.atomic_add(bins_ptr + digits, mass, counted & (mass > 0), sem="relaxed")
                else:
                    tl.atomic_add(bins_ptr + digits, 1, counted, sem="relaxed")
        if is_mass and sign != 0:
            # The lowest bin is of no score: there it counts as mass, and is never picked.
            tl.atomic_add(bins_ptr, tl.sum(rest, axis=0), sem="relaxed")


@triton.jit
def _pick_kernel(
    histogram_ptr: tl.tensor,  # [num_rows, num_bins] int32, or int64 of mass
    limits_ptr: tl.tensor,  # [num_rows]: top_p or top_k
    targets_ptr: tl.tensor,  # [num_rows] int64: the weight still to be reached, of tokens with the digits so far
    prefixes_ptr: tl.tensor,  # [num_rows] int32
    thresholds_ptr: tl.tensor,  # [num_rows] float32
    is_mass: tl.constexpr,
    shift: tl.constexpr,
    width: tl.constexpr,
    sign: tl.constexpr,
    num_bins: tl.constexpr,
) -> None:
    """Finds the greatest digit at which the weight from the top reaches the target."""
    row = tl.program_id(0).to(tl.int64)
    limit = tl.load(limits_ptr + row)
    if _is_used(limit, is_mass):
        bins = tl.arange(0, 1 << width)
        weights = tl.load(histogram_ptr + row * num_bins + bins).to(tl.int64)
        if sign != 0:
            prefix = 0
            if is_mass:
                target = tl.ceil(tl.sum(weights, axis=0).to(tl.float64) * limit.to(tl.float64)).to(tl.int64)
                target = tl.maximum(target, 1)
            else:
                target = limit
        else:
            prefix = tl.load(prefixes_ptr + row)
            target = tl.load(targets_ptr + row)
        from_top = tl.cumsum(weights, axis=0, reverse=True)
        digit = tl.max(tl.where(from_top >= target, bins, 0), axis=0)
        prefix |= (digit ^ sign) << shift
        if shift == 0:
            # Fewer may be left than k, or no mass at all: then no score has the key.
            _raise_threshold(thresholds_ptr + row, prefix)
        else:
            tl.store(prefixes_ptr + row, prefix)
            tl.store(targets_ptr + row, target - tl.sum(tl.where(bins > digit, weights, 0), axis=0))


def find_kept(
    logits: torch.Tensor, temperature: torch.Tensor, cuts: Cuts, sum_ranks: Reduce, max_ranks: Reduce
) -> Kept:
    """What the cuts keep, over all ranks.

    logits: [num_rows, size] float32 or a half precision, this rank's part of the vocabulary, each row contiguous, -inf
    for columns that are no tokens; temperature: [num_rows] float32, above 0 in rows that cut. sum_ranks and max_ranks
    combine a tensor elementwise over the ranks; on one rank they are the identity.
    """
    scores = _Scores(logits, temperature)
    thresholds = torch.full((len(logits),), -torch.inf, dtype=torch.float32, device=logits.device)
    highest = thresholds
    if cuts.log_min_p is not None or cuts.top_p is not None:
        highest = max_ranks(scores.maxima.amax(dim=1))
    if cuts.log_min_p is not None:
        thresholds = highest + cuts.log_min_p
    if cuts.top_k is not None:
        scores.bound_top_k(thresholds, cuts.top_k)
        scores.raise_thresholds(thresholds, cuts.top_k, None, sum_ranks)
    if cuts.top_p is not None:
        scores.raise_thresholds(thresholds, cuts.top_p, highest, sum_ranks)
    return Kept(thresholds, scores.maxima)


class _Scores:
    """Logits that are read as scores, and their groups' maxima."""

    def __init__(self, logits: torch.Tensor, temperature: torch.Tensor) -> None:
        assert logits.stride(1) == 1, "each row is contiguous"
        self._logits, self._temperature = logits, temperature
        num_rows, size = logits.shape
        self._num_groups = triton.cdiv(size, GROUP)
        self.maxima = torch.empty((num_rows, self._num_groups), dtype=torch.float32, device=logits.device)
        num_blocks, grid = self._split(_MAXIMA_BLOCK)
        _maxima_kernel[grid](
            logits,
            temperature,
            self.maxima,
            logits.stride(0),
            size,
            self._num_groups,
            num_blocks,
            group=GROUP,
            block=_MAXIMA_BLOCK,
            num_warps=4,
        )

    def _split(self, block: int) -> tuple[int, tuple[int, int]]:
        """Blocks of one program, and the grid."""
        num_rows, size = self._logits.shape
        all_blocks = triton.cdiv(size, block)
        num_blocks = max(1, min(num_rows * all_blocks // _ENOUGH_PROGRAMS, all_blocks))
        return num_blocks, (num_rows, triton.cdiv(all_blocks, num_blocks))

    def bound_top_k(self, thresholds: torch.Tensor, top_k: torch.Tensor) -> None:
        """Raises thresholds to what top-k cuts off for certain, in place."""
        block = triton.next_power_of_2(self._num_groups)
        _bound_kernel[(len(thresholds),)](
            self.maxima, top_k, thresholds, self._num_groups, block=block, num_warps=min(max(block // 256, 1), 8)
        )

    def raise_thresholds(
        self, thresholds: torch.Tensor, limits: torch.Tensor, highest: torch.Tensor | None, sum_ranks: Reduce
    ) -> None:
        """Top-k, or with `highest` top-p, among the scores not below `thresholds`, in place."""
        num_rows, is_mass = len(thresholds), highest is not None
        prefixes = torch.empty(num_rows, dtype=torch.int32, device=thresholds.device)
        targets = torch.empty(num_rows, dtype=torch.int64, device=thresholds.device)
        dtype = torch.int64 if is_mass else torch.int32
        num_blocks, grid = self._split(_BLOCK)
        histograms = torch.zeros((len(_PASSES), num_rows, _NUM_BINS), dtype=dtype, device=thresholds.device)
        for histogram, (shift, width, sign) in zip(histograms, _PASSES, strict=True):
            _histogram_kernel[grid](
                self._logits,
                self._temperature,
                limits,
                thresholds,
                self.maxima,
                thresholds if highest is None else highest,
                prefixes,
                histogram,
                self._logits.stride(0),
                self._logits.shape[1],
                self._num_groups,
                num_blocks,
                is_mass=is_mass,
                shift=shift,
                width=width,
                sign=sign,
                num_bins=_NUM_BINS,
                group=GROUP,
                block=_BLOCK,
                num_warps=4,
            )
            _pick_kernel[(num_rows,)](
                sum_ranks(histogram),
                limits,
                targets,
                prefixes,
                thresholds,
                is_mass=is_mass,
                shift=shift,
                width=width,
                sign=sign,
                num_bins=_NUM_BINS,
                num_warps=4,
            )
