"""The wires to one worker group: configuring its ranks, sending plans, reading rank 0's results."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc

from ...errors import InternalError, OctavoError
from ...internal_channel import CHANNEL_OPTIONS
from ...proto import engine_pb2, worker_pb2, worker_pb2_grpc
from ..core.worker_group import GroupMemory
from .worker_error import WorkerError

_log = logging.getLogger(__name__)

_LAST_WORD_S = 1.0  # how long a rank that no longer takes plans may need to say why


def _memory_of(reports: Sequence[worker_pb2.ConfigureProgress]) -> GroupMemory:
    """By the last report of each rank: the ranks agree on counts, and the slowest one's time counts."""
    host_block_us = max(report.host_block_us for report in reports)
    return GroupMemory(reports[0].num_blocks, reports[0].num_host_blocks, host_block_us / 1e3)


def _log_weights(progress: worker_pb2.ConfigureProgress, rank: int, source: str) -> None:
    """How they came, of a rank that was to copy them."""
    if progress.copied_weights:
        _log.info("rank %d: its weights were copied from %s", rank, source)
    elif progress.copy_failure:
        _log.warning("rank %d: its weights were loaded, not copied: %s", rank, progress.copy_failure)


class WorkerLink:
    """Channels and `Steps` streams to all ranks of a group. Plans go to each; results come from rank 0."""

    def __init__(self, request: engine_pb2.AddGroupRequest, epoch: int) -> None:
        self.endpoints: Sequence[engine_pb2.WorkerEndpoint] = list(request.workers)
        self._config = request.config
        self._epoch = epoch
        self._channels = [grpc.aio.insecure_channel(w.address, options=CHANNEL_OPTIONS) for w in self.endpoints]
        self._streams: list[grpc.aio.StreamStreamCall] = []
        self._readers: list[asyncio.Task[None]] = []
        self._unwritable: set[int] = set()  # ranks to which a write failed

    async def configure(self, report: Callable[[str, float], Any]) -> GroupMemory:
        """Has all ranks load the model at once; calls `report(stage, duration_s)` when the slowest has passed a stage.
        Ranks pass as many stages; weights that are copied come later than others.

        Returns what they have room for. Raises WorkerError with the first rank's error.
        """
        streams = [self._configure_rank(rank) for rank in range(len(self._channels))]
        last: list[worker_pb2.ConfigureProgress] = []
        passed: dict[str, list[float]] = {}  # seconds of the ranks that have, by stage
        while True:
            answers = await asyncio.gather(*(anext(stream, None) for stream in streams))
            reports = [answer for answer in answers if answer is not None]
            if not reports:
                return _memory_of(last)
            for answer in reports:
                durations = passed.setdefault(answer.stage, [])
                durations.append(answer.duration_s)
                if len(durations) == len(streams):
                    report(answer.stage, max(durations))
            last = reports

    async def _configure_rank(self, rank: int) -> AsyncIterator[worker_pb2.ConfigureProgress]:
        request = worker_pb2.ConfigureRequest(
            config=self._config,
            rank=rank,
            tensor_parallel_size=len(self._channels),
            epoch=self._epoch,
            weight_source=self.endpoints[rank].weight_source,
        )
        try:
            async for progress in worker_pb2_grpc.WorkerStub(self._channels[rank]).Configure(request):
                _log_weights(progress, rank, request.weight_source)
                yield progress
        except grpc.aio.AioRpcError as error:
            raise WorkerError.of(rank, error) from error

    async def ping(self, rank: int) -> worker_pb2.PingResponse:
        """A sign of life of a rank, however long it takes. Raises WorkerError if it is gone."""
        try:
            stub = worker_pb2_grpc.WorkerStub(self._channels[rank])
            answer: worker_pb2.PingResponse = await stub.Ping(worker_pb2.PingRequest())
            return answer
        except grpc.aio.AioRpcError as error:
            raise WorkerError(rank, "it is gone") from error

    async def receive_blocks(
        self, source: "WorkerLink", blocks: worker_pb2.ReceiveBlocksRequest
    ) -> worker_pb2.ReceiveBlocksResponse:
        """Copies blocks of another group of as many ranks, rank by rank; `blocks` says which, and behind which steps.
        Answers when no rank writes any more: with the slowest rank's time, or with a failure. Raises WorkerError if a
        rank did not answer: it is gone."""
        ranks = range(len(self._channels))
        answers = await asyncio.gather(
            *(self._receive_blocks(rank, source, blocks) for rank in ranks), return_exceptions=True
        )
        reports = [answer for answer in answers if not isinstance(answer, BaseException)]
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return max(reports, key=lambda report: (bool(report.failure), report.duration_us))

    async def _receive_blocks(
        self, rank: int, source: "WorkerLink", blocks: worker_pb2.ReceiveBlocksRequest
    ) -> worker_pb2.ReceiveBlocksResponse:
        request = worker_pb2.ReceiveBlocksRequest(
            epoch=self._epoch, source_address=source.endpoints[rank].address, source_epoch=source._epoch
        )
        request.MergeFrom(blocks)
        try:
            stub = worker_pb2_grpc.WorkerStub(self._channels[rank])
            answer: worker_pb2.ReceiveBlocksResponse = await stub.ReceiveBlocks(request)
            return answer
        except grpc.aio.AioRpcError as error:
            raise WorkerError.of(rank, error) from error
        except (grpc.aio.UsageError, asyncio.CancelledError):
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            raise self._lost_rank(rank) from None  # the group has failed, and its channels are closed

    def open(self, on_result: Callable[[worker_pb2.StepResult], None], on_error: Callable[[OctavoError], None]) -> None:
        """Opens the `Steps` streams. Calls `on_result` for each result in order, and `on_error` once for each rank that
        fails: with what it says itself, or that it is gone, or that its result could not be taken."""
        for rank, channel in enumerate(self._channels):
            call = channel.stream_stream(
                "/octavo.internal.v1.Worker/Steps",
                request_serializer=None,  # plans are encoded once for all ranks
                response_deserializer=worker_pb2.StepResult.FromString,
            )
            stream = call()
            self._streams.append(stream)
            self._readers.append(asyncio.create_task(self._read(rank, stream, on_result, on_error)))

    async def _read(
        self,
        rank: int,
        stream: grpc.aio.StreamStreamCall,
        on_result: Callable[[worker_pb2.StepResult], None],
        on_error: Callable[[OctavoError], None],
    ) -> None:
        try:
            async for result in stream:
                if result.failure:
                    on_error(WorkerError(rank, result.failure, result.step_id))
                    return
                on_result(result)
            on_error(WorkerError(rank, "it closed its stream"))
        except grpc.aio.AioRpcError as error:
            # A rank that lives says what is wrong in its last answer.
            is_gone = rank in self._unwritable or error.code() is grpc.StatusCode.UNAVAILABLE
            on_error(self._lost_rank(rank) if is_gone else WorkerError.of(rank, error))
        except Exception as error:  # nobody awaits this task: unheard, the group would wait forever
            _log.exception("rank %d: its result could not be taken", rank)
            on_error(InternalError(f"rank {rank}: its result could not be taken: {error}"))

    async def send(self, plan: bytes) -> None:
        """Writes an encoded plan to every rank. Raises WorkerError if one is gone; its reader may say why before."""
        await asyncio.gather(*(self._write(rank, plan) for rank in range(len(self._streams))))
        if self._unwritable:
            await asyncio.wait([self._readers[rank] for rank in self._unwritable], timeout=_LAST_WORD_S)
            raise self._lost_rank(min(self._unwritable))

    async def _write(self, rank: int, plan: bytes) -> None:
        """Notes a failure at once: grpc puts an error of its own in the place of the status that the reader is due."""
        try:
            await self._streams[rank].write(plan)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):  # it broke; it has ended
            self._unwritable.add(rank)

    def _lost_rank(self, rank: int) -> WorkerError:
        return WorkerError(rank, "its stream broke off")

    async def close(self) -> None:
        for reader in self._readers:
            reader.cancel()
        for stream in self._streams:
            stream.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        await asyncio.gather(*(channel.close() for channel in self._channels))
        self._streams.clear()  # each holds its connection, which would notice when the rank ends
