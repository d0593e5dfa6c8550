"""The `Worker` gRPC service of one rank: configured once, then steps from one stream."""

import asyncio
import contextlib
import gc
import logging
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NoReturn

import grpc
import torch
import torch.distributed as dist

from ..errors import FailedPreconditionError, InvalidArgumentError, OctavoError
from ..proto import worker_pb2, worker_pb2_grpc
from .model_runner import ModelRunner
from .rank import Stage, build_rank, check_request
from .rendezvous import is_lost_peer
from .step_pipeline import StepPipeline

_log = logging.getLogger(__name__)

_MAX_PROFILED_STEPS = 1000  # a trace of more is larger than its viewers read
_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """Owner of the rank's state: which request configured it, its runner, the stream that drives it."""

    def __init__(
        self, device: torch.device, store: dist.Store | None, pipeline: StepPipeline, num_ranks_on_host: int
    ) -> None:
        self._device, self._store, self._pipeline = device, store, pipeline
        self._num_ranks_on_host = num_ranks_on_host
        self._request: worker_pb2.ConfigureRequest | None = None
        self._runner: ModelRunner | None = None
        self._has_stream = False

    async def Configure(  # noqa: N802
        self, request: worker_pb2.ConfigureRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.ConfigureProgress]:
        async with _status_for_errors(context):
            if self._request is not None:
                raise FailedPreconditionError("this worker is configured already")
            check_request(request)
            self._request = request
            stages = build_rank(request, self._device, self._store, self._num_ranks_on_host)
            started_at = time.monotonic()
            while (stage := await self._next(stages)) is not None:
                now = time.monotonic()
                progress = worker_pb2.ConfigureProgress(stage=stage.name, duration_s=now - started_at)
                if stage.runner is not None:
                    self._runner = stage.runner
                    progress.num_blocks = stage.runner.shape.num_blocks
                    progress.num_host_blocks, progress.host_block_us = stage.num_host_blocks, stage.host_block_us
                yield progress
                started_at = now
            # What is there now stays: a collection that looked at it all would hold every thread up for long.
            gc.collect()
            gc.freeze()

    def release(self) -> None:
        """Drops the runner, and with it CUDA graphs: the group's communicator does not end before them."""
        self._runner = None
        gc.unfreeze()
        gc.collect()

    async def _next(self, stages: Iterator[Stage]) -> Stage | None:
        return await asyncio.wrap_future(self._pipeline.call(lambda: next(stages, None)))

    async def Steps(self, plans: AsyncIterator[worker_pb2.BatchPlan], context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        async with _status_for_errors(context):
            if self._runner is None or self._request is None:
                raise FailedPreconditionError("this worker is not configured")
            if self._has_stream:
                raise FailedPreconditionError("a stream has driven this worker already; it must be rebuilt")
            self._has_stream = True
            stream = _StepStream(self._request, self._runner, self._pipeline, context)
            await stream.run(plans)

    async def Profile(  # noqa: N802
        self, request: worker_pb2.ProfileRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.ProfileResponse:
        async with _status_for_errors(context):
            if not 1 <= request.num_steps <= _MAX_PROFILED_STEPS:
                raise InvalidArgumentError(f"num_steps must be in [1, {_MAX_PROFILED_STEPS}]", "num_steps")
            if not request.trace_path:
                raise InvalidArgumentError("trace_path must name a file", "trace_path")
            profile = self._pipeline.profile(request.num_steps, Path(request.trace_path))
            try:
                return await asyncio.shield(asyncio.wrap_future(profile))
            except asyncio.CancelledError:
                self._pipeline.cancel_profile()
                raise
        raise AssertionError("errors end the call")


class _StepStream:
    """One `Steps` call: a task takes plans and queues their steps, the call itself answers in the same order.

    What is wrong with a plan goes through the queue too: what came before it is still answered, and nothing interrupts
    the writing of an answer, which gRPC would not forgive.
    """

    def __init__(
        self,
        request: worker_pb2.ConfigureRequest,
        runner: ModelRunner,
        pipeline: StepPipeline,
        context: grpc.aio.ServicerContext,
    ) -> None:
        self._epoch: int = request.epoch
        # All ranks sample the same tokens; rank 0 hands them on.
        self._answers: bool = request.rank == 0
        self._runner, self._pipeline, self._context = runner, pipeline, context
        self._next_step_id = 1
        self._failed = False  # what still comes is dropped
        self._queued: asyncio.Queue[asyncio.Future[worker_pb2.StepResult] | None] = asyncio.Queue()

    async def run(self, plans: AsyncIterator[worker_pb2.BatchPlan]) -> None:
        """Until the coordinator closes the stream. A plan or step that fails ends the answers, and then the call."""
        taking = asyncio.create_task(self._take(plans))
        try:
            await self._answer()
        except Exception as error:
            self._failed = True
            code, details = _status_of(error)
            await self._context.write(worker_pb2.StepResult(failure=details))
            await taking  # a plan written to a call that has ended would lose its status on the other side
            await _abort(self._context, code, details)
        finally:
            taking.cancel()

    async def _answer(self) -> None:
        while (result := await self._queued.get()) is not None:
            answer = await result
            if self._answers:
                await self._context.write(answer)

    async def _take(self, plans: AsyncIterator[worker_pb2.BatchPlan]) -> None:
        try:
            async for plan in plans:
                if not self._failed:
                    self._queued.put_nowait(self._start(plan))
        except Exception as error:
            self._queued.put_nowait(self._refuse(error))
        self._queued.put_nowait(None)

    def _start(self, plan: worker_pb2.BatchPlan) -> asyncio.Future[worker_pb2.StepResult]:
        try:
            self._check_order(plan)
        except FailedPreconditionError as error:
            return self._refuse(error)
        return asyncio.wrap_future(self._pipeline.step(self._runner, plan))

    def _refuse(self, error: Exception) -> asyncio.Future[worker_pb2.StepResult]:
        """A result that raises `error` where the answers are written."""
        self._failed = True
        refused: asyncio.Future[worker_pb2.StepResult] = asyncio.get_running_loop().create_future()
        refused.set_exception(error)
        return refused

    def _check_order(self, plan: worker_pb2.BatchPlan) -> None:
        if (plan.epoch, plan.step_id) != (self._epoch, self._next_step_id):
            raise FailedPreconditionError(
                f"plan {plan.step_id} of epoch {plan.epoch} came; "
                f"plan {self._next_step_id} of epoch {self._epoch} is due"
            )
        self._next_step_id += 1


@contextlib.asynccontextmanager
async def _status_for_errors(context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
    """An OctavoError ends the call with its code and text; another with INTERNAL, and its traceback stays here."""
    try:
        yield
    except grpc.aio.AbortError:
        raise
    except Exception as error:
        await _abort(context, *_status_of(error))


def _status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    if isinstance(error, OctavoError):
        return _STATUS_CODES[error.grpc_code], str(error)
    if is_lost_peer(error):
        return grpc.StatusCode.UNAVAILABLE, "the connection to another rank of the group is lost"
    _log.error("a call failed by a fault of ours", exc_info=error)
    return grpc.StatusCode.INTERNAL, f"{type(error).__name__}; the worker's log has more"


async def _abort(context: grpc.aio.ServicerContext, code: grpc.StatusCode, details: str) -> NoReturn:
    await context.abort(code, details)
    raise AssertionError("abort raises")
