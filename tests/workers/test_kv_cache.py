"""The KV cache's shape, and how many blocks are made of a device's memory."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from octavo.errors import ResourceExhaustedError
from octavo.workers.device_memory import DeviceMemory
from octavo.workers.kv_cache import FP8, BlockBudget, KVCache, num_blocks_that_fit
from octavo.workers.plan import BlockMoves

MIB = 1024 * 1024
CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
BUDGET = BlockBudget(
    bytes_per_block=MIB, block_size=16, max_num_seqs=4, max_model_len=100, gpu_memory_utilization=0.5
)  # fmt: skip
# 1000 MiB of which 200 are used: half of all, less what is used, is 300 MiB.
MEMORY = DeviceMemory(total_bytes=1000 * MIB, free_bytes=800 * MIB)


def test_the_cache_is_zeroed_and_as_large_as_it_says():
    shape = {"num_layers": 2, "block_size": 4, "num_kv_heads": 3, "head_dim": 6}
    cache = KVCache(num_blocks=5, dtype=torch.bfloat16, device=CPU, **shape)
    keys, values = cache.layers[1]
    assert keys.shape == values.shape == (5, 4, 3, 6)
    assert keys.data_ptr() != values.data_ptr()
    assert not cache.keys.any()
    assert not cache.values.any()
    num_bytes = cache.keys.nbytes + cache.values.nbytes
    assert num_bytes == 5 * KVCache.bytes_per_block(dtype=torch.bfloat16, **shape)


@pytest.mark.parametrize(("num_layers", "head_dim", "num_groups"), [(5, 8, 13), (2, 6, 6), (32, 128, 65), (1, 256, 3)])
def test_a_cache_in_fp8_keeps_its_scales_in_further_rows(num_layers, head_dim, num_groups):
    shape = {"num_layers": num_layers, "block_size": 8, "num_kv_heads": 3, "head_dim": head_dim, "dtype": FP8}
    cache = KVCache(num_blocks=4, device=CPU, **shape)
    assert cache.num_bytes == 4 * KVCache.bytes_per_block(**shape) == 4 * num_groups * 8 * 3 * head_dim
    assert cache.rows.block_bytes == KVCache.bytes_per_block(**shape)
    for i, (keys, values, scales) in enumerate(cache.layers):
        assert keys.dtype == values.dtype == FP8
        assert scales.shape == (4, 3, 8)
        assert scales[0].is_contiguous()
        assert not scales.any(), "no two layers share scales"
        scales.copy_(torch.arange(4 * 3 * 8).view(4, 3, 8) + 100 * i + 1)
    assert not cache.keys.view(torch.uint8).any()
    assert not cache.values.view(torch.uint8).any()
    # A block is moved with its scales.
    cache.copy(BlockMoves(np.array([1], dtype=np.int32), np.array([3], dtype=np.int32)))
    for i, (_, _, scales) in enumerate(cache.layers):
        assert torch.equal(scales[:3].flatten(), torch.arange(3 * 3 * 8, dtype=torch.int32) + 100 * i + 1)
        assert torch.equal(scales[3], scales[1])


def test_a_gpu_gives_all_that_its_share_leaves():
    assert num_blocks_that_fit(CUDA, BUDGET, MEMORY) == 300
    assert num_blocks_that_fit(CUDA, replace(BUDGET, activation_bytes=100 * MIB), MEMORY) == 200
    assert num_blocks_that_fit(CUDA, replace(BUDGET, num_ranks_on_device=3), MEMORY) == 100


def test_a_cpu_gives_no_more_than_can_be_used():
    assert num_blocks_that_fit(CPU, BUDGET, MEMORY) == 4 * 7
    assert num_blocks_that_fit(CPU, replace(BUDGET, max_num_seqs=1000), MEMORY) == 300
    large = DeviceMemory(total_bytes=10**6 * MIB, free_bytes=10**6 * MIB)
    assert num_blocks_that_fit(CPU, replace(BUDGET, max_num_seqs=10**6), large) == 4096
    assert num_blocks_that_fit(CPU, replace(BUDGET, max_num_seqs=10**6, num_ranks_on_device=2), large) == 2048


def test_the_override_is_taken_if_it_fits():
    assert num_blocks_that_fit(CPU, replace(BUDGET, num_blocks_override=500), MEMORY) == 500
    with pytest.raises(ResourceExhaustedError) as error:
        num_blocks_that_fit(CPU, replace(BUDGET, num_blocks_override=500, num_ranks_on_device=2), MEMORY)
    assert str(error.value) == (
        "500 KV blocks take 500.0 MiB, and cpu has 800.0 MiB free for 2 rank(s); "
        "lower --num-gpu-blocks-override, or leave it out to use what fits"
    )


def test_too_little_memory_for_one_block_names_the_remedies():
    with pytest.raises(ResourceExhaustedError) as error:
        num_blocks_that_fit(CUDA, replace(BUDGET, bytes_per_block=301 * MIB), MEMORY)
    assert str(error.value) == (
        "too little memory on cuda:0 for one KV block: it takes 301.0 MiB, and 300.0 MiB are left of 1,000.0 MiB at "
        "gpu_memory_utilization 0.5; raise --gpu-memory-utilization, lower --block-size, or use more ranks"
    )


def test_this_hosts_memory():
    memory = DeviceMemory.of(CPU)
    assert 0 < memory.free_bytes <= memory.total_bytes
