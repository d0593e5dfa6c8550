"""One rank of a worker group, from rendezvous to a runner that takes plans."""

import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ..errors import InvalidArgumentError, ResourceExhaustedError
from ..proto import worker_pb2
from .device_memory import DeviceMemory
from .gpu_support import GpuSupport
from .graph_recorder import GraphRecorder
from .host_memory import check_swap_space
from .host_tier import HostTier
from .loading import FetchWeights, LoadedModel, Loading, begin_copying, load_now
from .meeting import Meeting
from .model_config import DTYPES
from .model_runner import ModelRunner
from .parallel import TensorParallel
from .rendezvous import connect_store, join_group
from .runner_builder import RunnerBuilder
from .segment_graphs import SegmentGraphs
from .warm_up import warm_up

if TYPE_CHECKING:
    from .start_record import Sizes, StartRecord


@dataclass(frozen=True, slots=True)
class RankSite:
    """Where a rank is built, and how it reaches others."""

    device: torch.device
    store: dist.Store | None = None  # this process's own, if it holds one
    num_ranks_on_host: int = 1
    fetch: FetchWeights | None = None  # for a request that names a source
    is_over: threading.Event = field(default_factory=threading.Event)  # ends its waits for other ranks


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of the start that is done. The first has the group, the one of the weights the model, the last the
    runner."""

    name: str
    group: TensorParallel | None = None
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
    check_swap_space(request.config.swap_space_bytes, site.num_ranks_on_host)
    joined = _connect(request, site)
    yield Stage("connect", group=joined)
    kept = kept if kept is not None and kept.is_of(request) else None
    known = _known_start(request, joined, is_fresh=kept is None)
    if kept is not None:
        kept.tp.rejoin(joined)
    loading = Loading.of(kept) if kept is not None else _load(request, joined, site, known)
    _meet(loading.tp)
    if loading.is_done:
        yield Stage("weights", loaded=loading.finish(), kept_weights=kept is not None)
    builder = RunnerBuilder(request.config, loading.model, loading.tp, site.num_ranks_on_host)
    try:
        runner, tier = yield from _runner_stages(builder, known)
        loaded = loading.finish()
        _meet(loading.tp)
        if not loading.is_done:
            yield Stage("weights", loaded=loaded)
        yield _warmed_up(runner, tier)
    except torch.OutOfMemoryError:
        if known is not None:
            known.record.forget_sizes()
        raise


def _warmed_up(runner: ModelRunner, tier: HostTier | None) -> Stage:
    # The largest step has run on a GPU, now or at the start that its sizes are known from. A CPU needs little: its
    # libraries load with the first token.
    warm_up(runner, num_seqs=1, num_tokens=1)
    if tier is None:
        return Stage("warm-up", runner=runner)
    block_us = tier.measure_block_us()
    return Stage("warm-up", runner=runner, num_host_blocks=tier.num_blocks, host_block_us=block_us)


def _meet(tp: TensorParallel) -> None:
    """A kernel that waits for another rank does so for some seconds only, and disks differ by more."""
    tp.min_int(0)
    if tp.device.type == "cuda":
        torch.cuda.synchronize(tp.device)


@dataclass(frozen=True, slots=True)
class _KnownStart:
    """What earlier starts on a GPU found out."""

    record: "StartRecord"
    free_bytes: int | None  # on the device, as StartRecord.agreed_sizes takes it
    sizes: "Sizes | None"  # the same on all ranks


def _known_start(request: worker_pb2.ConfigureRequest, tp: TensorParallel, is_fresh: bool) -> _KnownStart | None:
    """`is_fresh`: whether this process holds nothing on its device yet. On all ranks at once."""
    if tp.device.type != "cuda":
        return None
    from .start_record import StartRecord  # Triton is there only beside a CUDA build of torch

    record = StartRecord.of(request, tp)
    free_bytes = DeviceMemory.of(tp.device).free_bytes if is_fresh else None
    return _KnownStart(record, free_bytes, record.agreed_sizes(tp, free_bytes))


def _load(
    request: worker_pb2.ConfigureRequest, tp: TensorParallel, site: RankSite, known: _KnownStart | None
) -> Loading:
    """Copies go on beside the rest of the start, where that compiles nothing and measures no memory."""
    is_all_known = known is not None and known.sizes is not None and known.record.has_kernels
    if is_all_known and request.weight_source and site.fetch is not None:
        return begin_copying(request, tp, site.fetch)
    record = known.record if known is not None else None
    return Loading.of(load_now(request, tp, site.num_ranks_on_host, site.fetch, record))


def _runner_stages(
    builder: RunnerBuilder, start: _KnownStart | None
) -> Generator[Stage, None, tuple[ModelRunner, HostTier | None]]:
    """For weights that may be still on their way."""
    config, tp = builder.config, builder.tp
    known = start.sizes if start is not None else None
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
    return runner, tier


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
