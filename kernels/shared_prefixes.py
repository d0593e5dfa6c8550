"""What the decodes of a step have in common: prefixes that many of them share, and how attention to those is cut.

A prefix in the cache is one run of blocks, however many sequences begin with it. A program of
kernels/prefix_attention.py reads it once for a tile of sequences, not once for each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from .batch import SharedPrefix
from .chunk_splits import ChunkTile, chunk_tile

JOB_SIZE = 8  # numbers of a job, see PrefixJobs
# Two programs fit a multiprocessor; more parts of a prefix than fill it twice only cost their merge.
_PROGRAMS_PER_SM = 2
_MAX_PARTS = 16
_MIN_KEYS_PER_PART = 128


@dataclass(frozen=True, slots=True)
class PrefixJobs:
    """The work of one layer's attention to prefixes for each KV head; the same for all layers of a step."""

    # [num_jobs, JOB_SIZE] int32: the first of the job's rows in `rows`, their number, the slot whose blocks it reads,
    # its keys [start, end), which part of the prefix these are, and nothing twice.
    jobs: torch.Tensor
    rows: torch.Tensor  # int32: rows of the step, job by job
    num_keys: torch.Tensor  # [num_rows] int32: of each decode's prefix; 0 without one
    num_parts: torch.Tensor  # [num_rows] int32: parts of it, each of which leaves a partial result
    max_parts: int  # places that a row has for them
    tile: ChunkTile


def max_prefix_parts(num_rows: int, num_heads: int, num_kv_heads: int, num_sms: int) -> int:
    """Parts that a prefix is cut into at most in a step of so many decodes: few rows are few programs."""
    tiles = -(-num_rows * (num_heads // num_kv_heads) // 64)
    return min(_MAX_PARTS, max(1, _PROGRAMS_PER_SM * num_sms // (tiles * num_kv_heads)))


def plan_prefix_jobs(
    prefixes: Sequence[SharedPrefix],
    num_rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    num_sms: int,
) -> PrefixJobs | None:
    """On the CPU. Takes of each prefix what is whole tiles of keys; None if that is nothing, or if no tile can hold the
    heads. `dtype`: of the queries; no row is in two of `prefixes`."""
    tile = chunk_tile(num_heads // num_kv_heads, head_dim, dtype)
    if tile is None:
        return None
    prefixes = [replace(prefix, num_keys=prefix.num_keys // tile.keys * tile.keys) for prefix in prefixes]
    prefixes = [prefix for prefix in prefixes if prefix.num_keys]
    if not prefixes:
        return None
    max_parts = max_prefix_parts(num_rows, num_heads, num_kv_heads, num_sms)
    wanted = _keys_per_part(prefixes, tile, num_kv_heads, num_sms)
    jobs: list[tuple[int, ...]] = []
    rows: list[int] = []
    num_keys, num_parts = np.zeros((2, num_rows), dtype=np.int32)
    for prefix in prefixes:
        keys = _round_up(max(wanted, -(-prefix.num_keys // max_parts)), tile.keys)
        starts = range(0, prefix.num_keys, keys)
        members = list(prefix.rows)
        num_keys[members], num_parts[members] = prefix.num_keys, len(starts)
        for first in range(0, len(members), tile.queries):
            some = members[first : first + tile.queries]
            for part, start in enumerate(starts):
                end = min(start + keys, prefix.num_keys)
                jobs.append((len(rows), len(some), prefix.slot, start, end, part, 0, 0))
            rows += some
    return PrefixJobs(
        jobs=torch.tensor(jobs, dtype=torch.int32),
        rows=torch.tensor(rows, dtype=torch.int32),
        num_keys=torch.from_numpy(num_keys),
        num_parts=torch.from_numpy(num_parts),
        max_parts=max_parts,
        tile=tile,
    )


def _keys_per_part(prefixes: Sequence[SharedPrefix], tile: ChunkTile, num_kv_heads: int, num_sms: int) -> int:
    """So that all programs together fill the GPU."""
    work = sum(-(-len(prefix.rows) // tile.queries) * prefix.num_keys for prefix in prefixes) * num_kv_heads
    return max(_MIN_KEYS_PER_PART, -(-work // (_PROGRAMS_PER_SM * num_sms)))


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step


def sent(jobs: PrefixJobs, device: torch.device) -> PrefixJobs:
    """The plan on `device`, in one transfer that nothing waits for."""
    parts = jobs.jobs.flatten(), jobs.rows, jobs.num_keys, jobs.num_parts
    packed = torch.cat(parts)
    if device.type == "cuda":
        packed = packed.pin_memory()
    table, rows, num_keys, num_parts = packed.to(device, non_blocking=True).split([len(part) for part in parts])
    return replace(jobs, jobs=table.view(-1, JOB_SIZE), rows=rows, num_keys=num_keys, num_parts=num_parts)
