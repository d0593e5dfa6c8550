"""A rank that fails on order (orders.py): what `faulty_server` has Ray start in the place of RankActor.

Nothing of this is in the code that serves without it.
"""

import os
from pathlib import Path
from typing import Any

import grpc

from ...launch.rank_actor import RankActor
from ...proto import worker_pb2
from .orders import DROP_REPLY, ORDERS_VARIABLE, RAISE, REPEAT_REPLY, Orders


class FaultyContext:
    """A `Steps` call that loses or doubles an answer on order."""

    def __init__(self, context: grpc.aio.ServicerContext, orders: Orders) -> None:
        self._context, self._orders = context, orders

    async def write(self, answer: worker_pb2.StepResult) -> None:
        order = None if answer.failure else self._orders.take(DROP_REPLY, REPEAT_REPLY)
        for _ in range({DROP_REPLY: 0, REPEAT_REPLY: 2}.get(order or "", 1)):
            await self._context.write(answer)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (whatever else a call has)
        return getattr(self._context, name)


class FaultyRankActor(RankActor):
    """Imports what it changes only in the rank's own process."""

    def __init__(self) -> None:
        obey(Orders(Path(os.environ[ORDERS_VARIABLE]), os.getpid()))
        super().__init__()


def obey(orders: Orders) -> None:
    """Has the worker of this process take orders from now on."""
    from ...workers import server
    from ...workers.model_runner import ModelRunner
    from ...workers.plan import Plan
    from ...workers.service import WorkerService
    from ...workers.step_result import PendingResult

    execute = ModelRunner.execute

    def execute_or_raise(self: ModelRunner, plan: Plan) -> PendingResult:
        if orders.take(RAISE):
            raise ArithmeticError("a fault on order")
        return execute(self, plan)

    class FaultyWorkerService(WorkerService):
        async def Steps(self, plans: Any, context: Any) -> None:  # noqa: ANN401, N802
            await super().Steps(plans, FaultyContext(context, orders))

    ModelRunner.execute = execute_or_raise  # type: ignore[method-assign]
    server.WorkerService = FaultyWorkerService  # type: ignore[attr-defined]
