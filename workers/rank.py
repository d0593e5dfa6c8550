"""One rank of a worker group, from rendezvous to a runner that takes plans."""

import gc
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ..errors import InvalidArgumentError, ResourceExhaustedError, UnavailableError
from ..proto import engine_pb2, worker_pb2
from .device_memory import DeviceMemory
from .gpu_support import GpuSupport
from .graph_recorder import GraphRecorder
from .host_memory import check_swap_space
from .meeting import Meeting
from .model_config import DTYPES
from .model_loader import check_model, load_model, make_model
from .model_runner import ModelRunner
from .models.registry import Model
from .parallel import TensorParallel
from .rendezvous import connect_store, join_group
from .runner_builder import RunnerBuilder
from .segment_graphs import SegmentGraphs
from .warm_up import blocks_for_warm_up, run_all_kinds, warm_up
from .weight_copy import layout_of

if TYPE_CHECKING:
    from .start_record import StartRecord

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
    check_swap_space(request.config.swap_space_bytes, num_ranks_on_host)
    joined = _connect(request, site)
    yield Stage("connect")
    kept = kept if kept is not None and kept.is_of(request) else None
    known = _known_start(request, joined, num_ranks_on_host, is_fresh=kept is None)
    if kept is not None:
        kept.tp.rejoin(joined)
        loaded = kept
    else:
        loaded = _load(request, joined, num_ranks_on_host, site.fetch, known)
    model, tp = loaded.model, loaded.tp
    # Ranks meet: a kernel that waits for another rank does so for some seconds only, and disks differ by more.
    tp.min_int(0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    yield Stage("weights", loaded, kept_weights=loaded is kept)
    try:
        yield from _runner_stages(RunnerBuilder(request.config, model, tp, num_ranks_on_host), known)
    except torch.OutOfMemoryError:
        if known is not None:
            known.record.forget_sizes()
        raise


@dataclass(frozen=True, slots=True)
class _KnownStart:
    """What earlier starts on a GPU found out."""

    record: "StartRecord"
    free_bytes: int | None  # as there


def _known_start(
    request: worker_pb2.ConfigureRequest, tp: TensorParallel, num_ranks_on_host: int, is_fresh: bool
) -> _KnownStart | None:
    """`is_fresh`: whether this process holds nothing on its device yet."""
    if tp.device.type != "cuda":
        return None
    from .start_record import StartRecord  # Triton is there only beside a CUDA build of torch

    record = StartRecord.of(request, tp, num_ranks_on_host)
    return _KnownStart(record, DeviceMemory.of(tp.device).free_bytes if is_fresh else None)


def _runner_stages(builder: RunnerBuilder, start: _KnownStart | None) -> Iterator[Stage]:
    config, tp = builder.config, builder.tp
    known = start.record.agreed_sizes(tp, start.free_bytes) if start is not None else None
    graphs = None
    if tp.device.type == "cuda" and not config.enforce_eager:
        sizes = known.segments if known is not None else None
        graphs = SegmentGraphs(builder.model, config.max_num_batched_tokens, GraphRecorder(tp.device), tp, sizes)
    num_blocks = known.num_blocks if known is not None else builder.num_blocks(graphs)
    cache = builder.kv_cache(num_blocks)
    tier = builder.host_tier(cache, builder.num_host_blocks())
    runner = builder.runner(cache, tier)
    if graphs is not None and known is not None:
        graphs.capture(cache)
    yield Stage("kv cache")
    decode_sizes: Sequence[int] = ()
    if graphs is not None:
        decode_sizes = runner.capture_graphs(graphs, known.decodes if known is not None else None)
        yield Stage("cuda graphs")
    if start is not None and known is None:
        segment_sizes = graphs.sizes if graphs is not None else ()
        start.record.note_sizes(num_blocks, segment_sizes, decode_sizes, start.free_bytes)
    # The largest step has run on a GPU, now or at the start that its sizes are known from. A CPU needs little: its
    # libraries load with the first token.
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
    request: worker_pb2.ConfigureRequest,
    tp: TensorParallel,
    num_ranks_on_host: int,
    fetch: FetchWeights | None,
    start: _KnownStart | None = None,
) -> LoadedModel:
    """`start`: on a GPU."""
    if start is None:
        return _copy_or_read(request, tp, fetch)
    config, dtype = request.config, _dtype_of(request)
    check_model(config.model_path, config.load_format, dtype, tp)
    if start.record.has_kernels:  # their first launches find them in Triton's cache
        return _copy_or_read(request, tp, fetch)
    from .kernel_compile import compiled_in_parallel  # Triton is there only beside a CUDA build of torch

    with start.record.noting_kernels(), compiled_in_parallel(num_ranks_on_host):
        _find_kernels(config, dtype, tp.for_compiling(), num_ranks_on_host)
        gc.collect()  # a model and its segments hold each other
        torch.cuda.empty_cache()
        return _copy_or_read(request, tp, fetch)


def _dtype_of(request: worker_pb2.ConfigureRequest) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, request.config.dtype)
    return dtype


def _copy_or_read(request: worker_pb2.ConfigureRequest, tp: TensorParallel, fetch: FetchWeights | None) -> LoadedModel:
    """The weights of another rank, if the request names one that has them, else those of the disk."""
    config, dtype = request.config, _dtype_of(request)
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
        builder = RunnerBuilder(config, model, tp, num_ranks_on_host)
        cache = builder.kv_cache(blocks_for_warm_up(1, num_tokens, config.block_size))
        graphs = SegmentGraphs(model, num_tokens, UnrecordedGraphs(), tp)
        graphs.capture(cache)
        runner = builder.runner(cache)
        runner.capture_graphs(graphs)
        run_all_kinds(runner, num_tokens)
