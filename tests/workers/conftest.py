"""Ranks as threads of one process, and paged steps of a model without a model runner."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import reduce

import pytest
import torch
from octavo.kernels.batch import AttentionBatch
from octavo.workers.kv_cache import KVCache
from octavo.workers.parallel import TensorParallel

CPU = torch.device("cpu")


class Meeting:
    """Where the threads of one group exchange tensors."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=30)
        self._tensors = [None] * size

    def exchange(self, rank: int, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._tensors[rank] = tensor.clone()
        self._barrier.wait()
        tensors = list(self._tensors)
        self._barrier.wait()
        return tensors

    def abort(self) -> None:
        self._barrier.abort()


@dataclass(slots=True, eq=False)
class ThreadParallel(TensorParallel):
    """A rank that is a thread; the collectives are what TensorParallel says of them."""

    meeting: Meeting = None

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(sum(self.meeting.exchange(self.rank, tensor)))

    def start_all_reduce(self, tensor: torch.Tensor, larger: torch.Tensor):
        assert larger.dtype == tensor.dtype
        assert 0 <= len(larger) - len(tensor) <= 1
        self.all_reduce(tensor)
        return lambda: (tensor,)

    def all_reduce_max(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(reduce(torch.maximum, self.meeting.exchange(self.rank, tensor)))

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.meeting.exchange(self.rank, tensor))

    def min_int(self, value: int) -> int:
        return int(min(self.meeting.exchange(self.rank, torch.tensor(value))))


def _run_ranks(size: int, function) -> list:
    if size == 1:
        return [function(TensorParallel(0, 1, CPU))]
    meeting = Meeting(size)

    def run(rank: int):
        try:
            return function(ThreadParallel(rank, size, CPU, meeting=meeting))
        except BaseException:
            meeting.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


@pytest.fixture(scope="session")
def run_ranks():
    """run_ranks(size, function) calls function(tp) on every rank at once; their results, by rank."""
    return _run_ranks


@dataclass(slots=True)
class PagedSequences:
    """Sequences in one KV cache, their blocks shuffled; `step` computes the next tokens of some of them."""

    model: object
    tokens: list[list[int]]
    block_size: int = 8
    num_computed: list[int] = field(init=False)
    tables: torch.Tensor = field(init=False)
    cache: KVCache = field(init=False)

    def __post_init__(self) -> None:
        config = self.model.config
        max_blocks = -(-max(map(len, self.tokens)) // self.block_size)
        num_blocks = max_blocks * len(self.tokens)
        shuffle = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1))
        self.num_computed = [0] * len(self.tokens)
        self.tables = shuffle.int().view(len(self.tokens), max_blocks)
        self.cache = KVCache(
            num_layers=config.num_layers, num_blocks=num_blocks, block_size=self.block_size,
            num_kv_heads=self.model.num_kv_heads, head_dim=config.head_dim, dtype=self.model.dtype, device=CPU,
        )  # fmt: skip

    def step(self, counts: dict[int, int]) -> dict[int, torch.Tensor]:
        """counts: how many tokens of each sequence, by index. The logits of those tokens, [count, local_vocab_size]."""
        rows = sorted(counts, key=lambda i: counts[i] > 1)
        positions = [torch.arange(counts[i]) + self.num_computed[i] for i in rows]
        blocks = [self.tables[i][where // self.block_size] for i, where in zip(rows, positions, strict=True)]
        for i in rows:
            self.num_computed[i] += counts[i]
        position = torch.cat(positions)
        starts = torch.tensor([0, *(counts[i] for i in rows)]).cumsum(0).tolist()
        batch = AttentionBatch(
            num_decode_rows=sum(count == 1 for count in counts.values()),
            positions=position,
            kv_indices=torch.cat(blocks).long() * self.block_size + position % self.block_size,
            block_tables=self.tables,
            slots=torch.tensor(rows),
            seq_lens=torch.tensor([self.num_computed[i] for i in rows], dtype=torch.int32),
            query_starts=torch.tensor(starts, dtype=torch.int32),
            host_seq_lens=tuple(self.num_computed[i] for i in rows),
            host_query_starts=tuple(starts),
        )
        ids = [self.tokens[i][p] for i, where in zip(rows, positions, strict=True) for p in where.tolist()]
        logits = self.model.logits(self.model.forward(torch.tensor(ids), batch, self.cache))
        return dict(zip(rows, logits.split([counts[i] for i in rows]), strict=True))

    def run(self, schedule: list[list[int]]) -> list[torch.Tensor]:
        """schedule: the tokens of each step, by sequence. The logits of every token, by sequence."""
        found = [[] for _ in self.tokens]
        for index in range(max(map(len, schedule))):
            counts = {i: steps[index] for i, steps in enumerate(schedule) if index < len(steps)}
            for i, logits in self.step(counts).items():
                found[i].append(logits)
        return [torch.cat(parts) for parts in found]


@pytest.fixture(scope="session")
def paged_sequences():
    return PagedSequences
