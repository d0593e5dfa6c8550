"""One rank of a worker group, from rendezvous to a runner that takes plans."""

import gc
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from ..errors import InvalidArgumentError, ResourceExhaustedError, UnavailableError
from ..proto import engine_pb2, worker_pb2
from .device_memory import DeviceMemory
from .gpu_support import GpuSupport
from .graph_recorder import GraphRecorder
from .host_memory import check_swap_space, num_host_blocks
from .host_tier import HostTier
from .kv_cache import FP8, BlockBudget, KVCache, num_blocks_that_fit
from .meeting import Meeting
from .model_config import DTYPES
from .model_loader import check_model, load_model, make_model
from .model_runner import ModelRunner
from .models.registry import Model
from .parallel import TensorParallel
from .rendezvous import connect_store, join_group
from .segment_graphs import SegmentGraphs
from .slot_table import SlotTableShape
from .warm_up import blocks_for_warm_up, run_all_kinds, warm_up
from .weight_copy import layout_of

_log = logging.getLogger(__name__)

# Fills a model from the rank that a request names as its source. Raises UnavailableError; the model is worthless then.
FetchWeights = Callable[[worker_pb2.ConfigureRequest, Model], None]


@dataclass(frozen=True, slots=True)
class RankSite:
    """Where a rank is built, and how it reaches others."""

    device: torch.device
    store: dist.Store | None = None  # this process's own, if it holds one
    num_ranks_on_host: int = 1
    fetch: FetchWeights | None = None  # for a request that names a source
    is_over: threading.Event = field(default_factory=threading.Event)  # ends its waits for other ranks


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A rank's weights on its device, as its kernels want them. They outlive the epochs of its group."""

    model: Model
    tp: TensorParallel  # what the model and all its layers sum with
    description: tuple[object, ...]
    copied: bool = False  # from another rank
    copy_failure: str = ""  # why not, if they were to be

    def is_of(self, request: worker_pb2.ConfigureRequest) -> bool:
        """Whether the request would load the same."""
        return self.description == _describe_model(request)

    def has(self, wanted: worker_pb2.WeightsWanted) -> bool:
        """Whether these are the weights wanted, if on another rank."""
        return self.description[:-1] == _describe_weights(wanted) and layout_of(self.model) == wanted.layout


def _describe_model(request: worker_pb2.ConfigureRequest) -> tuple[object, ...]:
    return (*_describe_weights(request), request.config.max_model_len)


def _describe_weights(request: worker_pb2.ConfigureRequest | worker_pb2.WeightsWanted) -> tuple[object, ...]:
    config = request.config
    shard = (request.rank, request.tensor_parallel_size)
    return (*shard, config.model_path, config.load_format, config.dtype, config.seed)


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of the start that is done. The one of the weights has the model, the last has the runner."""

    name: str
    loaded: LoadedModel | None = None
    kept_weights: bool = False  # of another epoch
    runner: ModelRunner | None = None
    num_host_blocks: int = 0
    host_block_us: float = 0.0  # measured time to move one block between device and host


def check_request(request: worker_pb2.ConfigureRequest) -> None:
    """Raises InvalidArgumentError naming the field."""
    if request.config.dtype not in DTYPES:
        raise InvalidArgumentError(f"dtype {request.config.dtype!r} is none of {', '.join(DTYPES)}", "dtype")
    if request.config.kv_cache_dtype not in ("", request.config.dtype, "fp8"):
        raise InvalidArgumentError(
            f"kv_cache_dtype {request.config.kv_cache_dtype!r} is neither dtype {request.config.dtype} nor fp8",
            "kv_cache_dtype",
        )
    if not request.rank < request.tensor_parallel_size:
        raise InvalidArgumentError(f"rank {request.rank} is not under tensor_parallel_size", "rank")


def build_rank(
    request: worker_pb2.ConfigureRequest, site: RankSite, loaded: LoadedModel | None = None
) -> Iterator[Stage]:
    """Builds one rank, stage by stage, on the calling thread. `loaded`: what the process has of an earlier epoch, used
    if it is what `request` describes.

    Raises FailedPreconditionError (a GPU or its software too old), ResourceExhaustedError (too little memory),
    UnavailableError (ranks that do not meet), and the errors of load_model.
    """
    try:
        yield from _stages(request, site, loaded)
    except torch.OutOfMemoryError as error:
        raise ResourceExhaustedError(
            f"{site.device} is out of memory; lower --gpu-memory-utilization or --max-num-batched-tokens, use more "
            "ranks (--tensor-parallel-size), or end what else uses it"
        ) from error


def _stages(request: worker_pb2.ConfigureRequest, site: RankSite, kept: LoadedModel | None) -> Iterator[Stage]:
    device, num_ranks_on_host = site.device, site.num_ranks_on_host
    config = request.config
    check_swap_space(config.swap_space_bytes, num_ranks_on_host)
    joined = _connect(request, site)
    yield Stage("connect")
    if kept is not None and kept.is_of(request):
        kept.tp.rejoin(joined)
        loaded = kept
    else:
        loaded = _load(request, joined, num_ranks_on_host, site.fetch)
    model, tp = loaded.model, loaded.tp
    # Ranks meet: a kernel that waits for another rank does so for some seconds only, and disks differ by more.
    tp.min_int(0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    yield Stage("weights", loaded, kept_weights=loaded is kept)
    builder = _RunnerBuilder(config, model, tp, num_ranks_on_host)
    graphs = None
    if device.type == "cuda" and not config.enforce_eager:
        graphs = SegmentGraphs(model, config.max_num_batched_tokens, GraphRecorder(device), tp)
    cache = builder.kv_cache(builder.num_blocks(graphs))
    tier = builder.host_tier(cache, builder.num_host_blocks())
    runner = builder.runner(cache, tier)
    yield Stage("kv cache")
    if graphs is not None:
        runner.capture_graphs(graphs)
        yield Stage("cuda graphs")
    # The largest step has run on a GPU by now. A CPU needs little: its libraries load with the first token.
    warm_up(runner, num_seqs=1, num_tokens=1)
    if tier is None:
        yield Stage("warm-up", runner=runner)
    else:
        block_us = tier.measure_block_us()
        yield Stage("warm-up", runner=runner, num_host_blocks=tier.num_blocks, host_block_us=block_us)


def _connect(request: worker_pb2.ConfigureRequest, site: RankSite) -> TensorParallel:
    device = site.device
    has_fp8_cache = request.config.kv_cache_dtype == "fp8"
    if device.type == "cuda":
        GpuSupport.of(device).check(has_fp8_cache)
        torch.cuda.set_device(device)
    elif has_fp8_cache:
        raise InvalidArgumentError(f"kv_cache_dtype fp8 is for GPUs, and device {device} is none", "kv_cache_dtype")
    if request.tensor_parallel_size == 1:
        return TensorParallel(0, 1, device)
    store = site.store or connect_store(request.config.store_address)
    meeting = Meeting(store, request.epoch, request.rank, request.tensor_parallel_size, site.is_over)
    return join_group(meeting, device)


def _load(
    request: worker_pb2.ConfigureRequest, tp: TensorParallel, num_ranks_on_host: int, fetch: FetchWeights | None
) -> LoadedModel:
    config = request.config
    if tp.device.type != "cuda":
        return _copy_or_read(request, tp, fetch)
    from .kernel_compile import compiled_in_parallel  # Triton is there only beside a CUDA build of torch

    dtype: torch.dtype = getattr(torch, config.dtype)
    check_model(config.model_path, config.load_format, dtype, tp)
    with compiled_in_parallel(num_ranks_on_host):
        _find_kernels(config, dtype, tp.for_compiling(), num_ranks_on_host)
        gc.collect()  # a model and its segments hold each other
        torch.cuda.empty_cache()
        return _copy_or_read(request, tp, fetch)


def _copy_or_read(request: worker_pb2.ConfigureRequest, tp: TensorParallel, fetch: FetchWeights | None) -> LoadedModel:
    """The weights of another rank, if the request names one that has them, else those of the disk."""
    config = request.config
    dtype: torch.dtype = getattr(torch, config.dtype)
    copy_failure = ""
    if request.weight_source and fetch is not None:
        model = make_model(config.model_path, config.load_format, dtype, tp, config.max_model_len)
        try:
            fetch(request, model)
            return LoadedModel(model, tp, _describe_model(request), copied=True)
        except UnavailableError as error:
            copy_failure = str(error)
            _log.warning("the weights are loaded, not copied: %s", copy_failure)
        del model  # before there is another
    model = load_model(config.model_path, config.load_format, dtype, tp, config.max_model_len, config.seed)[0]
    return LoadedModel(model, tp, _describe_model(request), copy_failure=copy_failure)


def _find_kernels(
    config: engine_pb2.WorkerConfig, dtype: torch.dtype, tp: TensorParallel, num_ranks_on_host: int
) -> None:
    """Has all kernels of the model's steps compiled. `tp` meets nobody."""
    from .kernel_compile import UnrecordedGraphs, launches_compile, miniature

    num_tokens = config.max_num_batched_tokens
    with launches_compile():
        model = miniature(config.model_path, tp, dtype, config.max_model_len)
        builder = _RunnerBuilder(config, model, tp, num_ranks_on_host)
        cache = builder.kv_cache(blocks_for_warm_up(1, num_tokens, config.block_size))
        graphs = SegmentGraphs(model, num_tokens, UnrecordedGraphs(), tp)
        graphs.capture(cache)
        runner = builder.runner(cache)
        runner.capture_graphs(graphs)
        run_all_kinds(runner, num_tokens)


@dataclass(frozen=True, slots=True)
class _RunnerBuilder:
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
            graphs.capture(cache)
            runner.capture_graphs(graphs, is_rehearsal=True)
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
