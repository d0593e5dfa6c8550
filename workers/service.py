"""The `Worker` gRPC service of one rank: configured for an epoch, then steps from one stream, until the next epoch."""

import asyncio
import gc
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import torch
import torch.distributed as dist

from ..errors import FailedPreconditionError, InvalidArgumentError
from ..proto import worker_pb2, worker_pb2_grpc
from .call_status import status_for_errors
from .copies import Copies
from .copy_thread import CopySettings
from .loading import FetchWeights, LoadedModel
from .model_runner import ModelRunner
from .models.registry import Model
from .parallel import TensorParallel
from .peer_sender import Holdings
from .rank import RankSite, Stage, build_rank, check_request
from .rendezvous import leave_group
from .step_pipeline import StepPipeline
from .step_stream import StepStream

_log = logging.getLogger(__name__)

_MAX_PROFILED_STEPS = 1000  # a trace of more is larger than its viewers read
# How long the device may take to let go of an epoch. On a CPU a rank that waits for another is free as soon as that one
# has left, or is gone. On a GPU kernels are told (kernels/peer_wait.py, NCCL) and end within milliseconds; what is left
# is the end of the communicator and of a thousand graphs. One that takes longer is stuck: its place is sooner filled by
# a new process than by waiting on.
_LEAVE_TIMEOUT_S = {"cpu": 5.0, "cuda": 10.0}
_START_TIMEOUT_S = 600.0  # the same, of a start that another one takes the place of


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """Owner of the rank's state: which request configured it, its weights, its runner, the stream that drives it."""

    def __init__(
        self,
        copy_settings: CopySettings,
        store: dist.Store | None,
        pipeline: StepPipeline,
        num_ranks_on_host: int,
        end_process: Callable[[], None],
    ) -> None:
        """`end_process` is called when the device does not let go of an epoch: nothing else would free it."""
        self._device, self._store, self._pipeline = copy_settings.device, store, pipeline
        self._copies = Copies(copy_settings)
        self._num_ranks_on_host = num_ranks_on_host
        self._end_process = end_process
        self._request: worker_pb2.ConfigureRequest | None = None
        self._group: TensorParallel | None = None  # of the epoch
        self._loaded: LoadedModel | None = None
        self._runner: ModelRunner | None = None
        self._stream: StepStream | None = None
        self._is_over = threading.Event()  # the epoch that the rank is in
        self._freeing: set[asyncio.Future[None]] = set()

    async def Configure(  # noqa: N802
        self, request: worker_pb2.ConfigureRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.ConfigureProgress]:
        async with status_for_errors(context):
            check_request(request)
            await self._enter(request)
            stages = build_rank(request, self._site(), self._loaded)
            started_at = time.monotonic()
            while (stage := await self._next(stages)) is not None:
                self._check_is_current(request)
                now = time.monotonic()
                yield self._take(stage, now - started_at)
                started_at = now
            # What is there now stays: a collection that looked at it all would hold every thread up for long.
            gc.collect()
            gc.freeze()

    def _site(self) -> RankSite:
        return RankSite(self._device, self._store, self._num_ranks_on_host, self._fetcher(), self._is_over)

    async def _enter(self, request: worker_pb2.ConfigureRequest) -> None:
        """Leaves the epoch that the rank is in, if any, for a higher one."""
        previous, since = self._request, self._request.epoch if self._request is not None else -1
        if request.epoch <= since:
            raise FailedPreconditionError(
                f"epoch {request.epoch} came, and this worker was configured for epoch {since}"
            )
        self._request = request
        if previous is not None:
            await self._leave(request.epoch)
            self._check_is_current(request)
        self._is_over = threading.Event()
        if self._loaded is not None and not self._loaded.is_of(request):
            self._loaded = None

    def _check_is_current(self, request: worker_pb2.ConfigureRequest) -> None:
        if self._request is not request:
            raise FailedPreconditionError(f"epoch {request.epoch} is over")

    def _take(self, stage: Stage, duration_s: float) -> worker_pb2.ConfigureProgress:
        progress = worker_pb2.ConfigureProgress(
            stage=stage.name, duration_s=duration_s, kept_weights=stage.kept_weights
        )
        if stage.group is not None:
            self._group = replace(stage.group)  # a model that stays will have another epoch's
        if stage.loaded is not None:
            self._loaded = stage.loaded
            if not stage.kept_weights:
                progress.copied_weights, progress.copy_failure = stage.loaded.copied, stage.loaded.copy_failure
        if stage.runner is not None:
            self._runner = stage.runner
            progress.num_blocks = stage.runner.shape.num_blocks
            progress.num_host_blocks, progress.host_block_us = stage.num_host_blocks, stage.host_block_us
        return progress

    async def _leave(self, next_epoch: int) -> None:
        """Ends stream, steps, runner and process group. The weights stay."""
        if self._stream is not None:
            self._stream.end(next_epoch)
            self._stream = None
        self._pipeline.end_steps()
        self._free_device()
        await self._copies.end()
        # A stage of a start may take long and be well: weights, kernels. A step is not.
        is_starting = self._runner is None
        try:
            async with asyncio.timeout(_START_TIMEOUT_S if is_starting else _LEAVE_TIMEOUT_S[self._device.type]):
                # On the device thread, behind what runs there: this one answers pings.
                await asyncio.wrap_future(self._pipeline.call(self._leave_group))
        except TimeoutError:
            _log.exception("the device does not let go of the last epoch; this rank ends, to be replaced")
            self._end_process()
            raise FailedPreconditionError("the device is stuck in the last epoch") from None

    def _free_device(self) -> None:
        """Nothing waits for other ranks any more: the epoch is over. On a thread of its own, since ends of groups take
        a while, and the device's thread may be among what waits."""
        self._is_over.set()
        if self._group is not None:
            freeing = asyncio.get_running_loop().run_in_executor(None, self._group.abandon)
            self._freeing.add(freeing)
            freeing.add_done_callback(self._freeing.discard)

    def _leave_group(self) -> None:
        self.release()
        leave_group()  # first: what is dropped next may wait for the device, and that for a peer that is gone
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # kernels read memory of the epoch until their end
        self._group = None
        if self._loaded is not None:
            self._loaded.tp.leave()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def release(self) -> None:
        """Drops the runner, and with it CUDA graphs: the group's communicator does not end before them."""
        self._runner = None
        gc.unfreeze()
        gc.collect()

    async def _next(self, stages: Iterator[Stage]) -> Stage | None:
        return await asyncio.wrap_future(self._pipeline.call(lambda: next(stages, None)))

    # Copies

    def _fetcher(self) -> FetchWeights:
        """For the device thread: it waits for this one."""
        loop = asyncio.get_running_loop()

        def fetch(request: worker_pb2.ConfigureRequest, model: Model) -> Callable[[], None]:
            return asyncio.run_coroutine_threadsafe(self._fetch_weights(request, model), loop).result

        return fetch

    async def _fetch_weights(self, request: worker_pb2.ConfigureRequest, model: Model) -> None:
        self._check_is_current(request)  # else nobody would end the copy
        await self._copies.fetch_weights(request, model)

    async def Send(  # noqa: N802
        self, requests: AsyncIterator[worker_pb2.SendRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.SendResponse]:
        async with status_for_errors(context):
            async for answer in self._copies.send(requests, Holdings(self._held_model, self._held_blocks)):
                yield answer

    async def ReceiveBlocks(  # noqa: N802
        self, request: worker_pb2.ReceiveBlocksRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.ReceiveBlocksResponse:
        try:
            runner = self._runner_of(request.epoch)
        except FailedPreconditionError as error:
            return worker_pb2.ReceiveBlocksResponse(failure=str(error))
        return await self._copies.receive_blocks(request, runner)

    async def end_copies(self) -> None:
        """Breaks off what is copied from and to other ranks."""
        await self._copies.end()

    def _held_model(self, wanted: worker_pb2.WeightsWanted) -> Model:
        # While it starts it measures what memory there is, and a copy takes some.
        if self._runner is None or self._loaded is None or not self._loaded.has(wanted):
            raise FailedPreconditionError("this worker does not hold the weights wanted")
        return self._loaded.model

    def _held_blocks(self, wanted: worker_pb2.BlocksWanted) -> ModelRunner:
        runner = self._runner_of(wanted.epoch)
        rows = runner.block_rows
        if (rows.block_bytes, rows.num_groups) != (wanted.block_bytes, wanted.num_rows):
            raise FailedPreconditionError("this worker's KV blocks are of another kind")
        return runner

    def _runner_of(self, epoch: int) -> ModelRunner:
        if self._runner is None or self._request is None or self._request.epoch != epoch:
            raise FailedPreconditionError(f"this worker does not serve in epoch {epoch}")
        return self._runner

    async def Ping(  # noqa: N802
        self, request: worker_pb2.PingRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.PingResponse:
        epoch = self._request.epoch if self._request is not None else 0
        return worker_pb2.PingResponse(epoch=epoch, is_profiling=self._pipeline.is_profiling)

    async def Steps(self, plans: AsyncIterator[worker_pb2.BatchPlan], context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        async with status_for_errors(context):
            if self._runner is None or self._request is None:
                raise FailedPreconditionError("this worker is not configured")
            if self._stream is not None:
                epoch = self._request.epoch
                raise FailedPreconditionError(f"a stream has driven this worker already in epoch {epoch}")
            self._stream = StepStream(self._request, self._runner, self._pipeline, context)
            request = self._request
            try:
                await self._stream.run(plans)
            finally:
                if self._request is request:  # an epoch has one stream: no other step will come
                    self._free_device()
                    if self._device.type == "cuda":
                        self._pipeline.call(self._check_gpu)

    def _check_gpu(self) -> None:
        """After some errors a process can use its GPU no more; a new one can."""
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError:
            _log.exception("the GPU can be used no more; this rank ends, to be replaced")
            self._end_process()

    async def Profile(  # noqa: N802
        self, request: worker_pb2.ProfileRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.ProfileResponse:
        async with status_for_errors(context):
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
