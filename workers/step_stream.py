"""One `Steps` call of a rank: plans in, answers out in the same order."""

import asyncio
from collections.abc import AsyncIterator

import grpc

from ..errors import FailedPreconditionError
from ..proto import worker_pb2
from .call_status import abort, status_of
from .model_runner import ModelRunner
from .step_pipeline import StepPipeline


class StepStream:
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
        self._runner: ModelRunner | None = runner
        self._pipeline, self._context = pipeline, context
        self._next_step_id = self._due_step_id = 1  # of the plan to come, and of the answer
        self._failed = False  # what still comes is dropped
        self._queued: asyncio.Queue[asyncio.Future[worker_pb2.StepResult] | None] = asyncio.Queue()

    async def run(self, plans: AsyncIterator[worker_pb2.BatchPlan]) -> None:
        """Until the coordinator closes the stream. A plan or step that fails ends the answers, and then the call."""
        taking = asyncio.create_task(self._take(plans))
        try:
            await self._answer()
        except Exception as error:
            self._failed = True
            code, details = status_of(error)
            failure = worker_pb2.StepResult(epoch=self._epoch, step_id=self._due_step_id, failure=details)
            await self._context.write(failure)
            await taking  # a plan written to a call that has ended would lose its status on the other side
            await abort(self._context, code, details)
        finally:
            taking.cancel()

    def end(self, epoch: int) -> None:
        """The rank has gone on to `epoch`: plans of this stream's own are refused from now on."""
        self._epoch, self._next_step_id = epoch, 1
        self._runner = None

    async def _answer(self) -> None:
        while (result := await self._queued.get()) is not None:
            answer = await result
            self._due_step_id += 1
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
        due = (self._epoch, self._next_step_id)
        if self._runner is None or (plan.epoch, plan.step_id) != due:
            came = f"plan {plan.step_id} of epoch {plan.epoch} came"
            return self._refuse(FailedPreconditionError(f"{came}; plan {due[1]} of epoch {due[0]} is due"))
        self._next_step_id += 1
        result = asyncio.wrap_future(self._pipeline.step(self._runner, plan))
        result.add_done_callback(_note_failure)
        return result

    def _refuse(self, error: Exception) -> asyncio.Future[worker_pb2.StepResult]:
        """A result that raises `error` where the answers are written."""
        self._failed = True
        refused: asyncio.Future[worker_pb2.StepResult] = asyncio.get_running_loop().create_future()
        refused.set_exception(error)
        return refused


def _note_failure(result: asyncio.Future[worker_pb2.StepResult]) -> None:
    """The call that it is for may have ended, and nobody hears of it."""
    if not result.cancelled():
        result.exception()
