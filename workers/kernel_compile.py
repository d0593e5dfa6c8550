"""Compiles a rank's Triton kernels beside each other, while its weights are read: one by one they take longer than all
else of a start.

What kernels a model needs depends on shapes alone, so they are found by running each kind of step on a miniature of it,
with two layers and weights of zeros, and launches that compile and do not run.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import triton
from torch.overrides import TorchFunctionMode
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from ..kernels.launch import Launch
from .graph_recorder import Recording, Tensors
from .model_config import ModelConfig
from .models.registry import Model, model_class, registered_architectures
from .parallel import TensorParallel
from .weights import Shard

_NUM_LAYERS = 2  # the first, one behind another, and the last
# Most of the work leaves Python's lock alone, an eighth does not: more threads would wait for it.
_MAX_THREADS = 16


@contextmanager
def compiled_in_parallel(num_ranks_on_host: int) -> Iterator[None]:
    """What `launches_compile` finds inside is compiled by threads, and all is ready at the end.

    A kernel that cannot be compiled is left to its first launch, which says why.
    """
    num_threads = max(1, min(_MAX_THREADS, len(os.sched_getaffinity(0)) // num_ranks_on_host))
    with _CompileThreads(num_threads, "compile") as threads, triton.AsyncCompileMode(threads, ignore_errors=True):
        yield


class _CompileThreads(ThreadPoolExecutor):
    """Compile kernels, and what hands each its arguments: a C function for each signature, which Triton would have
    compiled when the kernel first runs, for 0.3 s."""

    def submit(self, compile_kernel: Callable[[], CompiledKernel]) -> Future[CompiledKernel]:  # type: ignore[override]
        return super().submit(_with_launcher, compile_kernel)


def _with_launcher(compile_kernel: Callable[[], CompiledKernel]) -> CompiledKernel:
    kernel = compile_kernel()
    triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)
    return kernel


@contextmanager
def launches_compile() -> Iterator[None]:
    """Has every launch of a Triton kernel compile it, and run nothing. New memory is zeros meanwhile: what a kernel
    would have written stays so, and torch's own operations run on that."""
    run = JITFunction.run

    def compile_only(self: JITFunction[Any], *args: object, grid: object, warmup: bool, **kwargs: object) -> object:
        del warmup
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run, Launch.always_anew = compile_only, True
    try:
        with _ZeroedMemory():
            yield
    finally:
        JITFunction.run, Launch.always_anew = run, False


class _ZeroedMemory(TorchFunctionMode):
    _ALLOCATIONS = (torch.empty, torch.empty_like, torch.Tensor.new_empty)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 (what torch's operations give)
        made = func(*args, **(kwargs or {}))
        return made.zero_() if func in self._ALLOCATIONS else made


class UnrecordedGraphs:
    """A recorder of functions that are run once, and replayed as nothing."""

    def session(self) -> nullcontext[None]:
        return nullcontext()

    def record(self, function: Callable[[], Tensors]) -> tuple[Recording, Tensors]:
        outputs = function()
        return Recording(lambda: None, outputs), outputs

    def time_ms(self, recordings: Sequence[Recording], num_times: int) -> float:
        """Nothing takes no time."""
        del recordings, num_times
        return 0.0


def miniature(model_path: str, tp: TensorParallel, dtype: torch.dtype, max_model_len: int) -> Model:
    """A model that needs the kernels of the one in the directory. Raises as load_model does for a bad directory."""
    config = ModelConfig.from_directory(model_path, registered_architectures())
    config = replace(config, num_layers=min(config.num_layers, _NUM_LAYERS))
    cls = model_class(config.architecture)
    model = cls(config, tp, dtype, max_model_len)
    model.load_weights(_Zeros(cls.tensor_shapes(config), dtype, tp.device))
    return model


class _Zeros:
    """Weights of which one number is held."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> None:
        self._shapes, self._zero = shapes, torch.zeros((), dtype=dtype, device=device)

    def read(self, name: str, shard: Shard | None = None) -> torch.Tensor:
        shape = list(self._shapes[name])
        if shard is not None:
            shape[shard.dim] = shard.stop - shard.start
        return self._zero.expand(shape)
