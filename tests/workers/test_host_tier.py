"""Blocks on their way between device and host; and whether the host has room for them."""

import weakref

import numpy as np
import pytest
import torch
from octavo.errors import FailedPreconditionError, InvalidArgumentError, ResourceExhaustedError
from octavo.proto import engine_pb2, worker_pb2
from octavo.workers.device_memory import DeviceMemory
from octavo.workers.host_memory import check_swap_space, num_host_blocks
from octavo.workers.host_tier import HostTier
from octavo.workers.kv_cache import KVCache
from octavo.workers.model_loader import load_model
from octavo.workers.plan import decode_plan
from octavo.workers.runner_builder import RunnerBuilder

MIB = 1024 * 1024
NUM_BLOCKS, NUM_HOST_BLOCKS = 24, 17
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


def make_plan(step_id=1, saves=(), loads=(), finished=0):
    """Through the wire's form. saves, loads: (from, to) pairs."""

    def pack(pairs, side) -> bytes:
        return np.array([pair[side] for pair in pairs], "<i4").tobytes()

    return decode_plan(
        worker_pb2.BatchPlan(
            step_id=step_id, finished_transfers=finished,
            save_block_ids=pack(saves, 0), save_host_ids=pack(saves, 1),
            load_host_ids=pack(loads, 0), load_block_ids=pack(loads, 1),
        )
    )  # fmt: skip


def make_cache(device="cpu", dtype=torch.float32, num_blocks=NUM_BLOCKS, **shape) -> KVCache:
    """Filled with random bits."""
    sizes = {"num_layers": 3, "block_size": 4, "num_kv_heads": 2, "head_dim": 6} | shape
    cache = KVCache(num_blocks=num_blocks, dtype=dtype, device=torch.device(device), **sizes)
    generator = torch.Generator().manual_seed(0)
    for tensor in (cache.keys, cache.values):
        values = torch.randint(0, 256, (tensor.nbytes,), generator=generator, dtype=torch.uint8)
        tensor.view(-1).view(torch.uint8).copy_(values)
    return cache


def bits(cache) -> torch.Tensor:
    """[2, num_layers, num_blocks, bytes] on the host."""
    both = torch.stack([cache.keys, cache.values]).view(2, cache.num_layers, cache.num_blocks, -1)
    return both.view(torch.uint8).cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("blocks_staged", [0, 1, 3, 100])
def test_blocks_come_back_as_they_were_saved(blocks_staged, dtype, device):
    cache = make_cache(device, dtype)
    tier = HostTier(cache, NUM_HOST_BLOCKS, blocks_staged * cache.rows.block_bytes)
    saved = bits(cache)
    # Host blocks out of order, in runs of several lengths.
    host_ids = [9, 10, 11, 3, 2, 16, 0, 12]
    block_ids = [5, 0, 7, 23, 22, 1, 8, 9]
    tier.apply(make_plan(1, saves=list(zip(block_ids, host_ids, strict=True))))
    assert tier.finished(awaited=1) == 1
    cache.keys.zero_()
    cache.values.fill_(1)
    expected = bits(cache)
    targets = [20, 19, 21, 2, 3, 4, 10, 11]
    expected[:, :, targets] = saved[:, :, block_ids]
    tier.apply(make_plan(2, loads=list(zip(host_ids, targets, strict=True))))
    assert tier.finished(awaited=2) == 2
    assert torch.equal(bits(cache), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_plan_saves_before_it_loads(device):
    cache = make_cache(device)
    tier = HostTier(cache, NUM_HOST_BLOCKS)
    expected = bits(cache)
    expected[:, :, 2] = expected[:, :, 1]
    tier.apply(make_plan(1, saves=[(1, 6)], loads=[(6, 2)]))
    tier.finished(awaited=1)
    assert torch.equal(bits(cache), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_host_block_keeps_what_its_last_save_brought(device):
    cache = make_cache(device)
    tier = HostTier(cache, NUM_HOST_BLOCKS)
    expected = bits(cache)
    expected[:, :, 5] = expected[:, :, 2]
    for step_id, saves in ((1, [(1, 6)]), (2, [(2, 6)])):
        tier.apply(make_plan(step_id, saves=saves))
    tier.apply(make_plan(3, loads=[(6, 5)]))
    assert tier.finished(awaited=3) == 3
    assert torch.equal(bits(cache), expected)


def test_finished_names_the_last_step_that_moved_blocks():
    tier = HostTier(make_cache(), NUM_HOST_BLOCKS)
    assert tier.finished() == 0
    found = []
    for step_id, saves in ((1, []), (2, [(0, 0)]), (3, []), (4, [(1, 1)])):
        tier.apply(make_plan(step_id, saves=saves, finished=max(step_id - 2, 0)))
        found.append(tier.finished())
    assert found == [0, 2, 2, 4]


@pytest.mark.parametrize(
    ("moves", "cause"),
    [
        ({"saves": [(NUM_BLOCKS, 0)]}, r"a block id is not in \[0, 24\)"),
        ({"saves": [(0, NUM_HOST_BLOCKS)]}, r"a block id is not in \[0, 17\)"),
        ({"saves": [(0, -1)]}, r"a block id is not in \[0, 17\)"),
        ({"saves": [(0, 3), (1, 3)]}, "two blocks are moved to the same one"),
        ({"loads": [(NUM_HOST_BLOCKS, 0)]}, r"a block id is not in \[0, 17\)"),
        ({"loads": [(0, NUM_BLOCKS)]}, r"a block id is not in \[0, 24\)"),
        ({"loads": [(-1, 0)]}, r"a block id is not in \[0, 17\)"),
        ({"loads": [(0, 3), (1, 3)]}, "two blocks are moved to the same one"),
    ],
)
def test_moves_that_mean_nothing_are_refused(moves, cause):
    with pytest.raises(FailedPreconditionError, match=cause):
        HostTier(make_cache(), NUM_HOST_BLOCKS).apply(make_plan(**moves))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_host_blocks", [1, 100])
def test_measuring_leaves_the_cache_as_it_is(num_host_blocks, device):
    cache = make_cache(device)
    before = bits(cache)
    tier = HostTier(cache, num_host_blocks)
    assert 0 < tier.measure_block_us() < 1e6
    assert torch.equal(bits(cache), before)
    assert tier.finished() == 0


@pytest.fixture
def large():
    """(cache, tier) of 0.75 GiB each in blocks of 1 MiB: more than 10 ms of a bus's time."""
    shape = {"num_layers": 4, "block_size": 64, "num_kv_heads": 8, "head_dim": 64}
    cache = KVCache(num_blocks=768, dtype=torch.float32, device=torch.device("cuda:0"), **shape)
    return cache, HostTier(cache, 768)


def every_block(first, second):
    return list(zip(first, second, strict=True))


def ready_for(device_work):
    """Waits for what is queued on the steps' stream, which ends with `device_work`."""
    device_work()
    event = torch.cuda.Event()
    event.record()
    event.synchronize()


class TestOnAGpu:
    pytestmark = NEEDS_GPU

    def test_steps_run_while_blocks_are_moved(self, large):
        _, tier = large
        torch.cuda.synchronize()
        tier.apply(make_plan(1, saves=every_block(range(768), range(768))))
        ready_for(lambda: torch.zeros(10, device="cuda:0"))
        assert tier.finished() == 0
        assert tier.finished(awaited=1) == 1

    def test_blocks_are_saved_as_the_steps_before_left_them(self, large):
        cache, tier = large
        torch.cuda._sleep(50_000_000)  # some 25 ms
        cache.keys.fill_(3)
        cache.values.fill_(4)
        tier.apply(make_plan(1, saves=every_block(range(768), range(768))))
        tier.finished(awaited=1)
        ready_for(lambda: (cache.keys.zero_(), cache.values.zero_()))
        tier.apply(make_plan(2, loads=every_block(range(768), reversed(range(768)))))
        tier.finished(awaited=2)
        assert cache.keys.eq(3).all()
        assert cache.values.eq(4).all()

    def test_its_end_waits_for_nothing(self):
        cache = make_cache("cuda")
        tier = HostTier(cache, NUM_HOST_BLOCKS)
        tier.apply(make_plan(1, saves=[(0, 0)]))  # kernels are loaded by the first, which waits for the device
        torch.cuda._sleep(500_000_000)  # some 250 ms
        tier.apply(make_plan(2, saves=[(1, 1)]))
        gone = weakref.ref(tier)
        del tier
        assert gone() is None
        assert not torch.cuda.current_stream().query()
        torch.cuda.synchronize()

    def test_a_step_waits_for_the_loads_that_it_counts_on(self, large):
        cache, tier = large
        cache.keys.fill_(5)
        tier.apply(make_plan(1, saves=every_block(range(768), range(768))))
        tier.apply(make_plan(2, finished=1))
        cache.keys.zero_()  # is held up, or would be saved in the place of fives
        tier.apply(make_plan(3, loads=every_block(range(768), range(768))))
        tier.apply(make_plan(4, finished=3))
        read = cache.keys.clone()
        assert read.eq(5).all()


def test_ranks_agree_on_the_least(make_llama, run_ranks):
    path = str(make_llama())

    def num_blocks_of(tp):
        model, _ = load_model(path, "dummy", torch.float32, tp, 64, seed=0)
        # Half the heads: a block takes 8 * 2 * 2 * 2 * 8 float32.
        config = engine_pb2.WorkerConfig(block_size=8, swap_space_bytes=2048 * (30 - tp.rank))
        return RunnerBuilder(config, model, tp, 2).num_host_blocks()

    assert run_ranks(2, num_blocks_of) == [29, 29]


def test_swap_space_over_the_free_memory_is_refused_with_both_figures():
    memory = DeviceMemory(total_bytes=100 * MIB, free_bytes=60 * MIB)
    check_swap_space(30 * MIB, 2, memory)
    check_swap_space(0, 2, DeviceMemory(total_bytes=0, free_bytes=-1))
    with pytest.raises(ResourceExhaustedError) as error:
        check_swap_space(31 * MIB, 2, memory)
    assert str(error.value) == (
        "the swap space takes 31.0 MiB for each of 2 rank(s) on this host, and it has 60.0 MiB of memory free; "
        "lower --swap-space"
    )


def test_swap_space_holds_whole_blocks_or_is_refused():
    assert num_host_blocks(10 * MIB, 3 * MIB) == 3
    assert num_host_blocks(0, 3 * MIB) == 0
    with pytest.raises(InvalidArgumentError) as error:
        num_host_blocks(2 * MIB, 3 * MIB)
    assert str(error.value) == (
        "a swap space of 2.0 MiB holds no KV block, which takes 3.0 MiB; raise --swap-space, or leave it out"
    )
    assert error.value.field == "swap_space"
