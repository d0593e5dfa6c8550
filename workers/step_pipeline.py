"""The threads of a worker that touch the device: one queues work on it, one waits for what comes back.

Two, so that the next step is launched while the step before still runs.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from ..errors import FailedPreconditionError
from ..proto import worker_pb2
from .model_runner import ModelRunner
from .plan import decode_plan
from .profiler import StepProfiler

T = TypeVar("T")


class StepPipeline:
    """Runs calls and steps in the order in which they come."""

    def __init__(self, device: torch.device, num_threads: int) -> None:
        """`num_threads`: CPU threads of torch's own operations."""
        self._launcher = ThreadPoolExecutor(1, "device", initializer=_prepare_thread, initargs=(device, num_threads))
        self._waiter = ThreadPoolExecutor(1, "results")
        self._device = device
        self._num_ends = 0  # times that what was queued was dropped
        self._failed_after_ends = -1  # how many there had been when a step last failed
        # On the device thread: who profiles, and who wants to know.
        self._profiling: tuple[StepProfiler, Future[worker_pb2.ProfileResponse]] | None = None
        # To start the first profile holds up steps for seconds: libraries load. Counted by the caller's thread and by
        # the device's.
        self._num_profiles_asked = self._num_profiles_started = 0

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Runs `function` on the device thread."""
        return self._launcher.submit(function)

    def step(self, runner: ModelRunner, message: worker_pb2.BatchPlan) -> "Future[worker_pb2.StepResult]":
        """Queues a step; the future has its result. Steps behind one that failed fail too, and do not run: the other
        ranks may be at the failed one still, and would take this one's sums for its."""
        result: Future[worker_pb2.StepResult] = Future()
        self._launcher.submit(self._launch, self._num_ends, runner, message, result)
        return result

    def end_steps(self) -> None:
        """What is queued will not run: its futures, and a profile's, fail with FailedPreconditionError."""
        self._num_ends += 1
        self._launcher.submit(self._end_profile)

    def _end_profile(self) -> None:
        if self._profiling is not None:
            _, answer = self._profiling
            self._abandon_profile()
            answer.set_exception(FailedPreconditionError("the worker was configured anew"))

    @property
    def is_profiling(self) -> bool:
        """Whether a profile is made, or on its way: steps may take long. For any thread."""
        return self._profiling is not None or self._num_profiles_asked != self._num_profiles_started

    def profile(self, num_steps: int, trace_path: Path) -> "Future[worker_pb2.ProfileResponse]":
        """Profiles the next steps. The future fails with FailedPreconditionError while another profile runs."""
        answer: Future[worker_pb2.ProfileResponse] = Future()
        self._num_profiles_asked += 1
        self._launcher.submit(self._start_profile, num_steps, trace_path, answer)
        return answer

    def cancel_profile(self) -> None:
        """Ends a profile whose steps have not all come."""
        self._launcher.submit(self._abandon_profile)

    def _abandon_profile(self) -> None:
        if self._profiling is not None:
            profiler, _ = self._profiling
            self._profiling = None
            profiler.abandon()

    def _start_profile(self, num_steps: int, trace_path: Path, answer: "Future[worker_pb2.ProfileResponse]") -> None:
        try:
            if self._profiling is not None:
                raise FailedPreconditionError("a profile runs already")
            self._profiling = StepProfiler(self._device, num_steps, trace_path), answer
        except Exception as error:  # it belongs to who asked
            answer.set_exception(error)
        finally:
            self._num_profiles_started += 1

    def _note_profiled_step(self) -> None:
        if self._profiling is None:
            return
        profiler, answer = self._profiling
        try:
            response = profiler.note_step()
        except Exception as error:  # as above; the steps themselves are well
            self._profiling = None
            answer.set_exception(error)
            return
        if response is not None:
            self._profiling = None
            answer.set_result(response)

    def _launch(
        self,
        num_ends: int,
        runner: ModelRunner,
        message: worker_pb2.BatchPlan,
        result: "Future[worker_pb2.StepResult]",
    ) -> None:
        if num_ends != self._num_ends:
            result.set_exception(FailedPreconditionError(f"epoch {message.epoch} is over"))
            return
        if num_ends == self._failed_after_ends:
            result.set_exception(FailedPreconditionError("a step before this one failed"))
            return
        try:
            pending = runner.execute(decode_plan(message))
        except Exception as error:  # whatever it is, it belongs to who asked for the step
            self._failed_after_ends = num_ends
            result.set_exception(error)
        else:
            self._waiter.submit(_settle, pending.wait, message, result)
            self._note_profiled_step()

    def close_launcher(self) -> None:
        """Drops what is queued and waits for what runs. On a GPU that is only the launching."""
        self._launcher.shutdown(cancel_futures=True)

    def close_waiter(self) -> None:
        """Waits for what has been launched."""
        self._waiter.shutdown(cancel_futures=True)


def _settle(
    wait: Callable[[], worker_pb2.StepResult],
    message: worker_pb2.BatchPlan,
    result: "Future[worker_pb2.StepResult]",
) -> None:
    try:
        answer = wait()
    except Exception as error:  # as above: CUDA reports the errors of a step late
        result.set_exception(error)
    else:
        answer.epoch, answer.step_id = message.epoch, message.step_id
        result.set_result(answer)


def _prepare_thread(device: torch.device, num_threads: int) -> None:
    # Both are settings of the calling thread.
    torch.set_num_threads(num_threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
