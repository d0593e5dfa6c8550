"""From a loaded model to a runner: how many KV blocks fit on the device, what graphs its steps run as."""

from dataclasses import dataclass, replace

import torch

from ..proto import engine_pb2
from .device_memory import DeviceMemory
from .host_memory import num_host_blocks
from .host_tier import HostTier
from .kv_cache import FP8, BlockBudget, KVCache, num_blocks_that_fit
from .model_runner import ModelRunner
from .models.registry import Model
from .parallel import TensorParallel
from .segment_graphs import SegmentGraphs
from .slot_table import SlotTableShape
from .warm_up import blocks_for_warm_up, warm_up


@dataclass(frozen=True, slots=True)
class RunnerBuilder:
    """Makes runners of one loaded model that differ in the size of their KV cache."""

    config: engine_pb2.WorkerConfig
    model: Model
    tp: TensorParallel
    num_ranks_on_host: int

    @property
    def cache_dtype(self) -> torch.dtype:
        return FP8 if self.config.kv_cache_dtype == "fp8" else self.model.dtype

    def kv_cache(self, num_blocks: int) -> KVCache:
        return KVCache(
            num_layers=self.model.config.num_layers,
            num_blocks=num_blocks,
            block_size=self.config.block_size,
            num_kv_heads=self.model.num_kv_heads,
            head_dim=self.model.config.head_dim,
            dtype=self.cache_dtype,
            device=self.tp.device,
        )

    def host_tier(self, cache: KVCache, num_blocks: int) -> HostTier | None:
        return HostTier(cache, num_blocks) if num_blocks else None

    def num_host_blocks(self) -> int:
        """Blocks that the host tier of every rank can have; 0 without one."""
        return self.tp.min_int(num_host_blocks(self.config.swap_space_bytes, self._budget().bytes_per_block))

    def runner(self, cache: KVCache, tier: HostTier | None = None) -> ModelRunner:
        shape = SlotTableShape(
            num_slots=self.config.max_num_seqs,
            max_model_len=self.config.max_model_len,
            block_size=self.config.block_size,
            num_blocks=cache.num_blocks,
            vocab_size=self.model.config.vocab_size,
        )
        return ModelRunner(self.model, cache, shape, self.tp, tier)

    def num_blocks(self, graphs: SegmentGraphs | None) -> int:
        """Blocks that the KV cache of every rank can have. Captures `graphs`."""
        device, budget = self.tp.device, self._budget()
        if device.type != "cuda":
            return self.tp.min_int(num_blocks_that_fit(device, budget))
        activation_bytes, memory = self._rehearse(graphs)
        budget = replace(budget, activation_bytes=activation_bytes)
        return self.tp.min_int(num_blocks_that_fit(device, budget, memory))

    def _rehearse(self, graphs: SegmentGraphs | None) -> tuple[int, DeviceMemory]:
        """Brings up a runner with a KV cache of few blocks, has it do all that takes GPU memory, and measures that.

        Captures `graphs`, which stay. Those of decodes know the cache, so they are captured only to see what they take;
        the memory that graphs work in stays too, and serves those of the next runner.
        Returns the bytes that the largest step needs beyond what is there before it, and the device's memory beside a
        runner without a KV cache.
        """
        num_seqs, num_tokens = self.config.max_num_seqs, self.config.max_num_batched_tokens
        cache = self.kv_cache(blocks_for_warm_up(num_seqs, num_tokens, self.config.block_size))
        tier = self.host_tier(cache, min(1, self.num_host_blocks()))  # as much as any takes on the device
        if tier is not None:
            tier.measure_block_us()
        runner = self.runner(cache, tier)
        if graphs is not None:
            from .decode_graphs import bucket_sizes  # Triton is there only beside a CUDA build of torch

            graphs.capture(cache)
            runner.capture_graphs(graphs, bucket_sizes(num_seqs))
        before_bytes = torch.cuda.memory_allocated(self.tp.device)
        torch.cuda.reset_peak_memory_stats(self.tp.device)
        warm_up(runner, num_seqs, num_tokens)
        activation_bytes = torch.cuda.max_memory_allocated(self.tp.device) - before_bytes
        torch.cuda.empty_cache()
        # What torch keeps now lies between tensors or is the graphs': no KV cache can have it.
        free_bytes, total_bytes = torch.cuda.mem_get_info(self.tp.device)
        return activation_bytes, DeviceMemory(total_bytes, free_bytes + cache.num_bytes)

    def _budget(self) -> BlockBudget:
        return BlockBudget(
            bytes_per_block=KVCache.bytes_per_block(
                num_layers=self.model.config.num_layers,
                block_size=self.config.block_size,
                num_kv_heads=self.model.num_kv_heads,
                head_dim=self.model.config.head_dim,
                dtype=self.cache_dtype,
            ),
            block_size=self.config.block_size,
            max_num_seqs=self.config.max_num_seqs,
            max_model_len=self.config.max_model_len,
            gpu_memory_utilization=self.config.gpu_memory_utilization,
            num_blocks_override=self.config.num_blocks_override,
            num_ranks_on_device=1 if self.tp.device.type == "cuda" else self.num_ranks_on_host,
        )
