"""How a rank comes to its weights: those it has, those of another rank, or those of the disk; and to its kernels."""

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch

from ..errors import UnavailableError
from ..proto import engine_pb2, worker_pb2
from .model_loader import check_model, fill_model, make_model
from .models.registry import Model
from .parallel import TensorParallel
from .runner_builder import RunnerBuilder
from .segment_graphs import SegmentGraphs
from .warm_up import blocks_for_warm_up, run_all_kinds
from .weight_copy import layout_of

if TYPE_CHECKING:
    from .start_record import StartRecord

_log = logging.getLogger(__name__)

# Begins to fill a model from the rank that a request names as its source. What it returns waits for the end; it raises
# UnavailableError, and the weights are worthless then.
FetchWeights = Callable[[worker_pb2.ConfigureRequest, Model], Callable[[], None]]


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
class Loading:
    """A model whose weights may be on their way. Until `finish` has returned, only their places count."""

    model: Model
    tp: TensorParallel
    finish: Callable[[], LoadedModel]
    is_done: bool = False  # whether `finish` waits for nothing

    @classmethod
    def of(cls, loaded: LoadedModel) -> Self:
        """They are there."""
        return cls(loaded.model, loaded.tp, lambda: loaded, is_done=True)


def load_now(
    request: worker_pb2.ConfigureRequest,
    tp: TensorParallel,
    num_ranks_on_host: int,
    fetch: FetchWeights | None,
    record: "StartRecord | None",
) -> LoadedModel:
    """The weights, and on a GPU (with `record`) the kernels of its steps. Raises the errors of load_model."""
    if record is None:
        return _begin(request, tp, fetch).finish()
    check_model(request.config.model_path, request.config.load_format, _dtype_of(request), tp)
    if record.has_kernels:  # their first launches find them in Triton's cache
        return _begin(request, tp, fetch).finish()
    from .kernel_compile import compiled_in_parallel  # Triton is there only beside a CUDA build of torch

    with record.noting_kernels(), compiled_in_parallel(num_ranks_on_host):
        find_kernels(request.config, _dtype_of(request), tp.for_compiling(), num_ranks_on_host)
        gc.collect()  # a model and its segments hold each other
        torch.cuda.empty_cache()
        return _begin(request, tp, fetch).finish()


def begin_copying(request: worker_pb2.ConfigureRequest, tp: TensorParallel, fetch: FetchWeights) -> Loading:
    """Has the weights come beside what the start does next, to places that graphs may be recorded to read from. For
    GPUs. Raises the errors of load_model, and so does `finish`."""
    return _begin(request, tp, fetch, has_places=True)


def _begin(
    request: worker_pb2.ConfigureRequest, tp: TensorParallel, fetch: FetchWeights | None, has_places: bool = False
) -> Loading:
    """Begins to copy, if the request names a rank that has the weights; else `finish` reads them from the disk."""
    config = request.config
    model = make_model(config.model_path, config.load_format, _dtype_of(request), tp, config.max_model_len)
    if has_places:
        for parameter in model.parameters():
            parameter.allocate()
    arrive = fetch(request, model) if request.weight_source and fetch is not None else None

    def finish() -> LoadedModel:
        failure = ""
        if arrive is not None:
            try:
                arrive()
                return LoadedModel(model, tp, _describe_model(request), copied=True)
            except (UnavailableError, torch.OutOfMemoryError) as error:  # it needs some memory of its own
                failure = str(error).partition("\n")[0]
                _log.warning("the weights are loaded, not copied: %s", failure)
        fill_model(model, config.model_path, config.load_format, tp.device, config.seed)
        return LoadedModel(model, tp, _describe_model(request), copy_failure=failure)

    return Loading(model, tp, finish)


def _dtype_of(request: worker_pb2.ConfigureRequest) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, request.config.dtype)
    return dtype


def find_kernels(
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
