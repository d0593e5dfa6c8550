"""Blocks copied on write: what a fork computes from its copies is what an undisturbed sequence computes."""

import numpy as np
import pytest
import torch
from octavo.errors import FailedPreconditionError
from octavo.workers import block_rows
from octavo.workers.kv_cache import KVCache
from octavo.workers.plan import BlockMoves


def moves(pairs) -> BlockMoves:
    """pairs: (from, to)."""
    return BlockMoves(*np.array(pairs, dtype=np.int32).reshape(-1, 2).T)


def make_cache(dtype=torch.float32, **shape) -> KVCache:
    """Of random bits, NaNs among them: a copy must not look at what it copies."""
    sizes = {"num_layers": 3, "num_blocks": 12, "block_size": 4, "num_kv_heads": 2, "head_dim": 6} | shape
    cache = KVCache(**sizes, dtype=dtype, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for tensor in (cache.keys, cache.values):
        bits = torch.randint(0, 256, (tensor.nbytes,), generator=generator, dtype=torch.uint8)
        tensor.view(-1).view(torch.uint8).copy_(bits)
    return cache


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).clone()


@pytest.mark.parametrize("shape", [{}, {"block_size": 1, "num_kv_heads": 1, "head_dim": 5}], ids=["even", "odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("copy_bytes", [1, 1 << 20], ids=["piece by piece", "at once"])
def test_copies_reach_all_layers_and_nothing_else(copy_bytes, dtype, shape, monkeypatch):
    monkeypatch.setattr(block_rows, "_COPY_BYTES", copy_bytes)
    cache = make_cache(dtype, **shape)
    expected = [bits(tensor) for tensor in (cache.keys, cache.values)]
    for tensor in expected:
        tensor[:, [7, 0, 11]] = tensor[:, [3, 3, 5]]
    cache.copy(moves([(3, 7), (3, 0), (5, 11)]))
    for tensor, wanted in zip((cache.keys, cache.values), expected, strict=True):
        assert torch.equal(bits(tensor), wanted)


@pytest.mark.parametrize(
    ("pairs", "cause"),
    [
        ([(12, 0)], r"a block id is not in \[0, 12\)"),
        ([(0, 12)], r"a block id is not in \[0, 12\)"),
        ([(-1, 0)], r"a block id is not in \[0, 12\)"),
        ([(0, -1)], r"a block id is not in \[0, 12\)"),
        ([(0, 2), (1, 2)], "two blocks are moved to the same one"),
        ([(0, 1), (1, 2)], "copied from and to in one plan"),
    ],
)
def test_copies_that_mean_nothing_are_refused(pairs, cause):
    with pytest.raises(FailedPreconditionError, match=cause):
        make_cache().copy(moves(pairs))
