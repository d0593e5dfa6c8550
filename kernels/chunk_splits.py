"""How the keys of few queries behind a long context are cut over a GPU: the plan of a step's prompt chunks.

A chunk of 16 tokens has one tile of queries for each KV head, whose program would walk the whole context while most of
the GPU idles. So programs share a tile's keys, as in kernels/decode_splits.py; the host knows all lengths, so it lists
what each program takes. How many share a tile is chosen by a model of the kernel's time, counted in keys that a program
alone on its multiprocessor walks in that time (some 90 are 1 us on an H100).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from .paged_cache import padded

Ints = NDArray[np.int64]
Reals = NDArray[np.float64]

JOB_SIZE = 8  # numbers of a job, see ChunkSplits
MERGE_SIZE = 4
_TILE_ROWS = 64  # what Hopper's tensor cores want for each 4 warps
MAX_GROUP = _TILE_ROWS  # query heads of a KV head that a tile can hold
# Programs share a multiprocessor in twos at most: more find no room for their copies in flight. Two take longer each.
_PROGRAMS_PER_SM = 2
_SHARED_SLOWDOWN = 1.5
# What the merge takes in keys: its launch, and what each split writes and it reads.
_MERGE_KEYS = 512
_KEYS_PER_PARTIAL = 2
# The plan and its way to the device must pay too: splitting is to take this part of the time at most.
_MAX_SHARE_OF_TIME = 0.8
_MIN_KEYS = 1024
_MIN_KEYS_PER_SPLIT = 128


@dataclass(frozen=True, slots=True)
class ChunkTile:
    """How the kernel is cut. A tile's rows are the query heads of a KV head, query by query."""

    rows: int
    queries: int
    keys: int
    num_warps: int
    num_stages: int


def chunk_tile(group: int, head_dim: int, dtype: torch.dtype) -> ChunkTile | None:
    """For `group` query heads to a KV head; None if a tile cannot hold one query's."""
    if group > MAX_GROUP:
        return None
    if dtype == torch.float32:
        # Computed without tensor cores, from registers.
        return ChunkTile(padded(group), padded(group) // group, 32, 4, 1)
    return ChunkTile(_TILE_ROWS, _TILE_ROWS // group, 64, 4, 3 if head_dim <= 128 else 2)


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """A step's chunks as the host knows them, [num_rows] each."""

    query_starts: Ints  # each one's first token in the step
    query_lens: Ints
    seq_lens: Ints  # its keys, the query tokens' included

    @classmethod
    def of(cls, query_starts: Sequence[int], seq_lens: Sequence[int]) -> "ChunkRows":
        """query_starts: one more than rows, as in AttentionBatch."""
        starts = np.array(query_starts, dtype=np.int64)
        return cls(starts[:-1], np.diff(starts), np.array(seq_lens, dtype=np.int64))


@dataclass(frozen=True, slots=True)
class ChunkSplits:
    """The work of one layer's attention for each KV head; the same for all layers of a step."""

    # [num_jobs, JOB_SIZE] int32, those with the most keys first: the tile's row, its first query token, how many
    # queries it has, the position of the first, the job's keys [start, end), the place of its partial result or -1 if
    # it has all keys of the tile, and nothing. Every query of the tile sees the job's first key.
    jobs: torch.Tensor
    # [num_split_tiles, MERGE_SIZE] int32: first query token, number of queries, first partial result, their number.
    merges: torch.Tensor
    num_partials: int
    tile: ChunkTile


def max_partials(num_kv_heads: int, num_sms: int) -> int:
    """Partial results of one KV head that a plan may need: programs that share a tile fill the GPU twice at most."""
    return _PROGRAMS_PER_SM * num_sms // num_kv_heads


def num_splits(rows: ChunkRows, tile: ChunkTile, num_kv_heads: int, num_sms: int) -> Ints | None:
    """For each row into how many parts the keys of its tiles are best cut; None if that is not worth a merge."""
    longest = int(rows.seq_lens.max(initial=0))
    if longest < _MIN_KEYS:
        return None
    num_programs = -(-rows.query_lens // tile.queries) * num_kv_heads
    work = float((num_programs * (rows.seq_lens - rows.query_lens / 2)).sum())
    worth_it = _MAX_SHARE_OF_TIME * float(_time(num_programs.sum(), np.array(longest), work, num_sms))
    # No plan is faster than a GPU that is full all the time.
    if _full_time(work, num_sms) + _MERGE_KEYS > worth_it:
        return None
    most = min(longest // _MIN_KEYS_PER_SPLIT, max_partials(num_kv_heads, num_sms))
    counts = np.arange(2, most + 1)[:, None]  # of the longest row; others have as many as come to the same keys
    splits = np.maximum(-(-rows.seq_lens * counts // longest), 1)
    programs = num_programs * splits
    partials = np.where(splits > 1, programs, 0).sum(1)
    times = _time(programs.sum(1), (rows.seq_lens / splits).max(1), work, num_sms)
    times += _MERGE_KEYS + _KEYS_PER_PARTIAL * partials
    times[partials > _PROGRAMS_PER_SM * num_sms] = np.inf
    best = int(times.argmin()) if len(times) else 0
    return splits[best] if len(times) and times[best] <= worth_it else None


def _time(num_programs: Ints, longest: Reals, work: float, num_sms: int) -> Reals:
    """Of programs that walk `work` keys together and `longest` each at most."""
    shared = longest * _SHARED_SLOWDOWN
    # Where more come than fit at once, half of the GPU idles while the last ones run.
    late = np.where(num_programs > _PROGRAMS_PER_SM * num_sms, _full_time(work, num_sms) - shared / 2, 0)
    return np.where(num_programs <= num_sms, longest, shared + late)


def _full_time(work: float, num_sms: int) -> float:
    return work / (_PROGRAMS_PER_SM * num_sms) * _SHARED_SLOWDOWN


def cut(rows: ChunkRows, splits: Ints, tile: ChunkTile) -> ChunkSplits:
    """The keys of each tile in at most so many parts of whole tiles of keys, on the CPU. splits: [num_rows]."""
    num_tiles = -(-rows.query_lens // tile.queries)
    row, within = _spread(num_tiles)
    first_query = within * tile.queries
    num_queries = np.minimum(tile.queries, rows.query_lens[row] - first_query)
    first_token = rows.query_starts[row] + first_query
    position = (rows.seq_lens - rows.query_lens)[row] + first_query
    # The last part has the keys behind the first query too, so that every query sees each part's first key.
    share = _round_up(-(-(position + 1) // np.maximum(splits, 1)[row]), tile.keys)
    parts = -(-(position + 1) // share)
    of_tile, part = _spread(parts)
    start = part * share[of_tile]
    end = np.where(part == parts[of_tile] - 1, (position + num_queries)[of_tile], start + share[of_tile])
    partials = np.where(parts > 1, parts, 0)
    first_partial = np.cumsum(partials) - partials
    partial = np.where(parts[of_tile] > 1, first_partial[of_tile] + part, -1)
    of_tiles = (x[of_tile] for x in (row, first_token, num_queries, position))
    jobs = np.stack([*of_tiles, start, end, partial, np.zeros_like(part)], 1)[np.argsort(start - end, kind="stable")]
    merges = np.stack([first_token, num_queries, first_partial, parts], 1)[parts > 1]
    return ChunkSplits(_as_tensor(jobs), _as_tensor(merges), int(partials.sum()), tile)


def _as_tensor(table: Ints) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(table, dtype=np.int32))


def _spread(counts: Ints) -> tuple[Ints, Ints]:
    """For each of so many of each: which it is of, and which of those it is."""
    which = np.repeat(np.arange(len(counts)), counts)
    return which, np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)


def _round_up(counts: Ints, step: int) -> Ints:
    return -(-counts // step) * step


def plan_chunk_splits(
    rows: ChunkRows, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, num_sms: int
) -> ChunkSplits | None:
    """The plan of a step's chunks, on the CPU; None if each tile's keys are best left to one program."""
    tile = chunk_tile(num_heads // num_kv_heads, head_dim, dtype)
    splits = None if tile is None else num_splits(rows, tile, num_kv_heads, num_sms)
    return None if tile is None or splits is None else cut(rows, splits, tile)


def sent(splits: ChunkSplits, device: torch.device) -> ChunkSplits:
    """The plan on `device`, in one transfer that nothing waits for."""
    packed = torch.cat((splits.jobs.flatten(), splits.merges.flatten()))
    if device.type == "cuda":
        packed = packed.pin_memory()
    jobs, merges = packed.to(device, non_blocking=True).split((splits.jobs.numel(), splits.merges.numel()))
    return ChunkSplits(jobs.view(-1, JOB_SIZE), merges.view(-1, MERGE_SIZE), splits.num_partials, splits.tile)


@dataclass(frozen=True, slots=True)
class ChunkWorkspace:
    """What splits leave for the merge. One serves every call of its shape, one call after the other."""

    partials: torch.Tensor  # [num_partials * num_kv_heads * tile rows * head_dim] float32: each split's attention
    log_sums: torch.Tensor  # [num_partials * num_kv_heads * tile rows] float32: log2 of its sum of exponentials

    def check(self, num_rows: int, head_dim: int) -> None:
        """Raises ValueError if a call with so many rows of partial results needs more."""
        if self.log_sums.numel() < num_rows or self.partials.numel() < num_rows * head_dim:
            raise ValueError(f"a workspace of {self.log_sums.numel()} rows of partial results: {num_rows} needed")


def chunk_workspace(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, num_sms: int, device: torch.device
) -> ChunkWorkspace:
    """For every plan that plan_chunk_splits makes: 8 MiB for heads of 128 in half precisions."""
    tile = chunk_tile(num_heads // num_kv_heads, head_dim, dtype)
    num_rows = 0 if tile is None else max_partials(num_kv_heads, num_sms) * num_kv_heads * tile.rows
    return ChunkWorkspace(
        partials=torch.empty(num_rows * head_dim, dtype=torch.float32, device=device),
        log_sums=torch.empty(num_rows, dtype=torch.float32, device=device),
    )
