"""Work of the GPU recorded as CUDA graphs, which replay it with one launch, on the same memory each time."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import torch

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Recording:
    """What does a recorded function's work again."""

    replay: Callable[[], None]
    outputs: Tensors  # where each replay leaves the results


class Recorder(Protocol):
    """Records functions that take nothing and work on fixed tensors."""

    def session(self) -> AbstractContextManager[None]: ...

    def record(self, function: Callable[[], Tensors]) -> tuple[Recording, Tensors]: ...

    def time_ms(self, recordings: Sequence[Recording], num_times: int) -> float: ...


class GraphRecorder:
    """Owner of the memory in which all graphs of a device thread work.

    A recorded result keeps its memory only while somebody holds what `record` returned; then later recordings take it.
    So results of a replay hold as long as they were held when recorded, given that replays come in the recordings'
    order, on one stream: here within a step, at whose end nothing is needed any more.
    """

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def session(self) -> Iterator[None]:
        """Has work go to the stream that is recorded from, also what is to run before: libraries keep workspaces for
        each stream, and should not make them in the graphs' memory. Waits for the device."""
        torch.cuda.synchronize()
        with _no_garbage_collection(), torch.cuda.stream(self._stream):
            yield
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the stream's own, which no other can use

    def record(self, function: Callable[[], Tensors]) -> tuple[Recording, Tensors]:
        """Runs `function` within a session without its work being done. Its kernels and libraries have been in use.

        Returns the recording, and the results as tensors that hold their memory.
        """
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph() also waits for the device and gives cached memory back, which hundreds of graphs need once.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            outputs = function()
        except BaseException:
            with suppress(RuntimeError):  # it would say no more than that the recording is spoiled
                graph.capture_end()
            raise
        graph.capture_end()
        return Recording(graph.replay, tuple(_without_holding(output) for output in outputs)), outputs

    def time_ms(self, recordings: Sequence[Recording], num_times: int) -> float:
        """How long the device takes for replays of `recordings`, one after the other: the mean of so many rounds.
        Within a session. Waits for it."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(num_times):
            for recording in recordings:
                recording.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / num_times


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Else an older graph might be found dead while a new one is recorded, and its end would spoil the recording."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _without_holding(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor that does not keep it from being reused."""
    assert tensor.is_contiguous(), "a recorded result has one stretch of memory"
    alias = torch.as_tensor(_Bytes(tensor), device=tensor.device)
    return alias.view(tensor.dtype).view(tensor.shape)


class _Bytes:
    """A tensor's memory in words of the CUDA array interface, which torch reads without taking hold of it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__cuda_array_interface__ = {
            "data": (tensor.data_ptr(), False),
            "shape": (tensor.nbytes,),
            "typestr": "|u1",
            "version": 3,
        }
