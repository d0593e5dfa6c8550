"""One rank of a worker group, from rendezvous to a runner that takes plans."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..errors import InvalidArgumentError, ResourceExhaustedError
from ..proto import engine_pb2, worker_pb2
from .gpu_support import GpuSupport
from .kv_cache import BlockBudget, KVCache, num_blocks_that_fit
from .model_config import DTYPES
from .model_loader import load_model
from .model_runner import ModelRunner
from .models.registry import Model
from .parallel import TensorParallel
from .rendezvous import connect_store, join_group
from .slot_table import SlotTableShape
from .warm_up import blocks_for_warm_up, warm_up


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of the start that is done. The last has the runner."""

    name: str
    runner: ModelRunner | None = None


def check_request(request: worker_pb2.ConfigureRequest) -> None:
    """Raises InvalidArgumentError naming the field."""
    if request.config.dtype not in DTYPES:
        raise InvalidArgumentError(f"dtype {request.config.dtype!r} is none of {', '.join(DTYPES)}", "dtype")
    if not request.rank < request.tensor_parallel_size:
        raise InvalidArgumentError(f"rank {request.rank} is not under tensor_parallel_size", "rank")


def build_rank(
    request: worker_pb2.ConfigureRequest, device: torch.device, store: dist.Store | None, num_ranks_on_host: int = 1
) -> Iterator[Stage]:
    """Builds one rank, stage by stage, on the calling thread. `store` is this process's own, if it holds one.

    Raises FailedPreconditionError (a GPU or its software too old), ResourceExhaustedError (too little memory),
    UnavailableError (ranks that do not meet), and the errors of load_model.
    """
    try:
        yield from _stages(request, device, store, num_ranks_on_host)
    except torch.OutOfMemoryError as error:
        raise ResourceExhaustedError(
            f"{device} is out of memory; lower --gpu-memory-utilization or --max-num-batched-tokens, use more ranks "
            "(--tensor-parallel-size), or end what else uses it"
        ) from error


def _stages(
    request: worker_pb2.ConfigureRequest, device: torch.device, store: dist.Store | None, num_ranks_on_host: int
) -> Iterator[Stage]:
    config = request.config
    tp = _connect(request, device, store)
    yield Stage("connect")
    dtype: torch.dtype = getattr(torch, config.dtype)
    model, _ = load_model(config.model_path, config.load_format, dtype, tp, config.max_model_len, config.seed)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    yield Stage("weights")
    builder = _RunnerBuilder(config, model, tp, num_ranks_on_host)
    activation_bytes = builder.measure_largest_step() if device.type == "cuda" else 0
    num_blocks = tp.min_int(num_blocks_that_fit(device, builder.budget(activation_bytes)))
    runner = builder.build(num_blocks)
    yield Stage("kv cache")
    if device.type == "cuda" and not config.enforce_eager:
        runner.capture_graphs()
        yield Stage("cuda graphs")
    # The largest step has run on a GPU by now. A CPU needs little: its libraries load with the first token.
    warm_up(runner, num_seqs=1, num_tokens=1)
    yield Stage("warm-up", runner)


def _connect(request: worker_pb2.ConfigureRequest, device: torch.device, store: dist.Store | None) -> TensorParallel:
    if device.type == "cuda":
        GpuSupport.of(device).check()
        torch.cuda.set_device(device)
    if request.tensor_parallel_size == 1:
        return TensorParallel(0, 1, device)
    store = store or connect_store(request.config.store_address)
    return join_group(store, request.epoch, request.rank, request.tensor_parallel_size, device)


@dataclass(frozen=True, slots=True)
class _RunnerBuilder:
    """Makes runners of one loaded model that differ in the size of their KV cache."""

    config: engine_pb2.WorkerConfig
    model: Model
    tp: TensorParallel
    num_ranks_on_host: int

    def build(self, num_blocks: int) -> ModelRunner:
        cache = KVCache(
            num_layers=self.model.config.num_layers,
            num_blocks=num_blocks,
            block_size=self.config.block_size,
            num_kv_heads=self.model.num_kv_heads,
            head_dim=self.model.config.head_dim,
            dtype=self.model.dtype,
            device=self.tp.device,
        )
        shape = SlotTableShape(
            num_slots=self.config.max_num_seqs,
            max_model_len=self.config.max_model_len,
            block_size=self.config.block_size,
            num_blocks=num_blocks,
            vocab_size=self.model.config.vocab_size,
        )
        return ModelRunner(self.model, cache, shape, self.tp)

    def measure_largest_step(self) -> int:
        """Bytes of GPU memory that a step needs beyond weights and KV cache."""
        num_seqs, num_tokens = self.config.max_num_seqs, self.config.max_num_batched_tokens
        runner = self.build(blocks_for_warm_up(num_seqs, num_tokens, self.config.block_size))
        before_bytes = torch.cuda.memory_allocated(self.tp.device)
        torch.cuda.reset_peak_memory_stats(self.tp.device)
        warm_up(runner, num_seqs, num_tokens)
        activation_bytes = torch.cuda.max_memory_allocated(self.tp.device) - before_bytes
        del runner
        torch.cuda.empty_cache()
        return activation_bytes

    def budget(self, activation_bytes: int) -> BlockBudget:
        return BlockBudget(
            bytes_per_block=KVCache.bytes_per_block(
                num_layers=self.model.config.num_layers,
                block_size=self.config.block_size,
                num_kv_heads=self.model.num_kv_heads,
                head_dim=self.model.config.head_dim,
                dtype=self.model.dtype,
            ),
            block_size=self.config.block_size,
            max_num_seqs=self.config.max_num_seqs,
            max_model_len=self.config.max_model_len,
            gpu_memory_utilization=self.config.gpu_memory_utilization,
            num_blocks_override=self.config.num_blocks_override,
            activation_bytes=activation_bytes,
            num_ranks_on_device=1 if self.tp.device.type == "cuda" else self.num_ranks_on_host,
        )
